"""Dispatch: an event runs its handlers, the events and checkpoints that they request follow, their failures are raised.

An event is fired by calling a *runner*, which the executor makes from the plan of its event and phase types. An event
without handlers has no runner and costs one test for ``None``. `Dispatch` is the executor's
`flowtrain.graph.executor.Site`: after the handlers of an event, the runner calls `drain`, which fires the requested
events; if handlers failed, it calls `fail`, which raises the failures that have an effect.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, ClassVar, TypeAlias

from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    Event,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import AbstractTrainingPhase, Phase, has_bundled_step
from flowtrain.callback.view import NO_REQUEST, CheckpointRequest
from flowtrain.errors import CancelException, ExecutorError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.graph.clock import Clock
from flowtrain.graph.executor import Executor, Mailbox, Runner
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Failed, Plan, PlannedHandler
from flowtrain.graph.registry import Callbacks
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.failures import Failures
from flowtrain.training.scopes import Scopes
from flowtrain.training.sinks import Sinks

__all__ = ["Dispatch", "StepRunners"]

_MOST_FIRED = 10_000
"""The most events that handlers may fire after one event of the loop: with more, handlers fire each other endlessly."""


_CarryOut: TypeAlias = Callable[[Sequence[CheckpointRequest]], None]
"""A function that carries out requests."""


def _carry_out_none(requests: Sequence[CheckpointRequest]) -> None:
    """Carry out no request."""


class StepRunners:
    """The runner of each event of a step in one phase; ``None`` if no callback has a handler for the event.

    A runner takes ``(event, phase)``. The executor makes it from the plan of that event and phase.

    Attributes:
        watched: Whether a handler may see the batch after the backward pass.
        pairs: Whether the phase uses the bundled `split`, which takes a pair as (inputs, targets).
        call_model: The method by which the phase calls the model; ``None`` if it calls ``model(inputs)``.
    """

    __slots__ = (
        "backward_begin",
        "backward_end",
        "batch_begin",
        "batch_end",
        "call_model",
        "loss_begin",
        "pairs",
        "update_begin",
        "update_end",
        "watched",
    )
    events: ClassVar[Mapping[str, type[Event]]] = {
        "batch_begin": BatchBegin,
        "loss_begin": LossBegin,
        "backward_begin": BackwardBegin,
        "backward_end": BackwardEnd,
        "update_begin": UpdateBegin,
        "update_end": UpdateEnd,
        "batch_end": BatchEnd,
    }

    batch_begin: Runner | None
    loss_begin: Runner | None
    backward_begin: Runner | None
    backward_end: Runner | None
    update_begin: Runner | None
    update_end: Runner | None
    batch_end: Runner | None
    watched: bool
    pairs: bool
    call_model: Callable[..., Any] | None


_IN_A_BATCH: Set[type[Event]] = {EpochBegin, *StepRunners.events.values(), BatchCancelled}
"""Events at which the batch state belongs to an open batch or is empty. At any other event it may be the last batch."""


class _Runners(dict[Phase, StepRunners]):
    """The `StepRunners` by phase, made when a phase is first looked up."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self._dispatch: Dispatch = weakref.proxy(dispatch)  # not a reference, because the dispatch holds this dict

    def __missing__(self, phase: Phase) -> StepRunners:
        found = StepRunners()
        fires = phase.events
        for name, event_type in StepRunners.events.items():
            known = fires is None or event_type in fires
            setattr(found, name, self._dispatch.runner(event_type, type(phase)) if known else None)
        after = (found.backward_end, found.update_begin, found.update_end, found.batch_end)
        # A step of the user's own may call the bundled one and then read the batch.
        own = not has_bundled_step(type(phase), AbstractTrainingPhase)
        found.watched = own or any(runner is not None for runner in after)
        found.pairs = getattr(type(phase), "split", None) is AbstractTrainingPhase.split
        method = getattr(type(phase), "call_model", None)
        bundled = method in (None, AbstractTrainingPhase.call_model) and not getattr(phase, "unpack", False)
        found.call_model = None if bundled else getattr(phase, "call_model", None)
        self[phase] = found
        return found


