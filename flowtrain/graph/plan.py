"""The plan: what runs for one event type and phase type, bound and ready to call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from flowtrain.callback.access import declare
from flowtrain.callback.callback import Callback, Condition, draws_own, is_quiet
from flowtrain.callback.conditions import Every, When
from flowtrain.callback.events import Event, FitEnd
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.graph.nodes import Edge, Node, Order
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.partial_view import Owner
from flowtrain.state.random_numbers import Draws, own_numbers
from flowtrain.state.views import bind_view

__all__ = ["Call", "Plan", "Step", "make_plan", "owner_of", "set_up"]

Call: TypeAlias = Callable[[Event, Phase, LearnerView], None]


@dataclass(frozen=True, eq=False)
class Step:
    """One handler in a plan.

    Attributes:
        node: Its callback in the graph.
        handler: Its registration.
        call: What to call with ``(event, phase, view)``; asks the callback's conditions first, where it has some.
        view: What the handler sees.
        conditions: The callback's conditions that `call` asks first.
    """

    node: Node
    handler: Handler
    call: Call
    view: LearnerView
    conditions: tuple[Condition, ...] = ()

    @property
    def callback(self) -> Callback:
        """The callback."""
        return self.node.callback

    @property
    def label(self) -> str:
        """The callback's name and the handler's, as ``"Printer.show"``."""
        return f"{self.node.name}.{self.handler.attribute}"

    def instead(self, call: Call) -> Step:
        """Return this step with another function to call, where the same conditions say so."""
        return replace(self, call=_conditional(call, self.conditions) if self.conditions else call)


@dataclass(frozen=True, eq=False)
class Plan:
    """What runs for one (event type, phase type). Every executor takes the same plan.

    Attributes:
        event_type: The event.
        phase_type: The phase.
        steps: The handlers in serial order.
        edges: What must run before what, by position in `steps`, with the reasons.
        ancestors: For each position, the positions that must run before it, as the bits of an integer.
        calls: ``(call, view)`` of each step: all that a serial run needs.
        always: Whether handlers run also when one that they depend on failed (`FitEnd`).
        watched: Whether each call looks at the whole state (strict mode); no two such calls run at the same time.
    """

    event_type: type[Event]
    phase_type: type[Phase]
    steps: tuple[Step, ...]
    edges: tuple[Edge, ...]
    ancestors: tuple[int, ...]
    calls: tuple[tuple[Call, LearnerView], ...]
    always: bool = False
    watched: bool = False

    def explain(self) -> Iterator[str]:
        """Yield a line for each step: its place, its handler, and after whom it runs and why."""
        width = max((len(step.label) for step in self.steps), default=0)
        for position, step in enumerate(self.steps):
            reasons = [
                f"after {self.steps[edge.before].node.name}: {reason}"
                for edge in self.edges
                if edge.after == position
                for reason in edge.reasons
            ]
            first, *rest = reasons or [""]
            yield f"{position + 1:3}. {step.label:{width}}  {first}".rstrip()
            yield from (f"{'':5}{'':{width}}  {reason}" for reason in rest)

    def with_calls(self, calls: Mapping[int, Call]) -> Plan:
        """Return the same plan with other functions to call at some positions."""
        steps = tuple(step.instead(calls[at]) if at in calls else step for at, step in enumerate(self.steps))
        return replace(self, steps=steps, calls=tuple((step.call, step.view) for step in steps))

    def __len__(self) -> int:
        return len(self.steps)


def make_plan(
    event_type: type[Event],
    phase_type: type[Phase],
    order: Order,
    state: LearnerState,
    watch: Callable[[Step], Call] | None = None,
) -> Plan:
    """Bind the handlers of an order to their callbacks and to views of the state.

    Args:
        event_type: The event.
        phase_type: The phase.
        order: The callbacks in serial order.
        state: What the views show.
        watch: Wraps each step's call; strict mode does.
    """
    steps = []
    for node, handler in zip(order.nodes, order.handlers, strict=True):
        view = bind_view(node.access[handler], state, owner_of(node, handler))
        asked = tuple(c for c in node.callback.conditions if issubclass(event_type, c.event_type))
        call = handler.bind(node.callback)
        if node.callback.deferrable:
            call = _consuming(call, node, state.draws)
            asked = (_Asked(asked, node, state.draws),) if any(map(_may_draw, asked)) else asked
        step = Step(node, handler, call, view, asked)
        steps.append(step.instead(step.call if watch is None else watch(step)))
    return Plan(
        event_type,
        phase_type,
        tuple(steps),
        order.edges,
        order.ancestors,
        tuple((step.call, step.view) for step in steps),
        always=issubclass(event_type, FitEnd),
        watched=watch is not None,
    )


def set_up(node: Node, view: LearnerView, state: LearnerState) -> None:
    """Call `Callback.setup`; that of a deferrable callback draws random numbers of its own, as its handlers do."""
    if not draws_own(node.callback):
        node.callback.setup(view)
        return
    with own_numbers(state.draws.before_training(node.name)):
        node.callback.setup(view)


def owner_of(node: Node, handler: Handler | None) -> Owner:
    """Return whose view a handler gets, or `setup` where there is no handler."""
    type_name = type(node.callback).__name__
    passed, consumes = node.callback.access_argument, handler is not None and node.callback.deferrable
    access = node.stated(node.union if handler is None else node.access[handler])
    if passed is not None:
        return Owner(node.name, type_name, "access=", access, passed=declare(passed, type_name), consumes=consumes)
    if handler is None or (handler.access is None and handler.function is None):
        return Owner(node.name, type_name, "state_access", access, consumes=consumes)
    return Owner(node.name, type_name, handler.attribute, access, handler.decorator(), consumes=consumes)


def _consuming(call: Call, node: Node, draws: Draws) -> Call:
    """Return the call of a deferrable handler that runs in place: in the surroundings that it would have elsewhere.

    Bundled loggers, which run at every batch, call nothing that could see a difference.
    """
    name = node.name
    if is_quiet(node.callback):
        return call
    if not draws_own(node.callback):

        def consume(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler without recording gradients."""
            with torch.no_grad():
                call(event, phase, view)

        return consume

    def draw(event: Event, phase: Phase, view: LearnerView) -> None:
        """Call the handler without recording gradients, with random numbers of its own."""
        with torch.no_grad(), own_numbers(draws.next(name)):
            call(event, phase, view)

    return draw


