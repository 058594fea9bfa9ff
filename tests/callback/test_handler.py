"""One handler: the arguments of `on`, which of two registrations is more specific, and which method a handler calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, EpochEnd, Event, LearnerView, Phase, Read, TrainingPhase, on
from flowtrain.callback.handler import Handler, Marked, mark
from flowtrain.callback.phases import AbstractTrainingPhase
from flowtrain.errors import HandlerError


def handler(event_type: type[Event], phase_type: type[Phase]) -> Handler:
    return Handler(event_type, phase_type, None, "Printer", "show")


@pytest.mark.parametrize(
    ("one", "other", "covers"),
    [
        ((BatchEnd, TrainingPhase), (Event, Phase), True),
        ((BatchEnd, TrainingPhase), (BatchEnd, Phase), True),
        ((BatchEnd, TrainingPhase), (Event, AbstractTrainingPhase), True),
        ((Event, TrainingPhase), (BatchEnd, Phase), False),
        ((BatchEnd, Phase), (Event, TrainingPhase), False),
        ((BatchEnd, TrainingPhase), (BatchEnd, TrainingPhase), False),
        ((Event, Phase), (BatchEnd, TrainingPhase), False),
    ],
)
def test_more_specific_in_both_types(
    one: tuple[type[Event], type[Phase]], other: tuple[type[Event], type[Phase]], covers: bool
) -> None:
    """Rule 1: a handler goes before another if event and phase are both at least as specific."""
    assert handler(*one).covers(handler(*other)) is covers


def test_a_handler_covers_itself() -> None:
    same = handler(BatchEnd, Phase)
    assert same.covers(same)


def test_a_handler_prints_as_source() -> None:
    assert str(handler(BatchEnd, TrainingPhase)) == "Printer.show on (BatchEnd, TrainingPhase)"
    assert handler(BatchEnd, TrainingPhase).decorator() == "@on(BatchEnd, TrainingPhase, "
    assert handler(BatchEnd, Phase).decorator() == "@on(BatchEnd, "
    assert handler(BatchEnd, Phase).as_function(print).decorator() == "@on(BatchEnd, Phase, Printer, "


def test_it_binds_to_what_the_callback_has_now() -> None:
    class Printer(Callback):
        def show(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            """A method that is registered by its name, further below."""

    printer = Printer()
    assert handler(BatchEnd, Phase).bind(printer) == printer.show

    def added(self: Printer, event: Event, phase: Phase, learner: LearnerView) -> None:
        """A function that is not an attribute of the callback type."""

    bound: Any = handler(BatchEnd, Phase).as_function(added).bind(printer)
    assert (bound.__self__, bound.__func__) == (printer, added)


def three(self: object, event: Event, phase: Phase) -> None: ...
def five(self: object, event: Event, phase: Phase, learner: LearnerView, more: int) -> None: ...
def named_only(self: object, event: Event, phase: Phase, *, learner: LearnerView) -> None: ...
def with_default(self: object, event: Event, phase: Phase, learner: LearnerView, more: int = 1) -> None: ...
def starred(*args: object) -> None: ...


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (three, "three(self: 'object', event: 'Event', phase: 'Phase') -> 'None' cannot be a handler, "),
        (five, "missing a required argument: 'more'. Write def five(self, event, phase, learner) -> None."),
        (named_only, "learner: too many positional arguments. Write def named_only("),
    ],
)
def test_wrong_arity(function: Callable[..., None], why: str) -> None:
    """A handler takes (self, event, phase, learner), positionally; anything else is refused by `on` itself."""
    with pytest.raises(HandlerError) as caught:
        mark(BatchEnd, Phase, None)(function)
    assert why in str(caught.value)


@pytest.mark.parametrize("function", [with_default, starred])
def test_what_takes_four_is_taken(function: Callable[..., None]) -> None:
    assert mark(BatchEnd, Phase, {"batch": Read()})(function) == Marked(BatchEnd, Phase, {"batch": Read()}, function)


def test_no_function() -> None:
    with pytest.raises(HandlerError) as caught:
        mark(BatchEnd, Phase, None)(3)
    assert str(caught.value) == "@on(BatchEnd) marks a method, got 3. Write it above a def of a Callback."


def test_stacked_on() -> None:
    """One `on` per method: two are refused, with both events and what to write."""
    with pytest.raises(HandlerError) as caught:

        class Printer(Callback):  # pyright: ignore[reportUnusedClass]  # refused while it is defined
            @on(EpochEnd)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the checkers refuse it too
            @on(BatchEnd)
            def show(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    assert str(caught.value).endswith(
        "Printer.show is marked by two @on; a method handles one event. "
        "Write two methods for BatchEnd and EpochEnd, and call what they share."
    )


async def waits(self: object, event: Event, phase: Phase, learner: LearnerView) -> None: ...


def yields(self: object, event: Event, phase: Phase, learner: LearnerView) -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [waits, yields])
def test_what_a_call_would_not_run(function: Callable[..., Any]) -> None:
    """Calling a coroutine function or a generator function only makes an object: the body would silently never run."""
    with pytest.raises(HandlerError) as caught:
        mark(BatchEnd, Phase, None)(function)
    assert str(caught.value) == (
        f"{function.__name__} cannot be a handler: it has async or yield in it, so calling it runs nothing of it. "
        f"Write a plain function that does its work and returns None."
    )
