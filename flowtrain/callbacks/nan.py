"""StopOnNaNLoss: end training when the loss is NaN."""

from __future__ import annotations

import warnings

from flowtrain.access import Access, Read
from flowtrain.callback import Callback, on
from flowtrain.events import BackwardBegin
from flowtrain.phases import AbstractTrainingPhase
from flowtrain.protect import LearnerView
from flowtrain.signals import CancelFittingException

__all__ = ["StopOnNaNLoss"]


class StopOnNaNLoss(Callback):
    """End training, with a warning that says where, before a NaN loss reaches the gradients.

    Raises `CancelFittingException` at `BackwardBegin`, so the parameters stay what they were after the last update.
    A phase of one's own that has no ``batch.loss`` is not watched.
    """

    def state_access(self) -> Access:
        return {"batch.loss": Read(optional=True), "cbstate.history": Read(optional=True)}

    @on(BackwardBegin, AbstractTrainingPhase)
    def check(self, event: BackwardBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """End training if the loss is NaN."""
        loss = learner.batch.loss
        if loss is None:
            return
        value = loss.item()
        if value == value:  # the one value that does not equal itself is NaN
            return
        history = learner.cbstate.history
        where = f" of {phase!r}"
        if history is not None:
            counts = history[phase]
            where = f" in batch {counts.steps_epoch + 1} of epoch {counts.epochs + 1}{where} (step {counts.steps + 1})"
        message = f"The loss is NaN{where}. Training stops before the update."
        warnings.warn(
            f"{message} Look for a learning rate that is too high, a division by zero, or NaN in the data.",
            RuntimeWarning,
            stacklevel=2,
        )
        raise CancelFittingException(message)
