"""The plan: bound handlers in serial order, conditions, and the text of `explain`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.conditions import Condition
from flowtrain.callback.handler import Handler
from flowtrain.graph.plan import Call, Plan, PlannedHandler, owner_of
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState


class Says(Callback):
    """Appends its name to a shared list at BatchEnd and EpochEnd."""

    def __init__(self, said: list[str], access: Access | None = None, after: tuple[type[Callback], ...] = ()) -> None:
        self.said = said
        self.access: Access = access or {}
        self.after = after

    def state_access(self) -> Access:
        return self.access

    def run_after(self) -> tuple[type[Callback], ...]:
        return self.after

    def setup(self, learner: LearnerView) -> None:
        for path, kind in self.access.items():
            if isinstance(kind, Write):
                setattr(learner.cbstate, path.removeprefix("cbstate."), 0)

    @on(BatchEnd)
    def batch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.said.append(f"{self.name} {type(event).__name__}")

    @on(EpochEnd, access={})
    def epoch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.said.append(f"{self.name} {type(event).__name__}")


class Maker(Says): ...


class Shower(Says): ...


class Second(Condition):
    """A condition that counts its calls and the runs of its handler; it allows every second event."""

    def __init__(self, event_type: type[Event]) -> None:
        super().__init__(event_type)
        self.asked: list[Phase] = []
        self.ran = 0

    def passed(self, phase: Phase) -> None:
        self.ran += 1

    def ready(self, phase: Phase) -> bool:
        self.asked.append(phase)
        return len(self.asked) % 2 == 0


def three(said: list[str]) -> Callbacks:
    reader = Says(said, {"cbstate.x": Read(), "cbstate.y": Read()}, after=(Shower,))
    return Callbacks([reader, Shower(said), Maker(said, {"cbstate.x": Write(), "cbstate.y": Write()})], LearnerState())


def test_a_plan_is_in_serial_order_and_bound() -> None:
    """Rule 12: steps and calls are in serial order."""
    said: list[str] = []
    plan = three(said).plan(BatchEnd, TrainingPhase)
    assert [planned.label for planned in plan.handlers] == ["Shower.batch", "Maker.batch", "Says.batch"]
    assert [planned.callback.name for planned in plan.handlers] == ["Shower", "Maker", "Says"]
    assert plan.calls == tuple((planned.call, planned.view) for planned in plan.handlers)
    assert plan.ancestors == (0, 0, 0b11)
    assert len(plan) == 3
    for call, view in plan.calls:
        call(BatchEnd(), TrainingPhase(), view)
    assert said == ["Shower BatchEnd", "Maker BatchEnd", "Says BatchEnd"]


def test_explain_prints_the_reason_of_every_edge() -> None:
    assert list(three([]).plan(BatchEnd, TrainingPhase).explain()) == [
        "  1. Shower.batch",
        "  2. Maker.batch",
        "  3. Says.batch    after Shower: Says.run_after() names Shower",
        "                   after Maker: Maker writes cbstate.x, Says reads it",
        "                   after Maker: Maker writes cbstate.y, Says reads it",
    ]


def test_a_handler_with_its_own_access_has_its_own_edges() -> None:
    """At EpochEnd no handler declares a path, so only `run_after` gives an edge."""
    assert list(three([]).plan(EpochEnd, TrainingPhase).explain()) == [
        "  1. Shower.epoch",
        "  2. Says.epoch    after Shower: Says.run_after() names Shower",
        "  3. Maker.epoch",
    ]


def test_an_empty_plan() -> None:
    plan = three([]).plan(FitBegin, Phase)
    assert (len(plan), list(plan.explain()), plan.calls) == (0, [], ())


def test_a_plan_is_made_once() -> None:
    callbacks = three([])
    assert callbacks.plan(BatchEnd, TrainingPhase) is callbacks.plan(BatchEnd, TrainingPhase)


@pytest.mark.parametrize(("event_type", "always"), [(FitEnd, True), (FitBegin, False), (BatchEnd, False)])
def test_handlers_always_run_at_the_end_of_a_fit(event_type: type[Event], always: bool) -> None:
    """Rule 17."""
    assert three([]).plan(event_type, Phase).always is always


def test_a_condition_is_asked_before_the_handler() -> None:
    """`throttle` attaches conditions to a callback; only conditions about the event of the plan are asked."""
    said: list[str] = []
    callback, condition = Says(said), Second(BatchEnd)
    callback.conditions = (condition,)
    callbacks = Callbacks([callback], LearnerState())
    for event in (BatchEnd(), BatchEnd(), EpochEnd(), BatchEnd(), BatchEnd()):
        for call, view in callbacks.plan(type(event), ValidationPhase).calls:
            call(event, ValidationPhase(), view)
    assert said == ["Says BatchEnd", "Says EpochEnd", "Says BatchEnd"]
    assert condition.asked == [ValidationPhase()] * 4


def test_every_condition_counts_every_event() -> None:
    said: list[str] = []
    callback, one, other = Says(said), Second(BatchEnd), Second(Event)
    callback.conditions = (one, other)
    other.ready(TrainingPhase())  # it is one event ahead, so the two never allow the same event
    [(call, view)] = Callbacks([callback], LearnerState()).plan(BatchEnd, TrainingPhase).calls
    for _ in range(4):
        call(BatchEnd(), TrainingPhase(), view)
    assert (len(one.asked), len(other.asked), len(said)) == (4, 5, 0)
    other.ready(TrainingPhase())
    for _ in range(4):
        call(BatchEnd(), TrainingPhase(), view)
    assert (len(one.asked), len(other.asked), len(said)) == (8, 10, 2)
    assert (one.ran, other.ran) == (2, 2)  # each condition is told that the handler runs


def test_a_handler_for_a_base_event_is_asked_for_the_event_that_fires() -> None:
    """A condition on BatchEnd decides about a handler of Event only when BatchEnd fires."""
    asked: list[type[Event]] = []

    class Anything(Callback):
        def handlers(self) -> Iterator[tuple[type, Handler]]:
            yield type(self), Handler(Event, Phase, None, "Anything", "handle")

        def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            asked.append(type(event))

    callback = Anything()
    callback.conditions = (Second(BatchEnd),)
    callbacks = Callbacks([callback], LearnerState())
    for event in (BatchEnd(), EpochEnd(), BatchEnd(), EpochEnd()):
        [(call, view)] = callbacks.plan(type(event), TrainingPhase).calls
        call(event, TrainingPhase(), view)
    assert asked == [EpochEnd, BatchEnd, EpochEnd]


def test_who_watches_sees_the_step_and_only_what_runs() -> None:
    """Strict mode wraps each call inside of the conditions, so it compares nothing if the handler does not run."""
    said: list[str] = []
    callback = Says(said)
    callback.conditions = (Second(BatchEnd),)

    def watch(planned: PlannedHandler) -> Call:
        def call(event: Event, phase: Phase, view: LearnerView) -> None:
            said.append(f"before {planned.label}")
            planned.call(event, phase, view)

        return call

    [(call, view)] = Callbacks([callback], LearnerState(), watch=watch).plan(BatchEnd, TrainingPhase).calls
    call(BatchEnd(), TrainingPhase(), view)
    assert said == []
    call(BatchEnd(), TrainingPhase(), view)
    assert said == ["before Says.batch", "Says BatchEnd"]


def test_a_refusal_names_the_declaration_to_edit() -> None:
    """Rule 3: a refusal names the place to edit: the handler's own access, `state_access`, or for `setup` both."""
    callbacks = Callbacks([Maker([], {"cbstate.x": Write()})], LearnerState())
    [node] = callbacks.nodes
    by_name = {handler.attribute: handler for _, handler in node.handlers}
    shared = ((("cbstate", "x"), Write()),)
    found = [owner_of(node, handler) for handler in (by_name["batch"], by_name["epoch"], None)]
    assert [(owner.callback, owner.type_name, owner.where) for owner in found] == [
        ("Maker", "Maker", "state_access"),
        ("Maker", "Maker", "epoch"),
        ("Maker", "Maker", "state_access"),
    ]
    assert [owner.declaration for owner in found] == [shared, (), shared]
    assert [owner.decorator for owner in found] == ["", "@on(EpochEnd, ", ""]


def test_a_plan_compares_by_identity() -> None:
    one: Plan = three([]).plan(BatchEnd, TrainingPhase)
    assert one != three([]).plan(BatchEnd, TrainingPhase)
    assert len({one, one}) == 1
