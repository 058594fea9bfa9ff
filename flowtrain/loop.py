"""The loop: fit, epoch, step, and what a step of one's own is made of.

The loop fires events through *runners*, which the executor makes from plans. An event without handlers has no runner
and costs a test for ``None``. The loop also is the executor's `flowtrain.execution.Site`: it fires what handlers asked
for (`drain`) and decides what their failures mean (`fail`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch

from flowtrain.batch import BatchState
from flowtrain.core import TorchCore
from flowtrain.data import check_gave, length, shortest, stream
from flowtrain.errors import CoreError, UsageError, is_a
from flowtrain.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.execution import Executor, Runner
from flowtrain.phasemap import PhaseMap
from flowtrain.phases import AbstractTrainingPhase, Phase, StepContext
from flowtrain.plan import Plan, Step
from flowtrain.registry import Callbacks
from flowtrain.scopes import Scopes
from flowtrain.signals import CancelBatchException, CancelEpochException, CancelFittingException, merge
from flowtrain.state import LearnerState
from flowtrain.steps import CLOSED, CLOSING, OPEN, StepRunners

__all__ = ["Loop", "RunBatch"]

_FIT_END, _EPOCH_BEGIN, _EPOCH_END, _EPOCH_CANCELLED = FitEnd(), EpochBegin(), EpochEnd(), EpochCancelled()
_BATCH_BEGIN, _BATCH_END, _BATCH_CANCELLED = BatchBegin(), BatchEnd(), BatchCancelled()
_BACKWARD_BEGIN, _BACKWARD_END = BackwardBegin(), BackwardEnd()
_UPDATE_BEGIN, _UPDATE_END = UpdateBegin(), UpdateEnd()

_LEFT_OPEN = "the step caught an exception and left its batch open"

_MOST_FIRED = 10_000
"""Events fired by handlers after one event of the loop; more means that handlers fire each other without end."""


class _Runners(dict[Phase, StepRunners]):
    """The runners of a step by phase, looked up when a phase is met."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def __missing__(self, phase: Phase) -> StepRunners:
        found = StepRunners()
        fires = phase.events
        for name, event_type in StepRunners.events.items():
            known = fires is None or event_type in fires
            setattr(found, name, self._loop.runner(event_type, type(phase)) if known else None)
        self[phase] = found
        return found


