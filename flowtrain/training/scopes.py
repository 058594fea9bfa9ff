"""Scopes: which of fit, epoch and batch are open, where training is, and what an exception means there.

Every Begin gets exactly one End or Cancelled. While a scope's End or Cancelled event is fired it is *closing*: a cancel
of that scope has nothing left to cancel then, and neither has a cancel of a scope that never opened.
"""

from __future__ import annotations

from flowtrain.callback.events import Event
from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.errors import CancelException, UsageError
from flowtrain.graph.plan import Step
from flowtrain.state.batch import BatchState
from flowtrain.training.step import CLOSED, CLOSING, OPEN

__all__ = ["Scopes"]


class Scopes:
    """The open scopes of one learner.

    Attributes:
        fit: `CLOSED`, `OPEN` or `CLOSING`.
        epoch: The same for the epoch.
        batch: The same for the batch.
        backward: Whether the backward pass of the open batch has begun.
        firing: Whether an event that was fired from outside of the loop is being handled.
        completed: The batch state of the last batch that was completed in this epoch.
        kept: The entries of it that are kept, on a device, when the next batch begins; ``None`` for all.
        phase: The phase of the current or last epoch.
        epoch_number: The number of the current epoch of that phase, from 1.
        batch_number: The number of the current batch in that epoch, from 1.
        numbers: The epochs of each phase that have begun.
        passes: The passes over the data of each phase that have begun, of the phases that do not evaluate.
    """

    __slots__ = (
        "backward",
        "batch",
        "batch_number",
        "completed",
        "epoch",
        "epoch_number",
        "firing",
        "fit",
        "kept",
        "numbers",
        "passes",
        "phase",
    )

    def __init__(self) -> None:
        self.fit = self.epoch = self.batch = CLOSED
        self.backward = False
        self.firing = False
        self.completed: BatchState | None = None
        self.kept: frozenset[str] | None = frozenset()
        self.phase: Phase = Phase()
        self.epoch_number = 0
        self.batch_number = 0
        self.numbers: dict[Phase, int] = {}
        self.passes: dict[Phase, int] = {}

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

    def hand_over(self) -> None:
        """Let go of what nobody will look at of the last completed batch, as the next one begins.

        It is kept in case the next one is cancelled, so that `EpochEnd` shows it. A loop written by hand gives the
        memory of the outputs back when the next batch has its own. On a device, where that is the memory there is
        least of, only those entries stay that a handler declares which may run when the next batch is closed.
        """
        before, kept = self.completed, self.kept
        if before is not None and kept is not None:
            self.completed = BatchState()
            vars(self.completed).update({name: value for name, value in vars(before).items() if name in kept})

    def means_something(self, failure: BaseException) -> bool:
        """Tell whether an exception from a handler has any effect: every error, and a cancel of an open scope."""
        if not isinstance(failure, CancelException):
            return True
        if failure.scope == "batch":
            return self.batch == OPEN
        if failure.scope == "epoch":
            return self.epoch == OPEN
        # A direct `epoch` or `step` lets the cancel of a fit through to its caller.
        return self.fit != CLOSING

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
        if self.fit == self.epoch == self.batch == CLOSED and not self.firing:
            return
        inside = "fit" if self.fit else f"an epoch of {self.phase!r}" if self.epoch else "a batch or an event"
        raise UsageError(
            f"{what} was called inside {inside}, from a handler or a step. Training is already running. In a handler "
            f"raise CancelBatchException, CancelEpochException or CancelFittingException, or fire an event; do the "
            f"rest after fit returns."
        )
