"""The loop: fit, epoch and step, each of which is closed with its event whatever is raised in it.

This module keeps rules 15 to 17 of ``docs/rules.md``: every Begin gets exactly one End or Cancelled, an exception
closes the batch, the epoch and the fit that it leaves, and `FitEnd` runs for every callback before `fit` raises.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    attempt,
    raise_worst,
)
from flowtrain.graph.executor import Executor
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.training.checkpoint.checkpoints import Checkpoints
from flowtrain.training.checkpoint.position import Position, Stream, loader_start
from flowtrain.training.checkpoint.remote import Place
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.fit_data import check_gave, has_workers, planned_updates, set_epoch, shortest
from flowtrain.training.interrupts import Interrupts
from flowtrain.training.ranks import EPOCHS_BROKEN_OFF, FIT_END
from flowtrain.training.scopes import Scopes
from flowtrain.training.sinks import Sinks
from flowtrain.training.step import Steps, detach_loss

__all__ = ["LEFT_OPEN", "Loop"]

_EPOCH_BEGIN, _EPOCH_END, _EPOCH_CANCELLED = EpochBegin(), EpochEnd(), EpochCancelled()
_REST_BEGIN, _REST_END = UpdateBegin(in_batch=False), UpdateEnd(in_batch=False)

LEFT_OPEN = "the step caught an exception and left its batch open"


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
        checkpoints: Takes checkpoints, and resumes from them.
    """

    def __init__(self, state: LearnerState, core: TorchCore, executor: Executor) -> None:
        self.state, self.core, self.executor = state, core, executor
        self.scopes, self.sinks = Scopes(), Sinks()
        self.dispatch = Dispatch(state, self.scopes, executor, self.sinks, accumulates=core.accumulate > 1)
        self.checkpoints = self._make_checkpoints()
        self.dispatch.checkpoint = self.checkpoints.take
        self.steps = self._make_steps()

    # --- the parts of a fit that `flowtrain.training.rank_loop.RankLoop` replaces where several ranks train

    def _make_steps(self) -> Steps:
        """Return the object that runs batches."""
        return Steps(self.state, self.core, self.scopes, self.dispatch, self.checkpoints)

    def _make_checkpoints(self) -> Checkpoints:
        """Return the object that takes checkpoints and resumes from them."""
        return Checkpoints(self.state, self.core, self.executor, self.scopes, self.sinks, self.dispatch.mailbox)

    def resume(self, path: Any, data: PhaseMap[Any], unit: str) -> None:
        """Let the next fit begin at the position of a checkpoint; see `Checkpoints.resume`."""
        self.checkpoints.resume(path, data, unit, self.dispatch)

    def divided(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the loaders that this process uses: those of the user, or the shares of this rank."""
        return data

    def agreed(self, value: Any) -> Any:
        """Return the value of the main rank, which in one process is `value`. Every rank calls this together."""
        return value

    def _interrupts(self, workers: bool, on_terminal: bool) -> Interrupts:
        """Return the context in which signals end the fit; `Interrupts` describes the arguments."""
        return Interrupts(self.dispatch.mailbox, self.checkpoints.interrupted, workers, answers=on_terminal)

    def _planned_updates(self, data: PhaseMap[Any], *counts: int | None) -> int | None:
        """Return the number of updates of a fit, the same on all ranks; `planned_updates` describes the arguments."""
        return planned_updates(data, self.core.accumulate, *counts)

    def predicting(self, phase: Phase, inputs: Iterable[Any]) -> AbstractContextManager[Iterable[Any]]:
        """Return a context that gives these inputs, in which the model runs on each of them."""
        return nullcontext(inputs)

    def _meet(self, point: str, failures: list[BaseException]) -> None:
        """Wait for the other ranks at a sync point, and add their failures to those of this one."""

    def _merge(self, phase: Phase, failures: list[BaseException]) -> None:
        """Merge the measurements of all ranks in an epoch, before `EpochEnd` shows them."""

    # --- fit and epoch

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
            with self._interrupts(workers, on_terminal):
                return self._fit(data, epochs, steps, validate_every)
        finally:  # a second interrupt can break off `_fit` at any line, and the learner must still be usable
            self.scopes.close_fit()
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
        epochs. Whatever happens there, it then fires `FitEnd` and finishes all pending work: deferred events, the calls
        in the mailbox, the files of checkpoints, and the logging backends. Failures are collected on the way, so that
        none of these parts is left out, and are raised at the end.
        """
        self.scopes.open_fit()
        failures: list[BaseException] = []
        attempt(failures, self._begin_fit, data, epochs, steps, validate_every)
        self._meet("FitBegin", failures)
        if not failures:
            if epochs is not None:
                attempt(failures, self._fit_epochs, data, epochs, validate_every or 1)
            else:
                attempt(failures, self._fit_steps, data, steps or 0, validate_every)
            if failures:
                self._meet(EPOCHS_BROKEN_OFF, failures)
        self.scopes.end_fit()
        broken_off = self.checkpoints.position.phase or any(not isinstance(f, CancelFittingException) for f in failures)
        end = FitEnd(_why_stopped(failures, self.checkpoints.saved), complete=not broken_off)
        self.dispatch.fire_closing(end, Phase(), failures)
        # Empty the mailbox before `end_fit` forgets the position, because a checkpoint in the mailbox needs it; and
        # again at the end, because the writer and the sinks may have put in calls meanwhile.
        empty = self.dispatch.mailbox.empty
        for finish in (self.executor.flush, empty, self.checkpoints.end_fit, self.sinks.flush, empty):
            attempt(failures, finish)
        self._meet(FIT_END, failures)
        stopped: BaseException | None = None
        try:
            if failures:
                raise_worst(failures)
        except CancelFittingException as cancel:
            stopped = cancel
            for kept in (cancel, *getattr(cancel, "others", ())):
                kept.__traceback__ = None  # the frames of the traceback hold a batch with its autograd graph
        self.checkpoints.load_wanted()
        return stopped

    def _begin_fit(
        self, data: PhaseMap[Any], epochs: int | None, steps: int | None, validate_every: int | None
    ) -> None:
        """Fire `FitBegin`, and restore the random state of the checkpoint that the fit resumes from, if any."""
        updates = self._planned_updates(data, epochs, steps, validate_every)
        position = self.checkpoints.begin_fit("steps" if epochs is None else "epochs")
        training = next((phase for phase in data if isinstance(phase, AbstractTrainingPhase)), None)
        done = position.completed(training or Phase())
        self.dispatch.fire(FitBegin(epochs, steps, updates, self.checkpoints.resumed is not None, done), Phase())
        # Restore the random state only now: handlers of `FitBegin` may draw numbers, and the first run drew them before
        # this checkpoint.
        self.checkpoints.restore_random()
        if training and self.checkpoints.resumed is None:  # a checkpoint has the groups as training left them
            optimizers, main = by_name(self.state.optimizer), not self.state.rank
            check_trained(optimizers, self.core.models, self.state.lossfn, warns=main)

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
        try:
            self._epoch(phase, loader, most)
        finally:  # a second interrupt can be raised while the epoch is being closed
            self.scopes.close_epoch()
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
        failures: list[BaseException] = []
        with self.mode(phase):
            scopes.open_epoch(phase)
            self.state.show(BatchState())
            try:
                self.core.end_groups()
                batches = self._begin_epoch(phase, loader)
                self._run(phase, batches, shortest(length(loader), most), most)
                check_gave(scopes.batch_number, phase, loader)
            except CancelEpochException:
                pass
            except BaseException as failure:  # raised below, after the epoch is closed
                scopes.locate(failure, phase, "after ")
                self.steps.see_memory_error(failure, phase)
                failures.append(failure)
                if isinstance(failure, Exception):  # the batch is closed, so this is a batch boundary as any other
                    attempt(failures, self.dispatch.mailbox.empty)
            self._meet("the end of the batches", failures)
            # The completed batch is shown before the update of the groups, because handlers of this update read that
            # batch.
            self._show(scopes.completed)
            self._update_unfilled(phase, failures)
            self.core.groups.last_batch = False
            attempt(failures, self.core.end_groups)  # a device that has failed fails here too
            self._merge(phase, failures)
            scopes.end_epoch()
            if not failures:
                position.end_epoch(scopes.batch_number)
            self.dispatch.fire_closing(_EPOCH_CANCELLED if failures else _EPOCH_END, phase, failures)
            self._meet("EpochEnd", failures)
        if failures:
            raise_worst(failures)

    def _update_unfilled(self, phase: Phase, failures: list[BaseException]) -> None:
        """Update the parameters with the gradients of groups that still wait for batches, as the epoch has no more.

        A group still waits if the last batch or the epoch was cancelled, or the loader gave fewer batches than its
        length. After an error or an interrupt no update is made. Handlers of this update see the last completed batch,
        as an open batch: a cancel discards the gradients, and a checkpoint waits. A cancel of the epoch has no further
        effect, because the epoch is ending anyway.
        """
        groups, scopes = self.core.unfilled(), self.scopes
        if not groups or not all(isinstance(failure, CancelException) for failure in failures):
            return
        self.state.batch.grads = self.core.grads
        scopes.open_batch()
        try:
            for names in groups:
                self.steps.update_due(phase, names, _REST_BEGIN, _REST_END)
        except (CancelBatchException, CancelEpochException):
            self.core.discard()
        except BaseException as failure:  # raised by `_epoch` after the epoch is closed
            self.core.discard()
            scopes.locate(failure, phase)
            self.steps.see_memory_error(failure, phase)
            if not isinstance(failure, CancelException):
                self.checkpoints.drop_requests()
            failures.append(failure)
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

    def _run(self, phase: Phase, batches: Iterable[Any], total: int | None, most: int | None) -> None:
        """Run the rest of the batches of an epoch.

        Args:
            phase: The phase.
            batches: The batches that are left.
            total: The number of batches in the whole epoch; ``None`` if it is not known.
            most: The most batches that the whole epoch may have; ``None`` for no limit.
        """
        step, scopes, calls = self.steps.step_of(phase), self.scopes, self.dispatch.mailbox.calls
        done = scopes.batch_number
        if most is not None:
            batches = islice(batches, most - done)
        fed = self.dispatch.batches(self.core.feed(batches, None if total is None else total - done))
        for scopes.batch_number, raw in enumerate(fed, done + 1):
            try:
                step(raw)
                if scopes.batch:  # true unless CLOSED, which is 0: the cheapest test, as it runs for every batch
                    raise CancelBatchException(LEFT_OPEN)
            except BaseException as failure:  # `cancel_batch` closes the batch, and raises all but a cancel of it
                self.steps.cancel_batch(phase, failure, CancelBatchException)
            if calls:  # before the loader draws the next batch, so that a checkpoint has the generators of this one
                self.dispatch.mailbox.empty()

    # --- one batch

    def step(self, phase: Phase, raw: Any) -> BatchState:
        """Run one batch outside of an epoch, in the mode of its phase, and return the state of the batch."""
        try:
            self.scopes.begin_call()  # so that a handler of this batch can start neither a fit nor another step
            with self.mode(phase):
                try:
                    self.steps.step_of(phase)(raw)
                    if self.scopes.batch:
                        raise CancelBatchException(LEFT_OPEN)
                except BaseException as failure:  # a cancel of the epoch ends the batch, since no epoch is open
                    self.steps.cancel_batch(phase, failure, CancelBatchException, CancelEpochException)
            detach_loss(self.state.batch)
            if self.dispatch.mailbox.calls:
                self.dispatch.mailbox.empty()
        finally:
            self.scopes.close_step()
        return self.state.batch


def _why_stopped(failures: list[BaseException], saved: Sequence[Place]) -> str:
    """Return why a cancel or an interrupt has ended a fit, and where, in one line; an empty string without one.

    Args:
        failures: The failures of the fit.
        saved: The checkpoints that an interrupt has taken. The interrupt gets a note that names them.
    """
    if not failures or not isinstance(failures[0], (CancelFittingException, KeyboardInterrupt)):
        return ""
    why = failures[0]
    if isinstance(why, KeyboardInterrupt) and saved:
        files = " and ".join(map(str, saved))
        why.add_note(f"saved in {files}: fit(..., resume={str(saved[0].parent)!r}) continues from there")
    text, notes = str(why), list(getattr(why, "__notes__", ()))
    if not text:
        return ", ".join([type(why).__name__, *notes])
    if not notes or re.search(r"\bepoch \d", text):  # a text that names the epoch says where it was
        return text
    return f"{text} ({'; '.join(notes)})"
