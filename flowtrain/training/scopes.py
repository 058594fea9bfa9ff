"""Scopes: which of fit, epoch and batch are open, where training is, and what an exception means there.

Every Begin gets exactly one End or Cancelled. A scope is opened before its Begin is fired, *ends* while its End or
Cancelled is fired, and is closed after it. A cancel has an effect only while its scope is open: one that ends has
nothing left to cancel.

Scopes change through the methods here. The bundled steps alone set `batch`, `backward` and `completed` themselves
(`flowtrain.training.step`), since a call for each of them in every batch would cost more than what it does.
"""

from __future__ import annotations

from flowtrain.callback.events import Event
from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.errors import CancelException, UsageError
from flowtrain.graph.plan import Step
from flowtrain.state.batch import BatchState

__all__ = ["CLOSED", "ENDING", "OPEN", "Scopes"]

CLOSED, OPEN, ENDING = 0, 1, 2
"""Where a scope (fit, epoch, batch) is: it ends while its End or Cancelled event is fired."""


class Scopes:
    """The open scopes of one learner.

    Attributes:
        fit: `CLOSED`, `OPEN` or `ENDING`.
        epoch: The same for the epoch.
        batch: The same for the batch.
        backward: Whether the backward pass of the open batch has begun.
        calling: Whether a single step runs, or an event is handled that was fired outside of the loop.
        completed: The batch state of the last batch that was completed in this epoch.
        phase: The phase of the current or last epoch.
        epoch_number: The number of the current epoch of that phase, from 1.
        batch_number: The number of the current batch in that epoch, from 1.
        numbers: The epochs of each phase that have begun.
        passes: The passes over the data of each phase that have begun, of the phases that do not evaluate.
    """

    __slots__ = (
        "_kept",
        "backward",
        "batch",
        "batch_number",
        "calling",
        "completed",
        "epoch",
        "epoch_number",
        "fit",
        "numbers",
        "passes",
        "phase",
    )

    def __init__(self) -> None:
        self.fit = self.epoch = self.batch = CLOSED
        self.backward = False
        self.calling = False
        self.completed: BatchState | None = None
        self._kept: frozenset[str] | None = frozenset()
        self.phase: Phase = Phase()
        self.epoch_number = 0
        self.batch_number = 0
        self.numbers: dict[Phase, int] = {}
        self.passes: dict[Phase, int] = {}

    # --- fit

    def open_fit(self) -> None:
        """Begin a fit."""
        self.fit = OPEN

    def end_fit(self) -> None:
        """Let nothing cancel the fit any more: `FitEnd` is about to be fired."""
        self.fit = ENDING

    def close_fit(self) -> None:
        """Leave the fit, and whatever is open in it."""
        self.fit = self.epoch = self.batch = CLOSED

    # --- epoch

    def open_epoch(self, phase: Phase) -> None:
        """Begin an epoch of `phase`."""
        self.epoch = OPEN
        self.phase = phase
        self.numbers[phase] = self.epoch_number = self.numbers.get(phase, 0) + 1
        self.batch_number = 0
        self.completed = None

    def begin_pass(self, phase: Phase) -> int:
        """Begin a pass over the data of `phase`, and return its number, from 0.

        They are counted over the life of the learner. Evaluation has the number of the pass of training that it
        follows, so it is the same however often it is repeated.
        """
        if isinstance(phase, AbstractValidationPhase):
            return max(self.passes.values(), default=1) - 1
        self.passes[phase] = self.passes.get(phase, 0) + 1
        return self.passes[phase] - 1

    def continue_epoch(self, batches: int) -> None:
        """Count on from the batches that were run before the checkpoint from which this epoch is resumed."""
        self.batch_number = batches

    def end_epoch(self) -> None:
        """Let nothing cancel the epoch any more: `EpochEnd` or `EpochCancelled` is about to be fired."""
        self.epoch = ENDING

    def close_epoch(self) -> None:
        """Leave the epoch, and its batch if one is open."""
        self.epoch = self.batch = CLOSED

    def restore_numbers(self, numbers: dict[Phase, int], passes: dict[Phase, int]) -> None:
        """Count the epochs of each phase, and the passes over its data, on from those of a checkpoint."""
        self.numbers, self.passes = numbers, passes

    # --- batch

    def open_batch(self) -> None:
        """Begin a batch."""
        self.backward = False
        self.batch = OPEN

    def end_batch(self) -> None:
        """Let nothing cancel the batch any more: `BatchEnd` or `BatchCancelled` is about to be fired."""
        self.batch = ENDING

    def close_batch(self, completed: BatchState | None = None) -> None:
        """Leave the batch; `completed` is its state, if it was not cancelled."""
        self.batch = CLOSED
        if completed is not None:
            self.completed = completed

    def keep(self, entries: frozenset[str] | None) -> None:
        """Set which entries of the last completed batch `hand_over` keeps; ``None`` for all."""
        self._kept = entries

    def hand_over(self) -> None:
        """Release the entries of the last completed batch that no handler will read, as the next batch begins.

        The batch is kept in case the next one is cancelled, so that `EpochEnd` shows it. A loop written by hand
        releases the memory of the outputs when the next batch has its own. On a device, where memory is scarcest, only
        those entries stay that are declared by a handler which may run when the next batch is closed.
        """
        before, kept = self.completed, self._kept
        if before is not None and kept is not None:
            self.completed = BatchState()
            vars(self.completed).update({name: value for name, value in vars(before).items() if name in kept})

    # --- a step or an event outside of the loop

    def begin_call(self) -> bool:
        """Refuse to start training until `end_call` gets what this returns: a step runs, or an event is handled."""
        before, self.calling = self.calling, True
        return before

    def end_call(self, before: bool) -> None:
        """End what `begin_call` began."""
        self.calling = before

    def close_step(self) -> None:
        """Leave a single step, and its batch if one is open."""
        self.calling = False
        self.batch = CLOSED

    # --- what an exception means

    def means_something(self, failure: BaseException) -> bool:
        """Tell whether an exception from a handler has any effect: every error, and a cancel of an open scope."""
        if not isinstance(failure, CancelException):
            return True
        if failure.scope == "batch":
            return self.batch == OPEN
        if failure.scope == "epoch":
            return self.epoch == OPEN
        # A direct `epoch` or `step` lets the cancel of a fit through to its caller.
        return self.fit != ENDING

    def note(self, failure: BaseException, step: Step, event: Event, phase: Phase) -> None:
        """Write on an exception where it was raised."""
        where = f"in {step.label} at ({type(event).__name__}, {phase!r})"
        if self.epoch != CLOSED:
            where += f", epoch {self.epoch_number}"
            if self.batch_number:
                where += f", batch {self.batch_number}"
        failure.add_note(f"raised {where}")

    def locate(self, failure: BaseException, phase: Phase, between: str = "") -> None:
        """Write on an error, or an interrupt, in which epoch and batch it struck, unless its notes say so.

        Args:
            failure: What was raised.
            phase: The phase of the epoch.
            between: ``"after "`` where the last batch was closed already: then the loader failed, or the epoch itself.
        """
        epoch = f"epoch {self.epoch_number}"
        if self.epoch == CLOSED or isinstance(failure, CancelException):
            return
        if not any(epoch in note for note in getattr(failure, "__notes__", ())):
            batch = f", {between}batch {self.batch_number}" if self.batch_number else ""
            failure.add_note(f"in {phase!r}, {epoch}{batch}")

    def refuse_nested(self, what: str) -> None:
        """Raise if training is running already, because then a handler (or a step) is calling.

        Raises:
            UsageError: A scope is open, or an event is being handled.
        """
        if self.fit == self.epoch == self.batch == CLOSED and not self.calling:
            return
        inside = "fit" if self.fit else f"an epoch of {self.phase!r}" if self.epoch else "a batch or an event"
        raise UsageError(
            f"{what} was called inside {inside}, from a handler or a step. Training is already running. In a handler "
            f"raise CancelBatchException, CancelEpochException or CancelFittingException, or fire an event; do the "
            f"rest after fit returns."
        )