def _may_draw(condition: Condition) -> bool:
    """Tell whether a condition calls code of a user's, which may draw random numbers."""
    return isinstance(condition, When) or type(condition).__module__ != Every.__module__


class _Asked(Condition):
    """All conditions of a deferrable handler as one, asked with random numbers of their own."""

    def __init__(self, conditions: tuple[Condition, ...], node: Node, draws: Draws) -> None:
        super().__init__(Event)
        self._conditions = conditions
        self._draws = draws
        self._name = f"{node.name} asks"

    def ready(self, phase: Phase) -> bool:
        """Ask each condition; every one counts the event, also when an earlier one has said no."""
        with own_numbers(self._draws.next(self._name)):
            ready = [condition.ready(phase) for condition in self._conditions]
        return all(ready)

    def passed(self, phase: Phase) -> None:
        """Tell each condition."""
        for condition in self._conditions:
            condition.passed(phase)


def _conditional(call: Call, conditions: tuple[Condition, ...]) -> Call:
    def ask(event: Event, phase: Phase, view: Any) -> None:
        """Call the handler if every condition says so."""
        # Every condition counts the event, also when an earlier one has said no.
        ready = [condition.ready(phase) for condition in conditions]
        if all(ready):
            for condition in conditions:
                condition.passed(phase)
            call(event, phase, view)

    return ask
