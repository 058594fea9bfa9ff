"""StopOnNaNLoss: end training when the loss is NaN."""

from __future__ import annotations

import warnings

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BackwardBegin, EpochBegin, EpochCancelled, EpochEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import CancelFittingException
from flowtrain.state.device_values import Lagged

__all__ = ["StopOnNaNLoss"]


class StopOnNaNLoss(Callback):
    """End training when the loss of a batch is NaN, with a warning that names the batch.

    On the CPU it raises `CancelFittingException` at `BackwardBegin` of that batch, so the parameters stay as the last
    update left them. A user's phase without ``batch.loss`` is not watched.

    On an accelerator reading the loss would make the host wait, so the loss is read ``TorchCore(lag=2)`` batches late,
    and training ends that many batches later, or with the epoch. The effect of the NaN until then depends on the
    optimizer. An optimizer that takes ``found_inf`` (torch's fused optimizers, which are the default there, and any
    optimizer with ``precision="fp16"``) skips the update with the NaN and all later ones, so the parameters are the
    same as on the CPU. Any other optimizer makes up to `lag` + 1 updates with NaN, and the parameters are lost: resume
    from a checkpoint.

    Reads ``batch.loss``, so it runs after callbacks that write it, and ``cbstate.history``, if a callback writes it,
    for the message. Writes no state. Costs one read of a number for each batch.

    >>> import torch
    >>> from flowtrain.testing import tiny_learner
    >>> nowhere = (torch.full((8, 1), float("nan")), torch.zeros(8, 1))
    >>> learner = tiny_learner(StopOnNaNLoss(), data=[nowhere])
    >>> with warnings.catch_warnings(action="ignore"):
    ...     history = learner.fit(1)
    >>> print(learner.stopped)
    The loss is NaN in batch 1 of epoch 1 of TrainingPhase (step 1). Training stops before the update.
    """

    stops_at_nan = True
    ranks = "every"  # each rank has a loss of its own
    may_cancel = False  # it cancels no batch: ranks that accumulate gradients end the fit with the last of the group

    def __init__(self) -> None:
        self._late: Lagged | None = None  # the losses that are read late; None if losses are read at once

    def state_access(self) -> Access:
        """Declare a read of the loss and of the counts, which a phase or a learner need not have."""
        return {"batch.loss": Read(optional=True), "cbstate.history": Read(optional=True)}

    @on(EpochBegin, AbstractTrainingPhase, access={})
    def begin(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Choose whether the losses of this epoch are read late."""
        self._late = Lagged(learner.lag) if learner.lag else None

    @on(BackwardBegin, AbstractTrainingPhase)
    def check(self, event: BackwardBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """End training if the loss of this batch is NaN, or the loss that is read late."""
        loss = learner.batch.loss
        if loss is None:
            return
        if self._late is not None:
            seen = self._late.push(loss, _where(phase, learner))
            if seen is not None and seen[1] != seen[1]:  # NaN is not equal to itself
                _stop(seen[0], late=True)
            return
        value = loss.item()
        if value == value:
            return
        _stop(_where(phase, learner), late=False)

    @on(EpochEnd, AbstractTrainingPhase, access={})
    def end(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Check the last losses of the epoch, which have not been read yet."""
        late, self._late = self._late, None
        for where, value in late.flush() if late is not None else ():
            if value != value:
                _stop(where, late=True)

    @on(EpochCancelled, AbstractTrainingPhase, access={})
    def cancel(self, event: EpochCancelled, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Forget the losses that have not been read yet."""
        self._late = None


def _where(phase: Phase, learner: LearnerView) -> str:
    rank = f" on rank {learner.rank}" if learner.world_size > 1 else ""
    history = learner.cbstate.history
    if history is None:
        return f" of {phase!r}{rank}"
    counts = history[phase]
    batch, epoch, step = counts.steps_epoch + 1, counts.epochs + 1, counts.steps + 1
    return f" in batch {batch} of epoch {epoch} of {phase!r} (step {step}){rank}"


def _stop(where: str, *, late: bool) -> None:
    if late:
        message = f"The loss was NaN{where}. Training stops now, as losses of the device are read late."
    else:
        message = f"The loss is NaN{where}. Training stops before the update."
    warnings.warn(
        f"{message} Look for a learning rate that is too high, a division by zero, or NaN in the data.",
        RuntimeWarning,
        stacklevel=3,
    )
    raise CancelFittingException(message)
