"""The plan: the handlers for one event type and one phase type, bound to their callbacks and views, ready to call.

`make_plan` turns an `Order` into a `Plan`. The functions in `Plan.calls` do everything that belongs to one handler:
they ask the conditions of its callback, seed the generators for a deferrable callback that draws, and watch the state
in strict mode. So an executor only chooses when and where to call each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from flowtrain.callback.access import declare
from flowtrain.callback.callback import Callback, draws_own, is_quiet
from flowtrain.callback.conditions import Condition, Every, When
from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.callback.view import NO_REQUEST, CheckpointRequest, LearnerView
from flowtrain.errors import CancelException, DeferredCancelError, RankError, UsageError
from flowtrain.graph.deferrable import LateWrites, late_writes
from flowtrain.graph.exchange import Exchange
from flowtrain.graph.nodes import Edge, Node, Order
from flowtrain.graph.shared_state import Peers, runs_here
from flowtrain.logging.records import holding
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.partial_view import Owner
from flowtrain.state.random_numbers import CallbackSeeds, own_numbers
from flowtrain.state.views import bind_view

__all__ = ["Call", "Failed", "Plan", "PlanKey", "PlannedHandler", "cancel_error", "make_plan", "owner_of", "set_up"]

Call: TypeAlias = Callable[[Event, Phase, LearnerView], None]
"""A function of the event, the phase and the view of the handler."""

PlanKey: TypeAlias = tuple[type[Event], type[Phase]]
"""The event type and phase type of a plan."""


@dataclass(frozen=True, eq=False)
class PlannedHandler:
    """One handler in a plan.

    Attributes:
        node: The callback of the handler.
        handler: The registration of the handler.
        call: The function that asks the conditions, if there are any, and then calls the handler.
        view: The view of the handler, to be passed to `call`.
        conditions: The conditions of the callback that `call` asks first.
        exchange: The exchanges between ranks that `call` takes part in; ``None`` if there are none. Such a handler runs
            on the training thread, in serial order, so that all ranks come to their exchanges in the same order.
        unasked: The function that `call` calls after the conditions; ``None`` if `call` asks none.
        late: The late writes of the handler, or those that it lets arrive; ``None`` if there are none.
    """

    node: Node
    handler: Handler
    call: Call
    view: LearnerView
    conditions: tuple[Condition, ...] = ()
    exchange: Exchange | None = None
    unasked: Call | None = None
    late: LateWrites | None = None

    @property
    def callback(self) -> Callback:
        """The callback."""
        return self.node.callback

    @property
    def label(self) -> str:
        """The names of the callback and of the handler, as ``"Printer.show"``; ``"Printer.arrival"`` for an arrival."""
        if self.node.writer is not None:
            return self.node.name
        return f"{self.node.name}.{self.handler.attribute}"

    def failure(self, raised: BaseException, event: Event, phase: Phase) -> BaseException:
        """Return the failure of the handler that raised something: an error if a deferrable callback raised a cancel.

        In its lane the callback could not end a batch, so it cannot in place either.
        """
        if isinstance(raised, CancelException) and self.callback.deferrable:
            where = f"({type(event).__name__}, {phase!r})"
            return cancel_error(raised, self.label, type(self.callback).__name__, where)
        return raised

    def with_call(self, call: Call) -> PlannedHandler:
        """Return this handler with another function to call, under the same conditions."""
        return replace(self, call=_conditional(call, self.conditions) if self.conditions else call, unasked=call)

    def exchange_nothing(self, event: Event, phase: Phase) -> None:
        """Take part in the exchanges between ranks without a value, because this rank does not run the handler."""
        if self.exchange is not None:
            # The conditions are asked: their counts stay the same on every rank.
            self.with_call(self.exchange.exchange_nothing).call(event, phase, self.view)


Failed: TypeAlias = tuple[PlannedHandler, BaseException]
"""A handler that has failed, and its exception."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The handlers for one event type and one phase type. Every executor takes the same plan.

    Attributes:
        event_type: The type of the event.
        phase_type: The type of the phase.
        handlers: The handlers in serial order.
        edges: The edges between the handlers, by positions in `handlers`, with the reasons.
        ancestors: For each position, the positions that must run before it, as the bits of an integer.
        calls: The pair ``(call, view)`` of each handler: all that a serial run needs.
        always: Whether a handler runs even if a handler that it depends on has failed (`FitEnd`).
        watched: Whether each call compares the whole state (strict mode), so that no two of them may run at once.
    """

    event_type: type[Event]
    phase_type: type[Phase]
    handlers: tuple[PlannedHandler, ...]
    edges: tuple[Edge, ...]
    ancestors: tuple[int, ...]
    calls: tuple[tuple[Call, LearnerView], ...]
    always: bool = False
    watched: bool = False

    def explain(self) -> Iterator[str]:
        """Yield the lines that list the handlers: the number and the name of each, and why it runs after others."""
        width = max((len(planned.label) for planned in self.handlers), default=0)
        for position, planned in enumerate(self.handlers):
            reasons = [
                f"after {self.handlers[edge.before].node.name}: {reason}"
                for edge in self.edges
                if edge.after == position
                for reason in edge.reasons
            ]
            first, *rest = reasons or [""]
            yield f"{position + 1:3}. {planned.label:{width}}  {first}".rstrip()
            yield from (f"{'':5}{'':{width}}  {reason}" for reason in rest)
            if planned.late is not None:
                yield from (f"{'':5}{line}" for line in planned.late.explain())
            if planned.exchange is not None:
                yield from (f"{'':5}{line}" for line in planned.exchange.explain())

    def exchange_nothing(self, event: Event, phase: Phase) -> None:
        """Take part in the exchanges of an event that this rank does not fire, since it has left the batch or epoch."""
        for planned in self.handlers:
            planned.exchange_nothing(event, phase)

    def left_out(self, failures: Iterable[Failed]) -> list[PlannedHandler]:
        """Return the handlers that are not run because a handler that they depend on has failed."""
        failed = {id(planned) for planned, _ in failures}
        bits = sum(1 << position for position, planned in enumerate(self.handlers) if id(planned) in failed)
        pairs = zip(self.handlers, self.ancestors, strict=True)
        return [] if self.always else [planned for planned, before in pairs if before & bits]

    def with_calls(self, calls: Mapping[int, Call]) -> Plan:
        """Return the same plan with other functions to call at some positions, under the same conditions."""
        handlers = tuple(each.with_call(calls[at]) if at in calls else each for at, each in enumerate(self.handlers))
        return replace(self, handlers=handlers, calls=tuple((each.call, each.view) for each in handlers))

    def __len__(self) -> int:
        return len(self.handlers)


def make_plan(
    event_type: type[Event],
    phase_type: type[Phase],
    order: Order,
    state: LearnerState,
    watch: Callable[[PlannedHandler], Call] | None = None,
    peers: Peers | None = None,
    timed: Callable[[PlanKey, PlannedHandler, Call], Call] | None = None,
) -> Plan:
    """Bind the handlers of an order to their callbacks and to views of the state.

    Args:
        event_type: The type of the event.
        phase_type: The type of the phase.
        order: The callbacks in serial order.
        state: The state that the views show.
        watch: Wraps the call of each handler in a check; strict mode passes it.
        peers: The processes, if several train together.
        timed: Wraps the call of each handler, exchanges included, to time it; a timeline passes it.
    """
    handlers = []
    for node, handler in zip(order.nodes, order.handlers, strict=True):
        exchange = None if peers is None else Exchange(peers, node, handler, event_type, phase_type, state)
        owner = owner_of(node, handler)
        late = late_writes(node, handler, order, (event_type, phase_type), state)
        shown: Any = state if late is None or late.learner is None else late.learner
        view = bind_view(
            node.access[handler], shown, owner if not exchange else replace(owner, exchanged=exchange.values)
        )
        if not exchange and not runs_here(node, peers):
            handlers.append(PlannedHandler(node, handler, _skip, view))
            continue
        conditions = tuple(c for c in node.callback.conditions if issubclass(event_type, c.event_type))
        call = handler.bind(node.callback) if late is None or late.learner is not None else late.arrive
        if node.callback.deferrable:
            call = _consuming(call, node, state.draws)
            call = call if late is None else late.keeping(call)
            # The library's other conditions only count, and seeding the generators takes 25 microseconds.
            if any(map(_may_draw, conditions)):
                conditions = (_SeededConditions(conditions, node, state.draws),)
        planned = PlannedHandler(node, handler, call, view, conditions, exchange or None, late=late)
        call = call if watch is None else watch(planned)
        if peers is not None and node.callback.may_checkpoint:
            call = _requesting(call, (event_type, phase_type), node, state.requests)
        # The conditions are asked outside of `watch`: their counts are not state that a handler declares. They are the
        # same on every rank, so they are asked before an exchange.
        call = exchange.around(call) if exchange else call
        handlers.append(planned.with_call(call if timed is None else timed((event_type, phase_type), planned, call)))
    return Plan(
        event_type,
        phase_type,
        tuple(handlers),
        order.edges,
        order.ancestors,
        tuple((planned.call, planned.view) for planned in handlers),
        always=issubclass(event_type, FitEnd),  # every handler may have something to close (rule 17)
        watched=watch is not None,
    )


def cancel_error(cancel: CancelException, label: str, type_name: str, where: str) -> DeferredCancelError:
    """Return the error for a cancel that a handler of a deferrable callback raised, in its lane or in place."""
    error = DeferredCancelError(
        f"{label} raised {cancel!r} at {where}, but it is deferrable: in its lane it "
        f"runs when training has gone on, and there is no {cancel.scope or 'scope'} left to end. Set deferrable = "
        f"False in {type_name}."
    )
    # The cause is set by hand, because the exception is raised later, on the training thread.
    error.__cause__ = cancel
    return error


def set_up(node: Node, view: LearnerView, state: LearnerState) -> None:
    """Call `Callback.setup`; for a deferrable callback the generators are seeded, as they are for its handlers."""
    if not draws_own(node.callback):
        node.callback.setup(view)
        return
    with own_numbers(state.draws.before_training(node.name)):
        node.callback.setup(view)


def owner_of(node: Node, handler: Handler | None) -> Owner:
    """Return the owner of a view, by which the view explains a refusal.

    Args:
        node: The callback.
        handler: The handler that gets the view; ``None`` for `Callback.setup`.
    """
    type_name = type(node.callback).__name__
    # `setup` runs when the learner is built, and never on a snapshot.
    passed, consumes = node.callback.access_argument, handler is not None and node.callback.deferrable
    access = node.stated(node.union if handler is None else node.access[handler])
    # A user who passed access= did not write `state_access`, so a refusal must not tell the user to edit that.
    if passed is not None:
        return Owner(node.name, type_name, "access=", access, passed=declare(passed, type_name), consumes=consumes)
    remedy = node.callback.missing
    if handler is None or (handler.access is None and handler.function is None):
        return Owner(node.name, type_name, "state_access", access, consumes=consumes, remedy=remedy)
    decorator = handler.decorator()
    return Owner(node.name, type_name, handler.attribute, access, decorator, consumes=consumes, remedy=remedy)


def _consuming(call: Call, node: Node, draws: CallbackSeeds) -> Call:
    """Return the call of a deferrable handler that runs in place, with the results that it would have on a lane.

    There it would record no gradients, draw from generators that are seeded for it, and log to no backend but its own.
    The handlers of a quiet callback do only the last, so they are called directly: most bundled loggers are quiet and
    run at every batch.
    """
    name, backends = node.name, node.backends
    if is_quiet(node.callback):
        return call
    if not draws_own(node.callback):

        def consume(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler without recording gradients."""
            with torch.no_grad(), holding(backends):
                call(event, phase, view)

        return consume

    def draw(event: Event, phase: Phase, view: LearnerView) -> None:
        """Call the handler without recording gradients, with generators that are seeded for it."""
        with torch.no_grad(), holding(backends), own_numbers(draws.next(name)):
            call(event, phase, view)

    return draw


