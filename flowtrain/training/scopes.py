"""Scopes: which of fit, epoch and batch are open, their numbers, and which exceptions have an effect there.

Every Begin gets exactly one End or Cancelled. A scope is *open* from before its Begin event on, it is *ending* while
its End or Cancelled event is fired, and *closed* after that event. A cancel has an effect only while its scope is open,
because a scope that is ending cannot be cancelled any more.

Scopes change through the methods here, with one exception: assignments that are made for every batch, since a method
call would cost more than the assignment. `flowtrain.training.step` sets `batch`, `backward` and `completed`, and the
loop sets `batch_number`.
"""

from __future__ import annotations

from flowtrain.callback.events import Event
from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.errors import CancelException, UsageError
from flowtrain.graph.plan import PlannedHandler
from flowtrain.state.batch import BatchState

__all__ = ["CLOSED", "ENDING", "OPEN", "Scopes"]

CLOSED, OPEN, ENDING = 0, 1, 2
"""The states of a scope (fit, epoch or batch). `CLOSED` is 0, so that the loop can test a scope by its truth value."""


class Scopes:
    """The open scopes of one learner.

    Attributes:
        fit: `CLOSED`, `OPEN` or `ENDING`.
        epoch: The state of the epoch, with the same three values.
        batch: The state of the batch, with the same three values.
        backward: Whether the backward pass of the open batch has begun.
        calling: Whether a single step or an event runs that a user has started outside of `fit` and `epoch`.
        completed: The state of the last complete batch of this epoch; ``None`` before the first.
        phase: The phase of the current epoch, or of the last one.
        epoch_number: The number of the current epoch of that phase, from 1.
        batch_number: The number of the current batch in that epoch, from 1.
        numbers: For each phase, how many of its epochs have begun.
        passes: For each phase that does not evaluate, how many passes over its data have begun.
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
        """Refuse cancels of the fit from now on: `FitEnd` is about to be fired."""
        self.fit = ENDING

    def close_fit(self) -> None:
        """Close the fit, with the epoch and the batch that may be open in it."""
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

        Passes are counted over the life of the learner. A pass of evaluation has the number of the pass of training
        before it, so that repeating an evaluation draws the same order of the data.
        """
        if isinstance(phase, AbstractValidationPhase):
            return max(self.passes.values(), default=1) - 1
        self.passes[phase] = self.passes.get(phase, 0) + 1
        return self.passes[phase] - 1

    def continue_epoch(self, batches: int) -> None:
        """Continue to count batches after the `batches` that a checkpoint had in this epoch."""
        self.batch_number = batches

    def end_epoch(self) -> None:
        """Refuse cancels of the epoch from now on: `EpochEnd` or `EpochCancelled` is about to be fired."""
        self.epoch = ENDING

    def close_epoch(self) -> None:
        """Close the epoch, and its batch if one is open."""
        self.epoch = self.batch = CLOSED

    def restore_numbers(self, numbers: dict[Phase, int], passes: dict[Phase, int]) -> None:
        """Continue to count epochs and passes from the numbers of a checkpoint."""
        self.numbers, self.passes = numbers, passes

    # --- batch

    def open_batch(self) -> None:
        """Begin a batch."""
        self.backward = False
        self.batch = OPEN

    def set_backward(self, begun: bool) -> None:
        """Say whether a cancel of the open batch discards gradients, as after the begin of its backward pass."""
        self.backward = begun

    def end_batch(self) -> None:
        """Refuse cancels of the batch from now on: `BatchEnd` or `BatchCancelled` is about to be fired."""
        self.batch = ENDING

    def close_batch(self, completed: BatchState | None = None) -> None:
        """Close the batch; `completed` is its state, unless it was cancelled."""
        self.batch = CLOSED
        if completed is not None:
            self.completed = completed

    def keep_entries(self, entries: frozenset[str] | None) -> None:
        """Set which entries of the last complete batch `release_completed` keeps; ``None`` for all."""
        self._kept = entries

    def release_completed(self) -> None:
        """Release the entries of the last complete batch that no handler will read, as the next batch begins.

        The last complete batch stays in memory, because `EpochEnd` shows it if the next batch is cancelled. A training
        loop written by hand frees the outputs of a batch when the next batch replaces them. To use no more memory than
        that on a device, only those entries stay that a handler declares which may run when the next batch is closed.
        """
        before, kept = self.completed, self._kept
        if before is not None and kept is not None:
            self.completed = BatchState()
            vars(self.completed).update({name: value for name, value in vars(before).items() if name in kept})

    # --- a step or an event outside of the loop

    def begin_call(self) -> bool:
        """Refuse to start training until `end_call`, because a single step or an event runs.

        Returns:
            The value to pass to `end_call`, which restores it: calls may be nested.
        """
        before, self.calling = self.calling, True
        return before

    def end_call(self, before: bool) -> None:
        """Restore the value that `begin_call` returned."""
        self.calling = before

    def close_step(self) -> None:
        """Close a single step, and its batch if one is open."""
        self.calling = False
        self.batch = CLOSED

    # --- exceptions

    def has_effect(self, failure: BaseException) -> bool:
        """Tell whether an exception of a handler has an effect: every error has, and a cancel of an open scope."""
        if not isinstance(failure, CancelException):
            return True
        if failure.scope == "batch":
            return self.batch == OPEN
        if failure.scope == "epoch":
            return self.epoch == OPEN
        # A cancel of the fit passes through a direct `epoch` or `step`, where no fit is open, to the caller.
        return self.fit != ENDING

    def note(self, failure: BaseException, planned: PlannedHandler, event: Event, phase: Phase) -> None:
        """Add a note to an exception that names the handler, event, phase, epoch and batch where it was raised."""
        where = f"in {planned.label} at ({type(event).__name__}, {phase!r})"
        if self.epoch != CLOSED:
            where += f", epoch {self.epoch_number}"
            if self.batch_number:
                where += f", batch {self.batch_number}"
        failure.add_note(f"raised {where}")

    def locate(self, failure: BaseException, phase: Phase, between: str = "") -> None:
        """Add a note to an error or interrupt that names its epoch and batch, unless a note of it names the epoch.

        Args:
            failure: The exception.
            phase: The phase of the epoch.
            between: ``"after "`` if the last batch is closed already, as when the loader has failed; otherwise empty.
        """
        epoch = f"epoch {self.epoch_number}"
        if self.epoch == CLOSED or isinstance(failure, CancelException):
            return
        if not any(epoch in note for note in getattr(failure, "__notes__", ())):
            batch = f", {between}batch {self.batch_number}" if self.batch_number else ""
            failure.add_note(f"in {phase!r}, {epoch}{batch}")

    def refuse_nested(self, what: str) -> None:
        """Refuse a call that starts training if training is running: the caller is a handler or a step then.

        Args:
            what: The call, for the message.

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
