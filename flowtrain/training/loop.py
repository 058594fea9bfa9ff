"""The loop: fit, epoch and step, and how each is closed whatever happens in it.

Rules 15 to 17 of ``docs/rules.md`` are kept here: every Begin gets exactly one End or Cancelled, an exception closes
the batch, the epoch and the fit that it leaves, and `FitEnd` runs for every callback before anything is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from flowtrain.callback.events import (
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    FitBegin,
    FitEnd,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.core.core import TorchCore
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    raise_worst,
)
from flowtrain.graph.executor import Executor
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.manager import Cuts
from flowtrain.training.checkpoint.position import Position, Stream, begin_again, beginning
from flowtrain.training.data import check_gave, has_workers, length, planned_updates, set_epoch, shortest
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.interrupts import Interrupts
from flowtrain.training.scopes import Scopes
from flowtrain.training.sinks import Sinks
from flowtrain.training.step import StepParts, settle

__all__ = ["Loop"]

_EPOCH_BEGIN, _EPOCH_END, _EPOCH_CANCELLED = EpochBegin(), EpochEnd(), EpochCancelled()
_REST_BEGIN, _REST_END = UpdateBegin(in_batch=False), UpdateEnd(in_batch=False)

_LEFT_OPEN = "the step caught an exception and left its batch open"


class Loop:
    """Runs training for one learner.

    Attributes:
        state: The learner's state.
        core: The torch core.
        executor: What runs the plans.
        scopes: What is open, and where training is.
        dispatch: What fires events.
        parts: What steps run a batch with.
        sinks: The logging backends of the callbacks.
        cuts: The checkpoints.
    """

    def __init__(self, state: LearnerState, core: TorchCore, executor: Executor) -> None:
        self.state = state
        self.core = core
        self.executor = executor
        self.scopes = Scopes()
        self.sinks = Sinks()
        self.dispatch = Dispatch(state, self.scopes, executor, self.sinks, accumulates=core.accumulate > 1)
        self.cuts = Cuts(state, core, executor, self.scopes, self.sinks, self.dispatch.mailbox)
        self.dispatch.checkpoint = self.cuts.take
        self.parts = StepParts(state, core, self.scopes, self.dispatch, self.cuts)

    # --- fit and epoch

    def fit(
        self,
        data: PhaseMap[Any],
        epochs: int | None,
        steps: int | None,
        validate_every: int | None,
    ) -> BaseException | None:
        """Run a fit; return the `CancelFittingException` that ended it, or ``None``. Errors are raised."""
        try:
            workers = any(has_workers(loader) for loader in data.values())
            with Interrupts(self.dispatch.mailbox, self.cuts.interrupted, workers):
                return self._fit(data, epochs, steps, validate_every)
        finally:  # a second interrupt can strike anywhere, and the learner is still to be of use
            self.scopes.close_fit()
            self.cuts.leave_fit()
            self.dispatch.mailbox.clear()
            self.dispatch.drop()

    def _fit(
        self,
        data: PhaseMap[Any],
        epochs: int | None,
        steps: int | None,
        validate_every: int | None,
    ) -> BaseException | None:
        self.scopes.open_fit()
        failures: list[BaseException] = []
        try:
            updates = planned_updates(data, self.core.accumulate, epochs, steps, validate_every)
            position = self.cuts.begin_fit("steps" if epochs is None else "epochs")
            self.dispatch.fire(FitBegin(epochs, steps, updates, self.cuts.resumed is not None), Phase())
            self.cuts.restore_random()  # what handlers of `FitBegin` drew was drawn before the checkpoint too
            if epochs is not None:
                while position.rounds < epochs:
                    self._fit_round(data, position)
            else:
                self._fit_steps(data, steps or 0, validate_every, position)
        except BaseException as failure:  # raised below, when the fit is closed
            failures.append(failure)
        self.scopes.end_fit()
        self.dispatch.fire_last(FitEnd(_why_stopped(failures)), Phase(), failures)
        # The mailbox is emptied while the position is known, which a checkpoint needs; then what the rest has put in.
        empty = self.dispatch.mailbox.empty
        for finish in (self.executor.flush, empty, self.cuts.end_fit, self.sinks.flush, empty):
            _attempt(failures, finish)
        try:
            if failures:
                raise_worst(failures)
        except CancelFittingException as cancel:
            for kept in (cancel, *getattr(cancel, "others", ())):
                kept.__traceback__ = None  # its frames hold a batch, graph and all
            return cancel
        return None

    def _fit_round(self, data: PhaseMap[Any], position: Position) -> None:
        """Run an epoch of every phase that has not had its own in this round."""
        for phase, loader in data.items():
            if repr(phase) not in position.done:
                self.epoch(phase, loader)
        position.end_round()

    def _fit_steps(self, data: PhaseMap[Any], steps: int, validate_every: int | None, position: Position) -> None:
        """Train in epochs of `validate_every` batches, or of one pass of the loader, each followed by the others."""
        training = next(phase for phase in data if isinstance(phase, AbstractTrainingPhase))
        loader = data[training]
        if validate_every is not None:
            number = partial(self.scopes.begin_pass, training)
            loader = position.stream = Stream(loader, training, number)
            self.cuts.resume_stream(position.stream)
        while position.steps < steps or position.done:
            if repr(training) not in position.done:
                left = steps - position.steps
                most = left if validate_every is None else min(left, validate_every)
                # An epoch that was cancelled before its first batch counts too, or this might never end.
                position.count(training, 1 if validate_every is None else most)
                self.epoch(training, loader, most)
            self._fit_round(data, position)

    def epoch(self, phase: Phase, loader: Iterable[Any], most: int | None = None) -> None:
        """Run one epoch of a phase over a loader, of at most `most` batches."""
        try:
            self._epoch(phase, loader, most)
        finally:  # an interrupt can strike while the epoch is being closed
            self.scopes.close_epoch()
        if self.dispatch.mailbox.calls:  # what was asked for in a batch that ended the epoch
            self.dispatch.mailbox.empty()

    def _epoch(self, phase: Phase, loader: Iterable[Any], most: int | None) -> None:
        scopes, position = self.scopes, self.cuts.position
        failures: list[BaseException] = []
        with self._mode(phase):
            scopes.open_epoch(phase)
            self.state.show(BatchState())
            self.core.end_groups()
            try:
                batches = self._begin_epoch(phase, loader)
                self._run(phase, batches, shortest(length(loader), most), most)
                check_gave(scopes.batch_number, phase, loader)
            except CancelEpochException:
                pass
            except BaseException as failure:  # raised below, when the epoch is closed
                scopes.locate(failure, phase, "after ")
                failures.append(failure)
                if isinstance(failure, Exception):  # a batch boundary, if the loader failed or a batch ended the fit
                    _attempt(failures, self.dispatch.mailbox.empty)
            self._show(scopes.completed)
            self._update_unfilled(phase, failures)
            self.core.groups.last_batch = False
            self.core.end_groups()
            scopes.end_epoch()
            if not failures:
                position.end_epoch(scopes.batch_number)
            self.dispatch.fire_last(_EPOCH_CANCELLED if failures else _EPOCH_END, phase, failures)
        if failures:
            raise_worst(failures)

    def _update_unfilled(self, phase: Phase, failures: list[BaseException]) -> None:
        """Update with the gradients of groups that wait for more batches: there are none any more.

        The last batch was cancelled, or the epoch, or the loader gave fewer batches than it had said. After an error or
        an interrupt nothing is updated. For handlers it is as in an open batch, the last one that was completed: a
        cancel throws the gradients away, and a checkpoint waits. What a cancel wants to end is ending already.
        """
        groups, scopes = self.core.unfilled(), self.scopes
        if not groups or not all(isinstance(failure, CancelException) for failure in failures):
            return
        self.state.batch.grads = self.core.grads
        scopes.open_batch()
        try:
            for names in groups:
                self.parts.update_due(phase, names, _REST_BEGIN, _REST_END)
        except (CancelBatchException, CancelEpochException):
            self.core.discard()
        except BaseException as failure:  # raised when the epoch is closed
            self.core.discard()
            scopes.locate(failure, phase)
            if not isinstance(failure, CancelException):
                self.cuts.drop()
            failures.append(failure)
        scopes.close_batch()

    @contextmanager
    def _mode(self, phase: Phase) -> Generator[None]:
        """Set the modes of a phase; while they are, a checkpoint asks ``core.modes`` for those without it."""
        core = self.core
        if self.cuts.held and isinstance(phase, AbstractTrainingPhase):
            self.cuts.release()
        with phase.mode(core.modules) as core.modes:
            try:
                core.warn_switched()
                yield
            finally:
                core.modes = None

    def _begin_epoch(self, phase: Phase, loader: Iterable[Any]) -> Iterable[Any]:
        """Fire `EpochBegin`, and return the batches that are left: all, unless a checkpoint was taken in this epoch.

        Then the epoch begins once more for its callbacks, whose state is put back after it.
        """
        cuts, position = self.cuts, self.cuts.position
        resuming = position.leave_resumed(phase)
        if resuming:
            self.scopes.continue_epoch(position.batches)
        else:
            position.begin_epoch(phase)
        if not isinstance(loader, Stream):
            set_epoch(loader, self.scopes.begin_pass(phase))  # a handler of `EpochBegin` may choose another number
        self.dispatch.fire(_EPOCH_BEGIN, phase)
        if self.dispatch.mailbox.calls:
            self.dispatch.mailbox.empty()
        batches = loader
        if resuming and position.begun is not None:
            batches = begin_again(loader, position.begun, position.batches, phase)
            cuts.reenter()
        else:
            if resuming:
                cuts.reenter()
            if not isinstance(loader, Stream):
                position.begun = beginning(loader)  # with the generators as they are now
        cuts.let_go()
        return batches

    def _show(self, batch: BatchState | None) -> None:
        if batch is not self.state.batch:
            self.state.show(batch if batch is not None else BatchState())
        settle(self.state.batch)

    def _run(self, phase: Phase, batches: Iterable[Any], total: int | None, most: int | None) -> None:
        """Run the batches that are left of an epoch of `total` batches, where that is known, and of `most` at most."""
        step, scopes, calls = self.parts.step_of(phase), self.scopes, self.dispatch.mailbox.calls
        done = scopes.batch_number
        if most is not None:
            batches = islice(batches, most - done)
        fed = self.core.feed(batches, None if total is None else total - done)
        for scopes.batch_number, raw in enumerate(fed, done + 1):
            try:
                step(raw)
                if scopes.batch:  # not CLOSED, which is 0; every instruction here is one for each batch
                    raise CancelBatchException(_LEFT_OPEN)
            except BaseException as failure:  # closes the batch, then raises what is left
                self.parts.cancel_batch(phase, failure, CancelBatchException)
            if calls:  # before the loader is asked for more, so that a checkpoint knows what it has drawn
                self.dispatch.mailbox.empty()

    # --- one batch

    def step(self, phase: Phase, raw: Any) -> BatchState:
        """Run one batch outside of an epoch, in the phase's mode; return its state."""
        try:
            self.scopes.begin_call()  # a step may not begin another one, nor a fit
            with self._mode(phase):
                try:
                    self.parts.step_of(phase)(raw)
                    if self.scopes.batch:
                        raise CancelBatchException(_LEFT_OPEN)
                except BaseException as failure:  # closes the batch, then raises what is left
                    # There is no epoch to cancel.
                    self.parts.cancel_batch(phase, failure, CancelBatchException, CancelEpochException)
            settle(self.state.batch)
            if self.dispatch.mailbox.calls:
                self.dispatch.mailbox.empty()
        finally:
            self.scopes.close_step()
        return self.state.batch


def _why_stopped(failures: list[BaseException]) -> str:
    """Return why a fit was cancelled, if it was: what the exception says, or where it was raised."""
    if not failures or not isinstance(failures[0], CancelFittingException):
        return ""
    cancel = failures[0]
    return str(cancel) or ", ".join([type(cancel).__name__, *getattr(cancel, "__notes__", ())])


def _attempt(failures: list[BaseException], do: Callable[..., object], *args: Any) -> None:
    """Call a function; what it raises is kept, since everything is closed before anything is raised."""
    try:
        do(*args)
    except BaseException as failure:
        failures.append(failure)