def _may_draw(condition: Condition) -> bool:
    """Tell whether a condition calls code of the user, which may draw random numbers."""
    return isinstance(condition, When) or type(condition).__module__ != Every.__module__


class _SeededConditions(Condition):
    """All conditions of a deferrable handler as one, which asks them with generators that are seeded for them."""

    def __init__(self, conditions: tuple[Condition, ...], node: Node, draws: CallbackSeeds) -> None:
        super().__init__(Event)  # `make_plan` has chosen the conditions by their event types already
        self._conditions = conditions
        self._draws = draws
        self._name = f"{node.name} asks"

    def ready(self, phase: Phase) -> bool:
        """Ask each condition; every condition counts the event, even if an earlier one is not ready."""
        with own_numbers(self._draws.next(self._name)):
            ready = [condition.ready(phase) for condition in self._conditions]
        return all(ready) or _not_ready(self._conditions, ready)

    def passed(self, phase: Phase) -> None:
        """Tell each condition that the handler runs."""
        for condition in self._conditions:
            condition.passed(phase)


def _conditional(call: Call, conditions: tuple[Condition, ...]) -> Call:
    """Return a call that first asks the conditions of the callback."""

    def ask(event: Event, phase: Phase, view: Any) -> None:
        """Call the handler if every condition is ready."""
        # A list, so that every condition counts the event, even if an earlier one is not ready.
        ready: list[bool | None] = [condition.ready(phase) for condition in conditions]
        if all(ready):
            for condition in conditions:
                condition.passed(phase)
            call(event, phase, view)
        elif None in ready:
            _not_ready(conditions, ready)

    return ask


