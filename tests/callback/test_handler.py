"""One handler: types and names in `on`, which of two registrations is more specific, and which method it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    AccessError,
    AmbiguousHandlerError,
    BatchBegin,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    FitEnd,
    HandlerError,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callback.handler import Handler, Marked, mark
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from tests.support.untyped import untyped


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


# --- names of what an instance says


class Chosen(Callback):
    """Each instance decides which event it handles, and which paths that handler touches."""

    def __init__(self, event_type: Any = BatchEnd, phase_type: Any = TrainingPhase, **said: Any) -> None:
        self.event_type, self.phase_type = event_type, phase_type
        vars(self).update({"verbose": False, "path": "batch.loss", **said})

    def reads(self) -> Access:
        return {vars(self)["path"]: Read()}

    def declares(self) -> Access | None:
        return None

    def state_access(self) -> Access:
        return {"batch.inputs": Read()}

    @on("event_type", "phase_type", access="reads")
    def main(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    @on(EpochEnd, "phase_type", access={"params": Read()}, enabled="verbose")
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    @on(FitEnd, access="declares")
    def last(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None: ...


def handled(callback: Callback) -> list[str]:
    return [f"{handler} {handler.access}" for _, handler in callback.handlers()]


def test_on_takes_names_of_what_an_instance_says() -> None:
    """`on` takes names of attributes and methods; with ``enabled`` None or False, but not 0, there is no handler."""
    assert handled(Chosen()) == [
        "Chosen.main on (BatchEnd, TrainingPhase) {'batch.loss': Read()}",
        "Chosen.last on (FitEnd, Phase) None",
    ]
    assert handled(Chosen(BatchBegin, ValidationPhase, verbose=0, path="batch.inputs"))[:2] == [
        "Chosen.main on (BatchBegin, ValidationPhase) {'batch.inputs': Read()}",
        "Chosen.end on (EpochEnd, ValidationPhase) {'params': Read()}",
    ]
    assert len(handled(Chosen(verbose=None))) == 2

    class Other(Chosen):
        verbose = True

        def __init__(self) -> None:
            super().__init__(reads=lambda: None)
            del self.verbose  # a subclass overrides the attribute of the class

        def reads(self) -> Access:  # a subclass overrides the method
            return {"batch.outputs": Read()}

    other = Other()
    vars(other).pop("reads")
    assert handled(other)[:2] == [
        "Chosen.main on (BatchEnd, TrainingPhase) {'batch.outputs': Read()}",
        "Chosen.end on (EpochEnd, TrainingPhase) {'params': Read()}",
    ]


def test_two_instances_of_one_type_have_each_their_own() -> None:
    first, second = Chosen(), Chosen(EpochEnd, ValidationPhase, verbose=None)
    callbacks = Callbacks([first, second], LearnerState(), [TrainingPhase, ValidationPhase])
    steps = {
        (kind, phase): [planned.label for planned in callbacks.plan(kind, phase).handlers]
        for kind in (BatchEnd, EpochEnd)
        for phase in (TrainingPhase, ValidationPhase)
    }
    assert steps == {
        (BatchEnd, TrainingPhase): ["Chosen.main"],
        (BatchEnd, ValidationPhase): [],
        (EpochEnd, TrainingPhase): [],
        (EpochEnd, ValidationPhase): ["Chosen#2.main"],
    }


def test_a_callback_that_has_enabled_nothing_is_no_mistake() -> None:
    """A callback that has switched off all its handlers is allowed, and one that has marked no method is refused."""

    class Quiet(Callback):
        verbose = False

        @on(EpochEnd, enabled="verbose")
        def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    assert [len(callbacks) for callbacks in [Callbacks([Quiet()], LearnerState())]] == [1]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"event_type": BatchEnd()},
            "Chosen.main takes its event_type from 'event_type', as on() says, and that is BatchEnd(), which is no "
            "subclass of Event. Set self.event_type in __init__, or give on() the event_type itself instead of a "
            "name.",
        ),
        ({"phase_type": None}, "Chosen.main takes its phase_type from 'phase_type', as on() says, and that is None,"),
        ({"phase_type": EpochEnd}, "which is no subclass of Phase. Set self.phase_type in __init__, or"),
    ],
)
def test_what_an_instance_says_must_be_a_type(said: dict[str, Any], message: str) -> None:
    with pytest.raises(HandlerError) as caught:
        Callbacks([Chosen(**said)], LearnerState())
    assert message in str(caught.value)


def test_what_on_names_must_be_there() -> None:
    class Forgets(Callback):
        def __init__(self) -> None:
            self.verbos = True

        @on(EpochEnd, enabled="verbose")
        def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(HandlerError) as caught:
        Callbacks([Forgets()], LearnerState())
    assert str(caught.value) == (
        "Forgets.show takes its enabled from 'verbose', as on() says, and Forgets has no attribute or method of that "
        "name. Did you mean 'verbos'? Set self.verbose in __init__."
    )
    with pytest.raises(HandlerError, match=r"on\(\) got enabled=True; enabled is the name of an attribute or method"):
        on(EpochEnd, enabled=untyped(True))

    class Wrong(Callback):
        reads = 3

        @on(EpochEnd, access="reads")
        def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(AccessError, match=r"Wrong\.show \(@on\(EpochEnd, \.\.\.\)\) is 3, which is neither Read\(\)"):
        Callbacks([Wrong()], LearnerState())


class Switched(Callback):
    """Has a handler that the test switches on or off."""

    def __init__(self, wanted: Any) -> None:
        self.wanted = wanted

    @on(EpochEnd, enabled="wanted")
    def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...


class SwitchedByStaticMethod(Callback):
    @staticmethod
    def wanted() -> bool:
        return False

    @on(EpochEnd, enabled="wanted")
    def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...


class SwitchedByClassMethod(Callback):
    @classmethod
    def wanted(cls) -> bool:
        return False

    @on(EpochEnd, enabled="wanted")
    def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...


@pytest.mark.parametrize("off", [None, False, lambda: False, np.bool_(False), torch.tensor(False), lambda: None])
def test_what_switches_a_handler_off(off: Any) -> None:
    assert handled(Switched(off)) == []


@pytest.mark.parametrize("kind", [SwitchedByStaticMethod, SwitchedByClassMethod])
def test_a_method_of_the_class_switches_a_handler_off(kind: type[Callback]) -> None:
    assert handled(kind()) == []


@pytest.mark.parametrize(
    "on_", [True, lambda: True, np.bool_(True), 0, "", {}, lambda number: False, np.zeros(2, bool), np.float64(0.0)]
)
def test_other_values_are_settings_and_leave_a_handler_on(on_: Any) -> None:
    assert len(handled(Switched(on_))) == 1


def test_an_error_within_a_property_is_raised_as_it_is() -> None:
    class Broken(Callback):
        @property
        def kind(self) -> type[Event]:
            raise AttributeError("inner problem")

        @on("kind")
        def show(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(AttributeError, match=r"^inner problem\nraised in Broken\.handlers$"):
        Callbacks([Broken()], LearnerState())


def test_an_added_function_takes_names_too() -> None:
    class Host(Callback):
        def __init__(self, verbose: bool) -> None:
            self.verbose = verbose

    @on(EpochEnd, TrainingPhase, Host, enabled="verbose")
    def show(self: Host, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None: ...

    assert [handled(Host(verbose)) for verbose in (True, False)] == [
        ["Host.show on (EpochEnd, TrainingPhase) None"],
        [],
    ]


def test_stacked_on_of_an_added_function() -> None:
    """A function that is added to a type has one `on`: of two, the outer one would silently replace the inner one."""

    class Counter(Callback):
        pass

    with pytest.raises(HandlerError) as caught:

        @on(BatchEnd, TrainingPhase, Counter)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # refused
        @on(EpochEnd, TrainingPhase, Counter)
        def count(self: Counter, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    assert str(caught.value) == (
        "count is marked by two @on, and the outer one would replace the inner one. "
        "Write a function for EpochEnd and another one for BatchEnd."
    )


def test_two_handlers_for_exactly_the_same_are_to_be_merged() -> None:
    class Twice(Callback):
        @on(EpochEnd, TrainingPhase)
        def one(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None: ...

        @on(EpochEnd, TrainingPhase)
        def two(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None: ...

    with pytest.raises(AmbiguousHandlerError, match=r"Twice\.two on .*Remove one, or merge"):
        Callbacks([Twice()], LearnerState())