class Loop:
    """Runs training for one learner.

    Attributes:
        state: The learner's state.
        core: The torch core.
        executor: What runs the plans.
        scopes: What is open, and where training is.
        runners: For each phase, what to call at each event of its step.
        fired: The events that handlers asked to fire.
    """

    def __init__(self, state: LearnerState, core: TorchCore, executor: Executor) -> None:
        self.state = state
        self.core = core
        self.executor = executor
        self.scopes = Scopes()
        self.runners = _Runners(self)
        self.fired = state.fired
        self._callbacks: Callbacks | None = None
        self._by_type: dict[tuple[type[Event], type[Phase]], Runner | None] = {}
        self._draining = False
        self._kept = 0

    # --- events

    def use(self, callbacks: Callbacks) -> None:
        """Run the plans of these callbacks from now on."""
        if self._callbacks is None:
            self.executor.bind(self)  # not before: a learner that is refused leaves the executor free
        self._callbacks = callbacks
        self._by_type.clear()
        self.runners.clear()

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Return what runs an event in a phase; ``None`` where no callback has a handler."""
        key = (event_type, phase_type)
        if key not in self._by_type:
            plan = self._callbacks.plan(event_type, phase_type) if self._callbacks is not None else ()
            self._by_type[key] = self.executor.compile(plan) if isinstance(plan, Plan) and plan.steps else None
        return self._by_type[key]

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
        before, self.scopes.firing = self.scopes.firing, True
        try:
            self.fire(event, phase)
        except BaseException:
            self.fired.clear()
            raise
        finally:
            self.scopes.firing = before

    def drain(self, phase: Phase) -> None:
        """Fire what handlers asked for, first in, first out; called by runners when an event has ended."""
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
        if failures:
            raise merge(failures)

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[tuple[Step, BaseException]]) -> None:
        """Raise what the failures of an event's handlers amount to; what the event fired is dropped."""
        meant: list[BaseException] = []
        for step, failure in failures:
            self.scopes.note(failure, step, event, phase)
            if self.scopes.means_something(failure):
                meant.append(failure)
        if meant:
            del self.fired[self._kept :]
            raise merge(meant)

    # --- fit and epoch

    def fit(
        self,
        learner: StepContext,
        data: PhaseMap[Any],
        epochs: int | None,
        steps: int | None,
        validate_every: int | None,
    ) -> BaseException | None:
        """Run a fit; return the `CancelFittingException` that ended it, or ``None``. Errors are raised."""
        self.scopes.fit = OPEN
        failures: list[BaseException] = []
        try:
            self.fire(FitBegin(epochs, steps), Phase())
            if epochs is not None:
                for _ in range(epochs):
                    for phase, loader in data.items():
                        self.epoch(learner, phase, loader)
            else:
                self._fit_steps(learner, data, steps or 0, validate_every)
        except BaseException as failure:  # raised below, when the fit is closed
            failures.append(failure)
        self.scopes.fit = CLOSING
        self._close(_FIT_END, Phase(), failures)
        try:
            self.executor.flush()
        except BaseException as failure:  # everything is closed first
            failures.append(failure)
        # All three: an interrupt can strike while an epoch is being closed.
        self.scopes.fit = self.scopes.epoch = self.scopes.batch = CLOSED
        if not failures:
            return None
        worst = merge(failures)
        if isinstance(worst, CancelFittingException):
            return worst
        raise worst

    def _fit_steps(self, learner: StepContext, data: PhaseMap[Any], steps: int, validate_every: int | None) -> None:
        """Train in epochs of `validate_every` batches, or of one pass of the loader, each followed by the others."""
        training = next(phase for phase in data if isinstance(phase, AbstractTrainingPhase))
        loader = data[training]
        endless = stream(loader, training) if validate_every is not None else None
        left = steps
        while left > 0:
            most = left if validate_every is None else min(left, validate_every)
            self.epoch(learner, training, loader if endless is None else endless, most)
            # An epoch that was cancelled before its first batch counts too, or this might never end.
            left -= self.scopes.batch_number or (1 if validate_every is None else most)
            for phase, other in data.items():
                if phase is not training:
                    self.epoch(learner, phase, other)

    def epoch(self, learner: StepContext, phase: Phase, loader: Iterable[Any], most: int | None = None) -> None:
        """Run one epoch of a phase over a loader, of at most `most` batches."""
        scopes = self.scopes
        failures: list[BaseException] = []
        with phase.mode(self.core.modules):
            scopes.open_epoch(phase)
            self.state.show(BatchState())
            self.core.end_groups()
            try:
                self.fire(_EPOCH_BEGIN, phase)
                self._run(learner, phase, loader, most)
                check_gave(scopes.batch_number, phase, loader)
            except CancelEpochException:
                pass
            except BaseException as failure:  # raised below, when the epoch is closed
                failures.append(failure)
            self.core.last_batch = False
            self.core.end_groups()
            self._show(scopes.completed)
            scopes.epoch = CLOSING
            self._close(_EPOCH_CANCELLED if failures else _EPOCH_END, phase, failures)
            scopes.epoch = CLOSED
        if failures:
            raise merge(failures)

    def _close(self, event: Event, phase: Phase, failures: list[BaseException]) -> None:
        """Fire the event that closes a scope; what it raises is added to `failures`."""
        self.fired.clear()
        try:
            self.fire(event, phase)
        except BaseException as failure:  # the scopes around it are closed first
            failures.append(failure)
            self.fired.clear()

    def _show(self, batch: BatchState | None) -> None:
        if batch is not self.state.batch:
            self.state.show(batch if batch is not None else BatchState())

    def _run(self, learner: StepContext, phase: Phase, loader: Iterable[Any], most: int | None) -> None:
        batches: Iterable[Any] = loader if most is None else islice(loader, most)
        if self.core.accumulate > 1:
            batches = self._mark_last(batches, shortest(length(loader), most))
        step, scopes = phase.step, self.scopes
        for raw in batches:
            scopes.batch_number += 1
            try:
                step(learner, raw)
                if scopes.batch != CLOSED:
                    raise CancelBatchException(_LEFT_OPEN)
            except BaseException as failure:  # closes the batch, then raises what is left
                self.close_batch(phase, failure, CancelBatchException)

    def _mark_last(self, batches: Iterable[Any], total: int | None) -> Iterator[Any]:
        """Tell the core which batch is the last of the epoch: it ends an accumulation group that is not full.

        Where the number of batches is not known, the next one is taken before the current one is given.
        """
        if total is not None:
            for number, raw in enumerate(batches, start=1):
                self.core.last_batch = number == total
                yield raw
            return
        held: list[Any] = []
        for raw in batches:
            yield from held
            held = [raw]
        self.core.last_batch = True
        yield from held

    def close_batch(self, phase: Phase, failure: BaseException, *ends: type[BaseException]) -> None:
        """Close the batch, if one is open, after an exception; then raise what is left, unless it is one of `ends`."""
        scopes = self.scopes
        failures = [failure]
        self.fired.clear()  # an interrupt leaves behind what its event had asked for
        if scopes.batch == OPEN:
            scopes.batch = CLOSING
            if scopes.backward:
                self.core.discard()
            self._close(_BATCH_CANCELLED, phase, failures)
        elif scopes.batch == CLOSING:
            scopes.completed = self.state.batch  # BatchEnd was fired: the batch itself is complete
        scopes.batch = CLOSED
        worst = merge(failures)
        if not isinstance(worst, ends):
            raise worst

    # --- one batch

    def step(self, learner: StepContext, phase: Phase, raw: Any) -> BatchState:
        """Run one batch outside of an epoch, in the phase's mode; return its state."""
        self.scopes.firing = True  # a step may not begin another one, nor a fit
        try:
            with phase.mode(self.core.modules):
                try:
                    phase.step(learner, raw)
                    if self.scopes.batch != CLOSED:
                        raise CancelBatchException(_LEFT_OPEN)
                except BaseException as failure:  # closes the batch, then raises what is left
                    # There is no epoch to cancel.
                    self.close_batch(phase, failure, CancelBatchException, CancelEpochException)
        finally:
            self.scopes.firing = False
        return self.state.batch

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass."""
        return self.core.autocast()

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None) -> None:
        """Run the backward pass with its events; ``batch.loss``, where it is this loss, is detached after it."""
        on, batch = self.runners[phase], self.state.batch
        self._need_batch("backward")
        shared = batch.__dict__.get("loss") is loss
        self.scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
            loss = batch.loss if shared else loss
        if not is_a(loss, torch.Tensor) or loss.numel() != 1:
            raise CoreError(f"backward({phase!r}, loss) takes a tensor with one element, got {loss!r}.")
        self.core.drop_spent()
        if name is None:
            self.core.backward(loss)
        else:
            self.core.backward_for(loss, name)
        if shared:
            batch.loss = loss.detach()
        batch.grads = self.core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Step the optimizer `name`, or all of them, if its accumulation group is complete, with its events."""
        self._need_batch("update")
        core = self.core
        names = core.due(name)
        if not names:
            return
        on = self.runners[phase]
        core.unscale(names)
        if on.update_begin is not None:
            on.update_begin(_UPDATE_BEGIN, phase)
        norm = core.clip(names)
        if norm is not None:
            self.state.batch.grad_norm = norm
        core.step(names)
        if on.update_end is not None:
            on.update_end(_UPDATE_END, phase)

    def run_batch(self, phase: Phase, state: dict[str, Any]) -> RunBatch:
        """Return the context of one batch in a step of one's own."""
        return RunBatch(self, phase, state)

    def _need_batch(self, what: str) -> None:
        if self.scopes.batch != OPEN:
            raise UsageError(f"{what}() needs an open batch. Call it inside `with learner.run_batch(self, ...)`.")


