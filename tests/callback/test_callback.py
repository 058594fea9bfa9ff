# pyright: reportPrivateUsage=false
# The test reads `_HOOKS`, which is private, entry by entry.
"""Dispatch: which handler of a callback runs, where handlers come from, and which can never run (rules 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import flowtrain
from flowtrain import (
    AbstractTrainingPhase,
    Access,
    AmbiguousHandlerError,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    HandlerError,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callback.conditions import Condition
from flowtrain.callback.handler import Handler, check_handlers, find_handler
from flowtrain.graph.checks import _HOOKS
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.phases import Silent
from tests.support.untyped import untyped


class Base(Callback):
    """Keeps the names of those of its handlers that ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    @on(Event)
    def anything(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.ran.append("Base.anything")

    @on(BatchEnd)
    def batch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.ran.append("Base.batch")

    @on(BatchEnd, AbstractTrainingPhase)
    def training(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        self.ran.append("Base.training")


class MyTraining(TrainingPhase):
    """A user's training phase."""


class Late(BatchEnd):
    """An event of a user, derived from BatchEnd."""


def run(callback: Base, event: Event, phase: Phase) -> list[str]:
    """Run a plan with one callback as the serial executor does; return which methods ran."""
    callback.ran.clear()
    for call, view in Callbacks([callback], LearnerState()).plan(type(event), type(phase)).calls:
        call(event, phase, view)
    return callback.ran


@pytest.mark.parametrize(
    ("event", "phase", "ran"),
    [
        (BatchEnd(), TrainingPhase(), "Base.training"),
        (BatchEnd(), MyTraining(), "Base.training"),
        (Late(), MyTraining(), "Base.training"),
        (BatchEnd(), ValidationPhase(), "Base.batch"),
        (Late(), ValidationPhase(), "Base.batch"),
        (EpochEnd(), TrainingPhase(), "Base.anything"),
        (FitBegin(), Phase(), "Base.anything"),
    ],
)
def test_the_most_specific_handler_runs_alone(event: Event, phase: Phase, ran: str) -> None:
    """Rule 1: for an event and phase a callback runs at most one handler, the most specific."""
    assert run(Base(), event, phase) == [ran]


def test_no_handler_no_step() -> None:
    """Rule 2: a callback without a handler for the event is not in its plan."""

    class OnlyEpochs(Callback):
        @on(EpochEnd)
        def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    callbacks = Callbacks([OnlyEpochs()], LearnerState())
    assert len(callbacks.plan(EpochEnd, TrainingPhase)) == 1
    assert len(callbacks.plan(BatchEnd, TrainingPhase)) == 0


def test_a_subclass_goes_before_what_it_inherits() -> None:
    """Rule 1: the handler that a subclass defines runs, even if a handler that it inherits is more specific."""

    class Derived(Base):
        @on(BatchEnd)
        def mine(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.ran.append("Derived.mine")

    handlers = list(Derived().handlers())
    found = find_handler(handlers, BatchEnd, TrainingPhase)
    assert found is not None
    assert found.attribute == "mine"
    assert find_handler(handlers, EpochEnd, TrainingPhase) is handlers[1][1]
    assert [(owner.__name__, handler.attribute) for owner, handler in handlers] == [
        ("Derived", "mine"),
        ("Base", "anything"),
        ("Base", "batch"),
        ("Base", "training"),
    ]


def test_an_override_without_on_keeps_the_registration() -> None:
    class Derived(Base):
        def training(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
            super().training(event, phase, learner)
            self.ran.append("Derived.training")

    assert run(Derived(), BatchEnd(), TrainingPhase()) == ["Base.training", "Derived.training"]
    assert run(Derived(), BatchEnd(), ValidationPhase()) == ["Base.batch"]


def test_an_override_with_on_replaces_the_registration() -> None:
    class Derived(Base):
        @on(EpochEnd, TrainingPhase)
        def batch(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # another event
            self, event: Event, phase: Phase, learner: LearnerView
        ) -> None:
            self.ran.append("Derived.batch")

    assert run(Derived(), EpochEnd(), TrainingPhase()) == ["Derived.batch"]
    assert run(Derived(), BatchEnd(), ValidationPhase()) == ["Base.anything"]
    assert run(Base(), BatchEnd(), ValidationPhase()) == ["Base.batch"]  # the handler of the base class is unchanged


def test_equally_specific_handlers() -> None:
    """Rule 1: two equally specific handlers are an error when built, naming both and a way out."""

    class Torn(Callback):
        @on(Event, TrainingPhase)
        def one(self, event: Event, phase: TrainingPhase, learner: LearnerView) -> None: ...
        @on(BatchEnd)
        def two(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(AmbiguousHandlerError) as caught:
        Callbacks([Torn()], LearnerState(), [TrainingPhase])
    assert str(caught.value) == (
        "Torn has two handlers for (BatchEnd, TrainingPhase) and neither is more specific: "
        "Torn.one on (Event, TrainingPhase) and Torn.two on (BatchEnd, Phase). "
        "Remove one, or add a handler with @on(BatchEnd, TrainingPhase)."
    )

    class Settled(Torn):
        @on(BatchEnd, TrainingPhase)
        def three(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None: ...

    [planned] = Callbacks([Settled()], LearnerState(), [TrainingPhase]).plan(BatchEnd, TrainingPhase).handlers
    assert planned.label == "Settled.three"


def test_the_same_registration_twice() -> None:
    class Double(Callback):
        @on(BatchEnd)
        def one(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...
        @on(BatchEnd)
        def two(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(AmbiguousHandlerError, match=r"^Double has two handlers for \(BatchEnd, Phase\)"):
        check_handlers(list(Double().handlers()))


# --- mixins


class Shows:
    """A mixin with a handler, which is not a callback itself."""

    ran: list[str]

    @on(BatchEnd)
    def show(self: Any, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.ran.append("Shows.show")


def test_a_mixin_brings_its_handler() -> None:
    class Printer(Shows, Callback):
        def __init__(self) -> None:
            self.ran = []

    printer = Printer()
    [(owner, handler)] = printer.handlers()
    assert (owner, str(handler)) == (Printer, "Printer.show on (BatchEnd, Phase)")
    handler.bind(printer)(BatchEnd(), Phase(), None)
    assert printer.ran == ["Shows.show"]


def test_a_callback_overrides_its_mixin() -> None:
    """The method of the callback runs where the mixin registered its own, and can call the mixin's through super()."""

    class Printer(Shows, Callback):
        def __init__(self) -> None:
            self.ran = []

        def show(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            super().show(event, phase, learner)
            self.ran.append("Printer.show")

    printer = Printer()
    [(_, handler)] = printer.handlers()
    handler.bind(printer)(BatchEnd(), Phase(), None)
    assert printer.ran == ["Shows.show", "Printer.show"]


def test_a_subclass_does_not_fall_back_to_the_mixin() -> None:
    class Printer(Shows, Callback):
        @on(EpochEnd)
        def show(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # another event
            self, event: Event, phase: Phase, learner: LearnerView
        ) -> None: ...

    class Louder(Printer): ...

    assert [str(handler) for _, handler in Louder().handlers()] == ["Printer.show on (EpochEnd, Phase)"]
    assert Louder.show is Printer.show


def test_a_base_that_goes_before_the_mixin_decides() -> None:
    class First(Callback):
        @on(EpochEnd)
        def show(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    class Both(First, Shows):  # type: ignore[misc]  # pyright: ignore[reportIncompatibleMethodOverride]  # on purpose
        """A callback with two base classes that both define a method `show`."""

    assert [str(handler) for _, handler in Both().handlers()] == ["First.show on (EpochEnd, Phase)"]
    assert Both.show is First.show


def test_the_mixin_alone_is_a_plain_class() -> None:
    alone = Shows()
    alone.ran = []
    alone.show(BatchEnd(), Phase(), untyped(None))
    assert alone.ran == ["Shows.show"]


# --- functions added to a type


@pytest.fixture
def target() -> type[Base]:
    class Target(Base): ...

    return Target


def test_an_added_function_is_a_handler_of_the_type(target: type[Base]) -> None:
    """`on(E, P, CallbackType)` adds a handler to the type; `access=` declares the paths that this handler touches."""
    before = target()
    old = Callbacks([before], LearnerState(), [TrainingPhase])

    @on(EpochEnd, TrainingPhase, target, access={"batch.loss": Read()})
    def extra(self: Base, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.ran.append("extra")

    callback = target()
    assert run(callback, EpochEnd(), TrainingPhase()) == ["extra"]
    assert run(callback, EpochEnd(), ValidationPhase()) == ["Base.anything"]
    [planned] = Callbacks([callback], LearnerState(), [TrainingPhase]).plan(EpochEnd, TrainingPhase).handlers
    assert planned.node.access[planned.handler] == ((("batch", "loss"), Read()),)
    assert planned.label == "Target.extra"
    # The plans of a learner that was built earlier do not change, not even for events that the learner fires later.
    assert [planned.label for planned in old.plan(EpochEnd, TrainingPhase).handlers] == ["Target.anything"]
    assert [planned.label for planned in old.plan(EpochEnd, MyTraining).handlers] == ["Target.anything"]


def test_an_added_function_that_touches_more_is_to_say_so_itself(target: type[Base]) -> None:
    """Rule 3: the error says to declare `access=`, since a user cannot change the `state_access` of another's type."""

    @on(EpochEnd, TrainingPhase, target)
    def extra(self: Base, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        _ = learner.batch.loss

    with pytest.raises(flowtrain.ProtectedException) as caught:
        run(target(), EpochEnd(), TrainingPhase())
    assert str(caught.value).endswith(
        'In Target.extra write:\n\n    @on(EpochEnd, TrainingPhase, Target, access={"batch.loss": Read()})\n'
    )


def test_an_added_function_goes_to_subclasses_but_not_to_the_base(target: type[Base]) -> None:
    class Sub(target):  # type: ignore[valid-type,misc]  # made by a fixture
        pass

    @on(EpochEnd, Phase, target)
    def extra(self: Base, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.ran.append("extra")

    assert run(Sub(), EpochEnd(), TrainingPhase()) == ["extra"]
    assert run(Base(), EpochEnd(), TrainingPhase()) == ["Base.anything"]


def test_the_same_function_run_again_replaces_its_handler(target: type[Base]) -> None:
    """A cell of a notebook that runs again defines the same function again, here for another event."""

    def cell(event_type: type[Event], text: str) -> None:
        @on(event_type, Phase, target)
        def extra(self: Base, event: Event, phase: Phase, learner: LearnerView) -> None:
            self.ran.append(text)

    cell(EpochEnd, "first")
    cell(BatchBegin, "second")
    assert run(target(), BatchBegin(), TrainingPhase()) == ["second"]
    assert run(target(), EpochEnd(), TrainingPhase()) == ["Base.anything"]


def test_functions_without_a_name_are_told_apart_by_what_they_handle(target: type[Base]) -> None:
    @on(EpochEnd, Phase, target)
    def _(self: Base, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.ran.append("epoch")

    @on(BatchBegin, Phase, target)
    def _(self: Base, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        self.ran.append("batch")

    assert run(target(), BatchBegin(), TrainingPhase()) == ["batch"]
    assert run(target(), EpochEnd(), TrainingPhase()) == ["epoch"]


def test_two_functions_for_one_event_are_ambiguous(target: type[Base]) -> None:
    @on(EpochEnd, Phase, target)
    def one(self: Base, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    @on(EpochEnd, Phase, target)
    def two(self: Base, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(AmbiguousHandlerError, match=r"Target\.one on \(EpochEnd, Phase\) and Target\.two on"):
        Callbacks([target()], LearnerState())


# --- handlers that can never run


def wrong(event_type: Any, phase_type: Any = Phase, callback_type: Any = None) -> None:
    on(event_type, phase_type, callback_type)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BatchEnd(),), "on() takes an event type first, got BatchEnd(). Write @on(BatchEnd, TrainingPhase)."),
        ((TrainingPhase,), "on() takes an event type first, got <class 'flowtrain.callback.phases.TrainingPhase'>."),
        ((BatchEnd, TrainingPhase()), "on() takes a phase type second, got TrainingPhase."),
        ((BatchEnd, Base), "on() takes a phase type second, got <class "),
        ((BatchEnd, Phase, Base.batch), "on() adds handlers to a subclass of Callback, got <function Base.batch"),
        (
            (BatchEnd, Phase, Callback),
            "on() adds handlers to a subclass of Callback, got <class 'flowtrain.callback.callback",
        ),
        ((BatchEnd, TrainingPhase, int), "Write @on(BatchEnd, TrainingPhase, Mine)."),
    ],
)
def test_on_takes_types(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(HandlerError) as caught:
        wrong(*arguments)
    assert message in str(caught.value)


def make(event_type: type[Event], phase_type: type[Phase], base: type[Callback] = Callback) -> Callback:
    class Printer(base):  # type: ignore[valid-type,misc]  # given by the test
        @on(event_type, phase_type)
        def show(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    return Printer()


@pytest.mark.parametrize(
    ("event_type", "phase_type", "base", "message"),
    [
        (
            BackwardEnd, ValidationPhase, Callback,
            "Printer.show on (BackwardEnd, ValidationPhase) can never run: ValidationPhase does not fire BackwardEnd. "
            "It fires: EpochBegin, BatchBegin, LossBegin, BatchEnd, BatchCancelled, EpochEnd, EpochCancelled. "
            "Handle one of these, or another phase.",
        ),
        (
            FitEnd, TrainingPhase, Callback,
            "Printer.show on (FitEnd, TrainingPhase) can never run: FitEnd is fired with Phase(), not with "
            "TrainingPhase. Write @on(FitEnd).",
        ),
        (
            Event, Phase, Base,
            "Base.anything on (Event, Phase) can never run: Printer.show on (Event, Phase) goes before it. To replace "
            "an inherited handler override anything; to run both, give the new one a more specific event or phase.",
        ),
    ],
)  # fmt: skip
def test_a_handler_that_can_never_run(
    event_type: type[Event], phase_type: type[Phase], base: type[Callback], message: str
) -> None:
    """A handler that no firing can reach is an error when the callback is built, with the reason and a remedy."""
    with pytest.raises(HandlerError) as caught:
        Callbacks([make(event_type, phase_type, base)], LearnerState())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("event_type", "phase_type"),
    [
        (Late, ValidationPhase),  # an event of a user, which a handler may fire itself
        (BackwardEnd, Silent),  # a phase that does not say which events it fires
        (Event, TrainingPhase),
        (FitBegin, Phase),
        (BackwardEnd, MyTraining),
    ],
)
def test_a_handler_that_may_run(event_type: type[Event], phase_type: type[Phase]) -> None:
    check_handlers(list(make(event_type, phase_type).handlers()))


# --- the rest of a callback


def test_what_a_callback_is_unless_it_says_otherwise() -> None:
    class Plain(Callback): ...

    plain = Plain()
    found: tuple[Access, object, object, object] = (
        plain.state_access(),
        plain.run_after(),
        plain.resolve_conflict(Base()),
        plain.state_dict(),
    )
    assert found == ({}, (), None, {})
    assert repr(plain) == "<Plain>"
    plain.name = "mine"
    assert repr(plain) == "<mine>"


def test_a_condition_must_say_when() -> None:
    class Never(Condition): ...

    with pytest.raises(NotImplementedError) as caught:
        Never(BatchEnd).ready(TrainingPhase())
    text = "Never does not define ready(phase). Define it: it returns whether the callback may handle the event."
    assert str(caught.value) == text


def test_handlers_may_be_made_per_instance() -> None:
    """A type may override `handlers`; it is called once, when the callback is added to a learner."""
    asked: list[str] = []

    class Chooses(Base):
        def handlers(self) -> Iterator[tuple[type, Handler]]:
            asked.append("handlers")
            yield type(self), Handler(EpochEnd, TrainingPhase, {"batch": Read()}, "Chooses", "anything")

    callbacks = Callbacks([Chooses()], LearnerState(), [TrainingPhase])
    assert [planned.label for planned in callbacks.plan(EpochEnd, TrainingPhase).handlers] == ["Chooses.anything"]
    assert [len(callbacks.plan(kind, TrainingPhase)) for kind in (BatchEnd, EpochEnd)] == [0, 1]
    assert asked == ["handlers"]


@pytest.mark.parametrize("method", ["state_access", "run_after", "resolve_conflict", "setup"])
def test_a_method_that_is_a_value_is_refused(method: str) -> None:
    with pytest.raises(CallbackError, match=rf"Wrong\.{method} is \{{\}}, and must be a method: def {method}\(self"):
        type("Wrong", (Callback,), {method: {}})


@pytest.mark.parametrize("method", ["state_access", "run_after", "resolve_conflict", "setup"])
def test_a_method_of_which_a_call_would_run_nothing_is_refused(method: str) -> None:
    def lazy(self: Any) -> Any:
        yield

    async def later(self: Any) -> None: ...

    for function in (lazy, later):
        with pytest.raises(CallbackError, match=rf"^Wrong\.{method} has async or yield in it, .* Write a plain method"):
            type("Wrong", (Callback,), {method: function})


def test_a_dataclass_with_slots_keeps_its_handlers() -> None:
    """The decorator makes a copy of the class, whose methods have no marks any more."""

    @dataclass(slots=True, eq=False)
    class Counts(Callback):
        seen: int = 0

        @on(BatchEnd)
        def count(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.seen += 1

    class More(Counts):
        """Inherits the handler."""

    both = Counts(), More(3)
    tiny_learner(*both, n_batches=2, data=tiny_batches(n_batches=2)).fit(1)
    assert [each.seen for each in both] == [2, 5]


# --- callbacks without a handler


class Keras(Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...


class Lightning(Callback):
    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None: ...


class Fastai(Callback):
    def before_fit(self) -> None: ...


class Transformers(Callback):
    def on_log(self, args: Any, state: Any, control: Any) -> None: ...


class Forgotten(Callback):
    """A base whose subclass defines no handler of its own."""

    def show(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


class Child(Forgotten):
    def helper(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "name", "types"),
    [
        (Keras, "on_epoch_end", "EpochEnd, TrainingPhase"),
        (Lightning, "on_validation_epoch_end", "EpochEnd, ValidationPhase"),
        (Fastai, "before_fit", "FitBegin"),
        (Transformers, "on_log", "EpochEnd, TrainingPhase"),
        (Forgotten, "show", "EpochEnd, TrainingPhase"),
        (Child, "show", "EpochEnd, TrainingPhase"),
    ],
)
def test_a_callback_without_any_handler_that_has_a_method_meant_as_one_is_refused(
    kind: type[Callback], name: str, types: str
) -> None:
    """A method whose author forgot `on` would never run, and nobody would notice."""
    with pytest.raises(HandlerError) as caught:
        Callbacks([kind()], LearnerState())
    assert str(caught.value) == (
        f"{kind.__name__} has no handler, so it would do nothing: no method of it is marked with on(), and a method is "
        f"a handler by its mark, not by its name. For {name} write:\n\n    @on({types})\n"
        f"    def {name}(self, event, phase, learner) -> None: ...\n"
    )


def test_a_callback_without_a_method_that_looks_like_a_handler_is_allowed() -> None:
    class Prepares(Callback):
        def setup(self, learner: LearnerView) -> None: ...

        def helper(self, learner: LearnerView) -> None: ...

    class Marks(Keras):
        @on(EpochEnd, TrainingPhase)
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            self.on_epoch_end(1)

    assert [len(node.handlers) for node in Callbacks([Prepares(), Marks()], LearnerState()).nodes] == [0, 1]
    for types in _HOOKS:
        exec(f"@on({types})\ndef f(self, event, phase, learner): ...", vars(flowtrain).copy())
