"""Dispatch: from an event to what runs it, and from the failures of its handlers to what they mean.

An event is fired through a *runner*, which the executor makes from the plan of its event and phase types. An event
without handlers has no runner and costs a test for ``None``. `Dispatch` is the executor's
`flowtrain.graph.executor.Site`: it fires what handlers asked for (`drain`) and decides what their failures amount to
(`fail`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, ClassVar

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
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import CheckpointRequest
from flowtrain.errors import CancelException, ExecutorError, UsageError, is_a, raise_worst
from flowtrain.graph.executor import Executor, Mailbox, Runner
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan, Step
from flowtrain.graph.registry import Callbacks
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.scopes import Scopes
from flowtrain.training.sinks import Sinks

__all__ = ["Dispatch", "StepRunners"]

_MOST_FIRED = 10_000
"""Events fired by handlers after one event of the loop; more means that handlers fire each other without end."""


class StepRunners:
    """What to call for each event of a step in one phase; ``None`` where no callback has a handler.

    A runner takes ``(event, phase)``. The executor makes it from the plan of that event and phase.

    Attributes:
        watched: Whether any callback has a handler that comes after the backward pass.
        pairs: Whether the phase takes data as the pair that it is.
    """

    __slots__ = (
        "backward_begin",
        "backward_end",
        "batch_begin",
        "batch_end",
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

    batch_begin: Any
    loss_begin: Any
    backward_begin: Any
    backward_end: Any
    update_begin: Any
    update_end: Any
    batch_end: Any
    watched: bool
    pairs: bool


_IN_A_BATCH: Set[type[Event]] = {EpochBegin, *StepRunners.events.values(), BatchCancelled}
"""Events at which the batch state is that of the open batch, or of none; with accumulation an update may come later."""


class _Runners(dict[Phase, StepRunners]):
    """The runners of a step by phase, looked up when a phase is met."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self._dispatch: Dispatch = weakref.proxy(dispatch)  # which holds the runners

    def __missing__(self, phase: Phase) -> StepRunners:
        found = StepRunners()
        fires = phase.events
        for name, event_type in StepRunners.events.items():
            known = fires is None or event_type in fires
            setattr(found, name, self._dispatch.runner(event_type, type(phase)) if known else None)
        after = (found.backward_end, found.update_begin, found.update_end, found.batch_end)
        own = type(phase).step is not AbstractTrainingPhase.step  # it may call that one, and look at the batch then
        found.watched = own or any(runner is not None for runner in after)
        found.pairs = getattr(type(phase), "split", None) is AbstractTrainingPhase.split
        self[phase] = found
        return found