def _not_ready(conditions: Sequence[Condition], ready: Sequence[object]) -> Literal[False]:
    """Return ``False``, the answer of conditions that are not all ready.

    Raises:
        UsageError: One of them has answered ``None``: it has no ``return``, and its handler would never run.
    """
    for condition, answer in zip(conditions, ready, strict=True):
        if answer is None:
            name = type(condition).__name__
            raise UsageError(
                f"{name}.ready(phase) returned None. Its answer decides whether the handler runs: return True or False."
            )
    return False


_MEETING = (
    FitBegin, EpochBegin, BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd, EpochEnd,
)  # fmt: skip
"""The events that all ranks fire equally often, those of batches in training only."""


def _requesting(call: Call, key: PlanKey, node: Node, requests: list[tuple[str, CheckpointRequest]]) -> Call:
    """Return the call of a handler that may request a checkpoint, on one of several ranks.

    After it has run, all ranks compare what they request. So it may not request anything at events that not all ranks
    need fire, where some would wait for the others.
    """
    event_type, phase_type = key
    evaluates = issubclass(phase_type, AbstractValidationPhase) and event_type not in (EpochBegin, EpochEnd)
    meets = event_type in _MEETING and not evaluates

    def ask(event: Event, phase: Phase, view: LearnerView) -> None:
        """Call the handler, and note that it has run, also if it fails."""
        try:
            call(event, phase, view)
        finally:
            if meets:
                requests.append((node.name, NO_REQUEST))
        own = [] if meets else [each for each in requests if each[0] == node.name]
        for each in own:  # otherwise the other ranks would be told that this one drops it
            requests.remove(each)
        if own:
            raise RankError(
                f"{node.name} requests a checkpoint at ({event_type.__name__}, {phase_type.__name__}), which ranks "
                f"need not fire equally often, and a checkpoint needs all ranks. Request it at EpochEnd, or at the "
                f"BatchEnd of a phase that trains."
            )

    # After the last event of a fit all ranks meet anyway, and none is asked there after a failure.
    return call if issubclass(event_type, FitEnd) else ask


def _skip(event: Event, phase: Phase, view: LearnerView) -> None:
    """Stand for a handler that runs on the main rank only, so that the plan is the same on every rank."""