class RunBatch:
    """The context of one batch: it makes the batch state, and fires `BatchBegin` and `BatchEnd`.

    An exception in its body closes the batch and goes on, so a step may catch it.
    """

    __slots__ = ("_entries", "_loop", "_phase")

    def __init__(self, loop: Loop, phase: Phase, entries: dict[str, Any]) -> None:
        self._loop = loop
        self._phase = phase
        self._entries = entries

    def __enter__(self) -> BatchState:
        loop, scopes = self._loop, self._loop.scopes
        if scopes.batch != CLOSED:
            raise UsageError(f"run_batch({self._phase!r}) was called inside an open batch. Leave that one first.")
        batch = BatchState()
        batch.__dict__.update(loop.core.place(self._entries) if loop.core.places else self._entries)
        loop.state.show(batch)
        scopes.backward = False
        scopes.batch = OPEN
        try:
            loop.fire(_BATCH_BEGIN, self._phase)
        except BaseException as failure:  # closed first
            loop.close_batch(self._phase, failure)
        if torch.is_grad_enabled():
            loop.core.begin_groups()
        return batch

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> None:
        loop = self._loop
        if failure is not None:
            loop.close_batch(self._phase, failure)
        loop.scopes.batch = CLOSING
        try:
            loop.fire(_BATCH_END, self._phase)
        finally:
            loop.scopes.batch = CLOSED
            loop.scopes.completed = loop.state.batch
