"""The loop: fit, epoch and step, each of which is closed with its event whatever is raised in it.

This module keeps rules 15 to 17 of ``docs/rules.md``: every Begin gets exactly one End or Cancelled, an exception
closes the batch, the epoch and the fit that it leaves, and `FitEnd` runs for every callback before `fit` raises.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
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
from flowtrain.core.optimizers import check_trained
from flowtrain.core.torch_core import TorchCore
from flowtrain.data.loaders import length
from flowtrain.errors import CancelBatchException, CancelEpochException, CancelException, CancelFittingException
from flowtrain.graph.clock import Clock
from flowtrain.graph.executor import Executor
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.training.checkpoint.checkpoints import Checkpoints
from flowtrain.training.checkpoint.position import Position, Stream, loader_start
from flowtrain.training.checkpoint.rng import hold_queues
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.failures import Failures
from flowtrain.training.fit_data import check_gave, has_workers, planned_updates, set_epoch, shortest
from flowtrain.training.interrupts import Interrupts, why_stopped
from flowtrain.training.ranks.ranks import Ranks
from flowtrain.training.scopes import CLOSED, Scopes
from flowtrain.training.sinks import Sinks
from flowtrain.training.step import Steps, detach_loss
from flowtrain.training.step_errors import see_memory_error
from flowtrain.training.together import Alone, Together

__all__ = ["Loop"]

_EPOCH_BEGIN, _EPOCH_END, _EPOCH_CANCELLED = EpochBegin(), EpochEnd(), EpochCancelled()
_REST_BEGIN, _REST_END = UpdateBegin(in_batch=False), UpdateEnd(in_batch=False)

_LEFT_OPEN = "the step caught an exception and left its batch open"


class Loop:
    """Runs training for one learner, and owns the objects that training consists of.

    Attributes:
        state: The state of the learner.
        core: The torch core.
        executor: The executor that makes runners from plans.
        scopes: Which of fit, epoch and batch are open, and the numbers of epochs and batches.
        dispatch: Fires events.
        steps: Runs batches.
        sinks: The logging backends of the callbacks.
        together: The processes that train together: this one alone, or one of several ranks.
        checkpoints: Takes checkpoints, and resumes from them.
    """

    def __init__(self, state: LearnerState, core: TorchCore, executor: Executor) -> None:
        self.state, self.core, self.executor = state, core, executor
        self.scopes, self.sinks = Scopes(), Sinks()
        self.dispatch = Dispatch(state, self.scopes, executor, self.sinks, accumulates=core.accumulate > 1)
        self.together: Together = Alone(core)
        if core.world is not None:
            self.together = Ranks(core.world, state, core, self.scopes, self.dispatch)
        mailbox, parts = self.dispatch.mailbox, self.together.parts
        self.checkpoints = Checkpoints(state, core, executor, self.scopes, self.sinks, mailbox, parts)
        self.dispatch.carry_out_requests(self.checkpoints.take, parts.drop)
        self.steps = Steps(state, core, self.scopes, self.dispatch, self.checkpoints, self.together.sync)
        self.sinks.name_run(self.together.agree(self.sinks.run.id))

    def time(self, clock: Clock | None) -> None:
        """Have everything in a fit timed from now on that takes time, or no longer for ``None``."""
        self.dispatch.time(clock)
        self.checkpoints.writer.time(clock)

    # --- fit and epoch

    def resume(self, path: Any, data: PhaseMap[Any], unit: str) -> None:
        """Let the next fit begin at the position of a checkpoint, on all ranks or on none; see `Checkpoints.resume`."""
        self.together.begin()
        failures = Failures()
        with failures:
            self.checkpoints.resume(path, data, unit, self.dispatch)
        self.together.resumed(failures)
        failures.raise_worst()

    def fit(
        self,
        data: PhaseMap[Any],
        epochs: int | None,
        steps: int | None,
        validate_every: int | None,
    ) -> BaseException | None:
        """Run a fit; return the `CancelFittingException` that ended it, or ``None``.

        Args:
            data: The loaders by phase.
            epochs: The number of rounds, or ``None``.
            steps: The number of batches of the training phase, if `epochs` is ``None``.
            validate_every: With `steps`, the number of batches in a training epoch; ``None`` for one pass of the
                loader. With `epochs`, the number of rounds after which phases that do not train run; ``None`` for one.

        Raises:
            BaseException: Every error and interrupt, after the fit is closed.
        """
        try:
            workers = any(has_workers(loader) for loader in data.values())
            paths = {path for node in self.dispatch.nodes for path, _ in node.union}
            on_terminal = ("resource", "terminal") in paths
            save = self.checkpoints.interrupted
            hold = self.together.begin_fit(save)
            with Interrupts(self.dispatch.mailbox, save, workers, answers=on_terminal, hold=hold):
                return self._fit(data, epochs, steps, validate_every)
        finally:  # a second interrupt can break off `_fit` at any line, and the learner must still be usable
            self.scopes.close_fit()
            self.state.arrivals.drop()
            self.checkpoints.leave_fit()
            self.dispatch.mailbox.clear()
            self.dispatch.drop_requests()

    def _fit(
        self,
        data: PhaseMap[Any],
        epochs: int | None,
        steps: int | None,
        validate_every: int | None,
    ) -> BaseException | None:
        """Run a fit; `fit` describes the arguments and the result, and closes the fit if an interrupt breaks this off.

        A fit fires `FitBegin`, restores the random state of the checkpoint that it resumes from, if any, and runs the
        epochs. Whatever happens there, it then lets late writes arrive, fires `FitEnd` and finishes all pending work:
        deferred events, the calls in the mailbox, the files of checkpoints, and the logging backends. Failures are
        collected on the way, so that none of these parts is left out, and are raised at the end.
        """
        self.scopes.open_fit()
        failures = Failures()
        with failures:
            self._begin_fit(data, epochs, steps, validate_every)
        self.together.fit_begun(failures)
        if not failures:
            with failures:
                if epochs is not None:
                    self._fit_epochs(data, epochs, validate_every or 1)
                else:
                    self._fit_steps(data, steps or 0, validate_every)
            if failures:
                self.together.broke_off(failures)
        self.scopes.end_fit()
        self._deliver_rest(failures)
        broken_off = self.checkpoints.position.phase or not failures.only(CancelFittingException)
        end = FitEnd(why_stopped(failures.first, self.checkpoints.saved), complete=not broken_off)
        with failures:
            self.dispatch.fire_closing(end, Phase())
        # Empty the mailbox before `end_fit` forgets the position, because a checkpoint in the mailbox needs it; and
        # again at the end, because the writer and the sinks may have put in calls meanwhile.
        empty = self.dispatch.mailbox.empty
        for finish in (self.executor.flush, empty, self.checkpoints.end_fit, self.sinks.flush, empty):
            failures.attempt(finish)
        self.together.fit_ended(failures)
        stopped: BaseException | None = None
        try:
            failures.raise_worst()
        except CancelFittingException as cancel:
            stopped = cancel
            for kept in (cancel, *getattr(cancel, "others", ())):
                kept.__traceback__ = None  # the frames of the traceback hold a batch with its autograd graph
        self.checkpoints.load_wanted()
        return stopped

    def _deliver_rest(self, failures: Failures) -> None:
        """Let the late writes of handlers arrive that have not, since the fit has no further event that they wait for.

        After an error or an interrupt they are dropped; a checkpoint that was taken before has them.
        """
        arrivals = self.state.arrivals
        for deliver in arrivals.rest() if failures.only(CancelFittingException) else ():
            failures.attempt(deliver)
        arrivals.drop()

    def _begin_fit(
        self, data: PhaseMap[Any], epochs: int | None, steps: int | None, validate_every: int | None
    ) -> None:
        """Fire `FitBegin`, and restore the random state of the checkpoint that the fit resumes from, if any."""
        planned = partial(planned_updates, data, self.core.accumulate, epochs, steps, validate_every)
        updates = self.together.plan(planned)
        position = self.checkpoints.begin_fit("steps" if epochs is None else "epochs")
        training = next((phase for phase in data if isinstance(phase, AbstractTrainingPhase)), None)
        done = position.completed(training or Phase())
        resumed = self.checkpoints.resumed is not None
        self.dispatch.fire(FitBegin(epochs, steps, updates, resumed, done, tuple(data)), Phase())
        # Restore the random state only now: handlers of `FitBegin` may draw numbers, and the first run drew them before
        # this checkpoint.
        self.checkpoints.restore_random()
        if training and self.checkpoints.resumed is None:  # a checkpoint has the groups as training left them
            optimizers, main = by_name(self.state.optimizer), not self.state.rank
            check_trained(optimizers, self.core.models, self.state.lossfn, warns=main)
        # Wait for the checkpoint of the beginning. Otherwise a process that is killed, or that cannot write it, leaves
        # logs and no checkpoint, and the next run begins anew and writes the same records after them.
        self.checkpoints.writer.wait()

    def _fit_epochs(self, data: PhaseMap[Any], epochs: int, every: int) -> None:
        """Run `epochs` rounds. Phases that do not train run in every `every`-th round, and in the last one."""
        position = self.checkpoints.position
        training: dict[Phase, Any] = {
            phase: loader for phase, loader in data.items() if isinstance(phase, AbstractTrainingPhase)
        }
        while position.rounds < epochs:
            number = position.rounds + 1
            self._fit_round(data if number == epochs or number % every == 0 else training, position)

    def _fit_round(self, data: Mapping[Phase, Any], position: Position) -> None:
        """Run an epoch of every phase whose epoch in this round is not complete yet."""
        for phase, loader in data.items():
            if repr(phase) not in position.done:
                self.epoch(phase, loader)
        position.end_round()

    def _fit_steps(self, data: PhaseMap[Any], steps: int, validate_every: int | None) -> None:
        """Train for `steps` batches, in epochs of `validate_every` batches or of one pass of the loader.

        An epoch of every other phase follows each training epoch.
        """
        position = self.checkpoints.position
        training = next(phase for phase in data if isinstance(phase, AbstractTrainingPhase))
        loader = data[training]
        if validate_every is not None:
            number = partial(self.scopes.begin_pass, training)
            loader = position.stream = Stream(loader, training, number)
            self.checkpoints.resume_stream(position.stream)
        while position.steps < steps or position.done:
            if repr(training) not in position.done:
                left = steps - position.steps
                most = left if validate_every is None else min(left, validate_every)
                # An epoch that is cancelled before its first batch counts as steps too, or the fit might never end.
                position.count(training, 1 if validate_every is None else most)
                self.epoch(training, loader, most)
            self._fit_round(data, position)

    def epoch(self, phase: Phase, loader: Iterable[Any], most: int | None = None) -> None:
        """Run one epoch of a phase over a loader, of at most `most` batches."""
        if self.scopes.fit == CLOSED:
            self.together.begin()
        try:
            self._epoch(phase, loader, most)
        finally:  # a second interrupt can be raised while the epoch is being closed
            self.scopes.close_epoch()
            hold_queues(loader)
        if self.dispatch.mailbox.calls:  # a handler of the last batch may have requested a checkpoint
            self.dispatch.mailbox.empty()

    def _epoch(self, phase: Phase, loader: Iterable[Any], most: int | None) -> None:
        """Run one epoch in the modes of its phase; `epoch` describes the arguments.

        The epoch begins with an empty batch and no gradients, fires `EpochBegin`, and runs its batches. A cancel of the
        epoch ends the batches early. Then handlers see the last complete batch again, groups of gradients that are not
        full make their update, and `EpochEnd` is fired. After a failure, which a cancel of the epoch is not,
        `EpochCancelled` is fired instead, the position of the fit stays within the epoch, and the failure is raised.
        """
        scopes, position = self.scopes, self.checkpoints.position
        failures, begun, batches = Failures(), Failures(), loader
        with self.mode(phase):
            scopes.open_epoch(phase)
            self.state.show(BatchState())
            try:
                self.core.end_groups()
                with begun:
                    batches = self._begin_epoch(phase, loader)
                self.together.epoch_begun(begun)
                begun.raise_worst()
                if most is not None:  # a fit that resumes may ask for fewer steps than the open epoch has already
                    most = max(most, scopes.batch_number)
                known = length(loader)
                announced = known is not None or isinstance(loader, Stream)
                self._run(phase, batches, shortest(known, most), most, announced=announced)
                check_gave(scopes.batch_number, phase, loader)
            except CancelEpochException:
                pass
            except BaseException as failure:  # raised below, after the epoch is closed
                scopes.locate(failure, phase, "after ")
                self._see_memory_error(failure, phase)
                failures.add(failure)
                if isinstance(failure, Exception):  # the batch is closed, so this is a batch boundary as any other
                    failures.attempt(self.dispatch.mailbox.empty)
            self.together.batches_ended(failures)
            # The completed batch is shown before the update of the groups, because handlers of this update read that
            # batch.
            self._show(scopes.completed)
            if failures.only(CancelException):
                failures.attempt(self._update_unfilled, phase)
            self.core.groups.note_last(False)
            failures.attempt(self.core.end_groups)  # a device that has failed fails here too
            self.together.merge(phase, failures)
            scopes.end_epoch()
            if not failures:
                position.end_epoch(scopes.batch_number)
            with failures:
                self.dispatch.fire_closing(_EPOCH_CANCELLED if failures else _EPOCH_END, phase)
            self.together.epoch_ended(failures)
        failures.raise_worst()

    def _see_memory_error(self, failure: BaseException, phase: Phase) -> None:
        see_memory_error(failure, phase, self.core, self.state.batch if self.scopes.batch else None)

    def _update_unfilled(self, phase: Phase) -> None:
        """Update the parameters with the gradients of groups that still wait for batches, as the epoch has no more.

        A group still waits if the last batch or the epoch was cancelled, or the loader gave fewer batches than its
        length. After an error or an interrupt no update is made. Handlers of this update see the last completed batch,
        as an open batch: a cancel discards the gradients, and a checkpoint waits. A cancel of the epoch has no further
        effect, because the epoch is ending anyway.
        """
        groups, scopes = self.core.unfilled(), self.scopes
        if not groups:
            return
        self.state.batch.grads = self.core.grads
        scopes.open_batch()
        try:
            for names in groups:
                self.steps.update_due(phase, names, _REST_BEGIN, _REST_END)
        except (CancelBatchException, CancelEpochException):
            self.core.discard()
        except BaseException as failure:
            self.core.discard()
            scopes.locate(failure, phase)
            self._see_memory_error(failure, phase)
            if not isinstance(failure, CancelException):
                self.checkpoints.drop_requests()
            raise
        finally:
            scopes.close_batch()

    @contextmanager
    def mode(self, phase: Phase) -> Generator[None]:
        """Give a context in which the modules have the modes of a phase: training or evaluation.

        ``core.modes`` holds the modes that the user has set, because a checkpoint saves the modes of the user.
        """
        core = self.core
        if self.checkpoints.showing_judged and isinstance(phase, AbstractTrainingPhase):
            self.checkpoints.show_trained()
        with phase.mode(core.modules) as core.modes:
            try:
                core.warn_switched()
                yield
            finally:
                core.modes = None

    def _begin_epoch(self, phase: Phase, loader: Iterable[Any]) -> Iterable[Any]:
        """Fire `EpochBegin`, and return the batches of the epoch that are left.

        These are all batches, unless the fit resumes in this epoch from a checkpoint. Then `EpochBegin` is fired a
        second time in the history of the run, and the state of the checkpoint is restored after it.
        """
        checkpoints, position = self.checkpoints, self.checkpoints.position
        resuming = position.is_resumed(phase)
        if resuming:
            self.scopes.continue_epoch(position.batches)
        else:
            position.begin_epoch(phase)
        if not isinstance(loader, Stream):
            set_epoch(loader, self.scopes.begin_pass(phase))  # a handler of `EpochBegin` may choose another number
        self.dispatch.fire(_EPOCH_BEGIN, phase)
        self.dispatch.mailbox.empty()
        batches = loader
        if resuming and position.begun is not None:
            batches = checkpoints.replay(loader, phase)
            checkpoints.restore_epoch()
        else:
            if resuming:
                checkpoints.restore_epoch()
            if not isinstance(loader, Stream):
                position.begun = loader_start(loader)  # after `EpochBegin`, whose handlers may draw random numbers
        checkpoints.release_resumed()
        return batches

    def _show(self, batch: BatchState | None) -> None:
        """Make this the batch that handlers see, or an empty batch for ``None``."""
        if batch is not self.state.batch:
            self.state.show(batch if batch is not None else BatchState())
        detach_loss(self.state.batch)

    def _run(
        self, phase: Phase, batches: Iterable[Any], total: int | None, most: int | None, *, announced: bool
    ) -> None:
        """Run the rest of the batches of an epoch.

        Args:
            phase: The phase.
            batches: The batches that are left.
            total: The number of batches in the whole epoch; ``None`` if it is not known.
            most: The most batches that the whole epoch may have; ``None`` for no limit.
            announced: Whether the loader gives as many batches as `total` says.
        """
        step, scopes, calls = self.steps.step_of(phase), self.scopes, self.dispatch.mailbox.calls
        done = scopes.batch_number
        if most is not None:
            batches = islice(batches, most - done)
        with self.together.batches(phase, batches, done, total, announced=announced) as fed:
            for scopes.batch_number, raw in enumerate(self.dispatch.batches(fed), done + 1):
                try:
                    step(raw)
                    if scopes.batch:  # true unless CLOSED, which is 0: the cheapest test, as it runs for every batch
                        raise CancelBatchException(_LEFT_OPEN)
                except BaseException as failure:  # `cancel_batch` closes the batch, and raises all but a cancel of it
                    with self.together.after_sync(phase):
                        self.steps.cancel_batch(phase, failure, CancelBatchException)
                if calls:  # before the loader draws the next batch, so that a checkpoint has the generators of this one
                    with self.together.after_sync(phase):
                        self.dispatch.mailbox.empty()

    # --- one batch

    def step(self, phase: Phase, raw: Any) -> BatchState:
        """Run one batch outside of an epoch, in the mode of its phase, and return the state of the batch."""
        self.together.begin(phase)
        try:
            self.scopes.begin_call()  # so that a handler of this batch can start neither a fit nor another step
            with self.mode(phase):
                try:
                    self.steps.step_of(phase)(raw)
                    if self.scopes.batch:
                        raise CancelBatchException(_LEFT_OPEN)
                except BaseException as failure:  # a cancel of the epoch ends the batch, since no epoch is open
                    self.steps.cancel_batch(phase, failure, CancelBatchException, CancelEpochException)
            detach_loss(self.state.batch)
            if self.dispatch.mailbox.calls:
                self.dispatch.mailbox.empty()
        finally:
            self.scopes.close_step()
        return self.state.batch