class Dispatch:
    """Fires the events of one learner.

    Args:
        state: The state of the learner.
        scopes: The open scopes.
        executor: The executor.
        sinks: The logging backends.
        accumulates: Whether an update may follow the last batch of an epoch, when its handlers see that batch.

    Attributes:
        state: The state of the learner.
        executor: The executor that makes runners from plans.
        runners: The `StepRunners` by phase.
        fired: The events that handlers of the current event have fired, each with the name of its callback.
        requests: The checkpoints that handlers of the current event have requested.
        mailbox: The calls that the training thread makes between two batches.
        met: The types of the events with exchanges between ranks that were fired since this set was cleared.
        clock: Times handlers and parts of batches; ``None`` without a timeline.
    """

    def __init__(
        self, state: LearnerState, scopes: Scopes, executor: Executor, sinks: Sinks, *, accumulates: bool = False
    ) -> None:
        self.state = state
        self.executor = executor
        self.runners = _Runners(self)
        self.fired = state.fired
        self.requests = state.requests
        self.mailbox = Mailbox()
        self.met: set[type[Event]] = set()
        self.clock: Clock | None = None
        self._scopes = scopes
        self._sinks = sinks
        self._in_a_batch = _IN_A_BATCH - {UpdateBegin, UpdateEnd} if accumulates else _IN_A_BATCH
        self._callbacks: Callbacks | None = None
        self._by_type: dict[tuple[type[Event], type[Phase]], Runner | None] = {}
        self._draining = False
        self._take: _CarryOut = _carry_out_none
        self._drop: _CarryOut = _carry_out_none
        self._queued = 0  # how many of `fired` were there before the current event, which a failure of it must not drop
        self._postponed: list[CheckpointRequest] = []  # requests at events that have ended, until all others have
        self._closed = False

    def use(self, callbacks: Callbacks) -> None:
        """Run the plans of these callbacks from now on."""
        if self._callbacks is None:
            self.executor.bind(self)  # only now, so that a learner whose callbacks are refused leaves the executor free
        self._callbacks = callbacks
        self._scopes.keep_entries(_seen_after_a_batch(callbacks.nodes, self._in_a_batch))
        self._by_type.clear()
        self.runners.clear()

    def carry_out_requests(self, take: _CarryOut = _carry_out_none, drop: _CarryOut = _carry_out_none) -> None:
        """Carry out the requests of handlers by these functions from now on; without them no request has an effect.

        Args:
            take: Takes the checkpoints that were requested.
            drop: Takes note of requests that an error has dropped.
        """
        self._take, self._drop = take, drop

    def time(self, clock: Clock | None) -> None:
        """Have handlers and parts of batches timed from now on, or no longer for ``None``.

        All plans and runners are made anew, so that without a clock no line asks for it.
        """
        self.clock = clock
        if self._callbacks is not None:
            self._callbacks.time(clock)
        self._by_type.clear()
        self.runners.clear()

    def batches(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return the batches of an epoch, and time the waits for them if there is a clock."""
        return batches if self.clock is None else self.clock.batches(batches)

    @property
    def nodes(self) -> Sequence[Node]:
        """The callbacks whose handlers run in this process, with their names and declarations."""
        return self._callbacks.running if self._callbacks is not None else ()

    @property
    def run(self) -> Run:
        """The run that the logging backends are opened for."""
        return self._sinks.run

    @property
    def open_sinks(self) -> object:
        """An object that keeps the logging backends open as long as there is a reference to it."""
        return self._sinks.lease

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Return the runner of an event type in a phase type; ``None`` if no callback has a handler.

        Raises:
            ExecutorError: The learner is closed.
        """
        key = (event_type, phase_type)
        if key not in self._by_type:
            if self._closed:
                raise ExecutorError(
                    f"The learner is closed, so it runs no handlers of {event_type.__name__}: its executor has given "
                    f"back all it held. Make a new one."
                )
            plan = self._callbacks.plan(event_type, phase_type) if self._callbacks is not None else ()
            made = self._noting(plan, self.executor.compile(plan)) if isinstance(plan, Plan) and plan.handlers else None
            self._by_type[key] = self._timed(key, made)
        return self._by_type[key]

    def _timed(self, key: tuple[type[Event], type[Phase]], runner: Runner | None) -> Runner | None:
        return runner if self.clock is None else self.clock.runner(*key, runner)

    def _noting(self, plan: Plan, runner: Runner) -> Runner:
        """Return the runner of a plan, which notes its event in `met` if the ranks exchange values at it."""
        if all(planned.exchange is None for planned in plan.handlers):
            return runner
        met, event_type = self.met, plan.event_type

        def run(event: Event, phase: Phase) -> None:
            """Note the event, and run its handlers."""
            met.add(event_type)
            runner(event, phase)

        return run

    def exchange_nothing(self, event: Event, phase: Phase) -> None:
        """Take part in the exchanges of an event that is not fired here, since this rank has left the batch or epoch.

        Without this the other ranks, which fire the event, would wait for the values of this rank.
        """
        if self._callbacks is not None:
            self._callbacks.plan(type(event), type(phase)).exchange_nothing(event, phase)

    def drop_requested(self, event: Event, phase: Phase) -> None:
        """Drop the requests of an event that is not fired here, since this rank has left the batch.

        The handlers of callbacks that may request one are run for it. Those that exchange values run on no rank now.
        """
        if self._callbacks is not None:
            _request(self._callbacks.plan(type(event), type(phase)).handlers, event, phase)
        self._drop([request for _, request in self.requests])
        self.drop_requests()

    def close(self) -> None:
        """Fire no more events, and delete every reference that leads back to this object."""
        self._closed = True
        self._by_type.clear()
        self.runners.clear()
        self.mailbox.clear()
        self.drop_requests()
        self._take = self._drop = _carry_out_none
        self._callbacks = None
        del self.executor

    def swap(self, plan: Plan, runner: Runner) -> None:
        """Use another runner for a plan from its next event on; a plan that `use` has replaced is ignored."""
        key = plan.event_type, plan.phase_type
        if key in self._by_type:
            self._by_type[key] = self._timed(key, self._noting(plan, runner))
            self.runners.clear()

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event: run its handlers, and then the events that they have fired.

        Raises:
            UsageError: `event` is no event, or `phase` is no phase.
        """
        try:
            runner = self._by_type[type(event), type(phase)]
        except KeyError:
            if not is_a(event, Event) or not is_a(phase, Phase):
                raise UsageError(
                    f"fire() takes an event and a phase, got {event!r} and {phase!r}. "
                    f"Write fire(MyEvent(), TrainingPhase())."
                ) from None
            runner = self.runner(type(event), type(phase))
        if runner is not None:
            runner(event, phase)

    def fire_from_outside(self, event: Event, phase: Phase) -> None:
        """Fire an event for a caller that may be outside of every scope; its handlers cannot start training."""
        before = self._scopes.begin_call()
        try:
            self.fire(event, phase)
        except BaseException:
            self.drop_requests()
            raise
        finally:
            self._scopes.end_call(before)

    def fire_closing(self, event: Event, phase: Phase) -> None:
        """Fire the event that closes a scope.

        Requests of earlier events are dropped: an interrupt within an event leaves its requests in the queues.
        """
        self.drop_requests()
        try:
            self.fire(event, phase)
        except BaseException:
            self.drop_requests()
            raise

    def drain(self, phase: Phase) -> None:
        """Fire the events that handlers have fired, first in, first out; runners call this when an event has ended.

        Then take the requested checkpoints, of the event and of all events that it fired.
        """
        self._postponed += self._take_requests()
        if self._draining:
            return  # this is an event that `drain` has fired, and the loop of that call sees the added events
        self._draining = True
        failures = Failures()
        count = 0
        try:
            while self.fired:
                _, event = self.fired.pop(0)
                count += 1
                if count > _MOST_FIRED:
                    raise UsageError(
                        f"Handlers fired more than {_MOST_FIRED} events in a row; the last was {event!r}. Its "
                        f"handlers fire it again, directly or through other events: let one fire under a condition."
                    )
                self._queued = len(self.fired)
                try:
                    self.fire(event, phase)
                except Exception as failure:  # raised below, after the other events have run
                    failures.add(failure)
        finally:
            self._draining = False
            self._queued = 0
            self.fired.clear()
            requests, self._postponed = self._postponed, []
        self._checkpoint(requests, failures)
        failures.raise_worst()

    def _take_requests(self) -> list[CheckpointRequest]:
        """Return the checkpoints that handlers of the event that has ended requested, and empty their queue."""
        found = [request for _, request in self.requests]
        names = {name for name, request in self.requests if request is not NO_REQUEST}
        self.requests.clear()
        if self._callbacks is not None:
            self._callbacks.check_requests(names)
        return found

    def _checkpoint(self, requests: Sequence[CheckpointRequest], failures: Failures) -> None:
        """Take the requested checkpoints now that no handler runs; none after an error, which may be in the state.

        Args:
            requests: The requests.
            failures: The failures of the events, to which that of a checkpoint is added.
        """
        if not requests:
            return
        if not failures.only(CancelException):
            self._drop(requests)
            return
        try:
            self._take(list(dict.fromkeys(requests)))
        except Exception as failure:  # raised with the other failures
            failures.add(failure)

    def drop_requests(self) -> None:
        """Forget the events and checkpoints that handlers requested at an event that has not ended normally."""
        self.fired.clear()
        self.requests.clear()

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
        """Raise the failures of an event's handlers that have an effect now, and drop the events that it fired.

        Checkpoints that the event requested are still taken if the failures are only cancels.
        """
        effective = self._effective(event, phase, failures)
        if self.state.world_size > 1:  # other ranks may run the handlers that were left out, and wait in a checkpoint
            _request(plan.left_out(failures), event, phase)
        del failures  # see `flowtrain.errors.raise_worst`
        if effective:
            del self.fired[self._queued :]
            requests = effective.attempt(self._take_requests) or []
            if not self._draining:
                self._checkpoint(requests, effective)
            else:  # `drain` takes them after the events that wait, unless one of these fails
                self._postponed += requests
            effective.raise_worst()

    def _effective(self, event: Event, phase: Phase, failures: Sequence[Failed]) -> Failures:
        """Note on each failure where it was raised, and return the failures that have an effect now."""
        found = [(planned, planned.failure(raised, event, phase)) for planned, raised in failures]
        for planned, failure in found:
            self._scopes.note(failure, planned, event, phase)
        return Failures(*[failure for _, failure in found if self._scopes.has_effect(failure)])


def _request(handlers: Sequence[PlannedHandler], event: Event, phase: Phase) -> None:
    """Run those of some handlers that may request a checkpoint, although a failure of this rank has left them out."""
    for planned in handlers:
        if planned.callback.may_checkpoint and planned.exchange is None:
            with suppress(Exception):  # this rank has failed already
                planned.call(event, phase, planned.view)


def _seen_after_a_batch(nodes: Sequence[Node], within: Set[type[Event]]) -> frozenset[str] | None:
    """Return the entries of the batch that handlers of events not in `within` declare; ``None`` for all entries."""
    paths = {
        path
        for node in nodes
        for _, handler in node.handlers
        if handler.event_type not in within
        for path, _ in node.access[handler]
        if path[0] == "batch"
    }
    return None if ("batch",) in paths else frozenset(path[1] for path in paths)