class Dispatch:
    """Fires the events of one learner.

    Attributes:
        state: What is trained, and what callbacks share.
        executor: What runs the plans.
        runners: For each phase, what to call at each event of its step.
        fired: The events that handlers asked to fire.
        requests: The checkpoints that handlers of the current event asked for.
        mailbox: What is to be done on this thread between two batches.
        checkpoint: What takes the checkpoints that handlers ask for.
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
        self.checkpoint: Callable[[Sequence[CheckpointRequest]], None] | None = None
        self._scopes = scopes
        self._sinks = sinks
        self._in_a_batch = _IN_A_BATCH - {UpdateBegin, UpdateEnd} if accumulates else _IN_A_BATCH
        self._callbacks: Callbacks | None = None
        self._by_type: dict[tuple[type[Event], type[Phase]], Runner | None] = {}
        self._draining = False
        self._kept = 0
        self._asked: list[CheckpointRequest] = []  # of events that have ended, while others are drained
        self._closed = False

    def use(self, callbacks: Callbacks) -> None:
        """Run the plans of these callbacks from now on."""
        if self._callbacks is None:
            self.executor.bind(self)  # not before: a learner that is refused leaves the executor free
        self._callbacks = callbacks
        self._scopes.keep(_seen_after_a_batch(callbacks.nodes, self._in_a_batch))
        self._by_type.clear()
        self.runners.clear()

    @property
    def nodes(self) -> Sequence[Node]:
        """The callbacks that are in use, with their names and declarations."""
        return self._callbacks.nodes if self._callbacks is not None else ()

    @property
    def run(self) -> Run:
        """The run that the logging backends are opened for."""
        return self._sinks.run

    @property
    def open_sinks(self) -> object:
        """What keeps the logging backends open."""
        return self._sinks.held

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Return what runs an event in a phase; ``None`` where no callback has a handler."""
        key = (event_type, phase_type)
        if key not in self._by_type:
            if self._closed:
                raise ExecutorError("The learner is closed: its executor has given back all it held. Make a new one.")
            plan = self._callbacks.plan(event_type, phase_type) if self._callbacks is not None else ()
            self._by_type[key] = self.executor.compile(plan) if isinstance(plan, Plan) and plan.steps else None
        return self._by_type[key]

    def close(self) -> None:
        """Fire nothing more, and let go of what leads back here: the runners, the executor, what takes checkpoints."""
        self._closed = True
        self._by_type.clear()
        self.runners.clear()
        self.mailbox.clear()
        self.drop()
        self.checkpoint = self._callbacks = None
        del self.executor

    def swap(self, plan: Plan, runner: Runner) -> None:
        """Use another runner for a plan from its next event on; a plan of callbacks that are gone stays gone."""
        if (plan.event_type, plan.phase_type) in self._by_type:
            self._by_type[plan.event_type, plan.phase_type] = runner
            self.runners.clear()

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event: run what handles it, and then what its handlers asked to fire."""
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
        """Fire an event for a caller that may be outside of every scope; handlers cannot start training then."""
        before = self._scopes.begin_call()
        try:
            self.fire(event, phase)
        except BaseException:
            self.drop()
            raise
        finally:
            self._scopes.end_call(before)

    def fire_last(self, event: Event, phase: Phase, failures: list[BaseException]) -> None:
        """Fire the event that closes a scope; what it raises is added to `failures`.

        What earlier events asked to fire is dropped: an interrupt may have left it behind.
        """
        self.drop()
        try:
            self.fire(event, phase)
        except BaseException as failure:
            failures.append(failure)
            self.drop()

    def drain(self, phase: Phase) -> None:
        """Fire what handlers asked for, first in, first out; called by runners when an event has ended.

        Then take the checkpoints that they asked for, those of the events that were fired too.
        """
        self._asked += self._requested()
        if self._draining:
            return  # the outer call goes on with what was added
        self._draining = True
        failures: list[BaseException] = []
        count = 0
        try:
            while self.fired:
                _, event = self.fired.pop(0)
                count += 1
                if count > _MOST_FIRED:
                    raise UsageError(f"Handlers fired more than {_MOST_FIRED} events in a row; the last was {event!r}.")
                self._kept = len(self.fired)
                try:
                    self.fire(event, phase)
                except Exception as failure:  # collected, and raised when the others have run
                    failures.append(failure)
        finally:
            self._draining = False
            self._kept = 0
            self.fired.clear()
            asked, self._asked = self._asked, []
        self._take(asked, failures)
        if failures:
            raise_worst(failures)

    def _requested(self) -> list[CheckpointRequest]:
        """Return the checkpoints that the handlers of the event that has ended asked for, and forget them."""
        found = [request for _, request in self.requests]
        self.requests.clear()
        return found

    def _take(self, requests: Sequence[CheckpointRequest], failures: list[BaseException]) -> None:
        """Take the checkpoints asked for, now that no handler runs; none after an error, which may be in the state."""
        if not requests or self.checkpoint is None or not _only_cancels(failures):
            return
        try:
            self.checkpoint(list(dict.fromkeys(requests)))
        except Exception as failure:  # raised with the others
            failures.append(failure)

    def drop(self) -> None:
        """Forget what the handlers of an event asked for: it has not ended as it should."""
        self.fired.clear()
        self.requests.clear()

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[tuple[Step, BaseException]]) -> None:
        """Raise what the failures of an event's handlers amount to; what the event fired is dropped.

        A checkpoint that it asked for is taken if the failures only cancel something.
        """
        meant = self._meant(event, phase, failures)
        del failures  # see `raise_worst`
        if meant:
            del self.fired[self._kept :]
            asked = self._requested()
            if not self._draining:
                self._take(asked, meant)
            elif _only_cancels(meant):  # other events are waiting, so a checkpoint waits too, and for their errors
                self._asked += asked
            raise_worst(meant)

    def _meant(self, event: Event, phase: Phase, failures: Sequence[tuple[Step, BaseException]]) -> list[BaseException]:
        """Note on each failure where it was raised, and return those that mean something now."""
        for step, failure in failures:
            self._scopes.note(failure, step, event, phase)
        return [failure for _, failure in failures if self._scopes.means_something(failure)]


def _only_cancels(failures: Sequence[BaseException]) -> bool:
    return all(isinstance(failure, CancelException) for failure in failures)


def _seen_after_a_batch(nodes: Sequence[Node], within: Set[type[Event]]) -> frozenset[str] | None:
    """Return the batch entries that handlers of other events than those `within` a batch declare; ``None`` for all."""
    paths = {
        path
        for node in nodes
        for _, handler in node.handlers
        if handler.event_type not in within
        for path, _ in node.access[handler]
        if path[0] == "batch"
    }
    return None if ("batch",) in paths else frozenset(path[1] for path in paths)
