"""SmoothLoss: an exponential moving average of the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number

__all__ = ["SmoothLoss"]


class SmoothLoss(Callback):
    """Keep an exponential moving average of the training loss in ``cbstate.smooth_loss[phase]``.

    The average is corrected for its start at zero, as in Adam (https://arxiv.org/abs/1412.6980, section 3). In a
    training of several ranks it is that of the batches of the rank.

    Reads ``batch.loss`` and ``cbstate.history`` at `BatchEnd`, so it runs after `Recorder`. Writes
    ``cbstate.smooth_loss``. Costs a few operations on one number for each training batch; on an accelerator the average
    stays on the device, and the host does not wait for it.

    Args:
        beta: The share of the average that is kept at each batch, from 0 (no smoothing) to below 1.
        keep: How many of the newest averages to keep, so that memory and checkpoints stay small in a long run; all by
            default. Older averages are dropped once there are twice as many.

    Raises:
        UsageError: `beta` is out of this range, or `keep` is no number of values.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(SmoothLoss(beta=0.5), n_batches=4)
    >>> history = learner.fit(1)
    >>> len(learner.cbstate.smooth_loss[TrainingPhase])
    4
    """

    missing = "Its phases need a loss: put batch.loss into the batch in the step, or leave SmoothLoss out."

    def __init__(self, beta: float = 0.98, *, keep: int | None = None) -> None:
        if not is_a(beta, Real) or is_a(beta, bool) or not 0 <= beta < 1:
            raise UsageError(f"SmoothLoss(beta={beta!r}): beta is at least 0 and below 1, such as 0.98.")
        self.beta = beta
        self.keep = None if keep is None else whole_number("SmoothLoss(): keep", keep)
        self._averages: dict[str, tuple[Any, int]] = {}  # by phase: the average before correction, and its batches

    def state_access(self) -> Access:
        """Declare reads of the loss and of the counts, and a write of the averages."""
        return {"batch.loss": Read(), "cbstate.history": Read(), "cbstate.smooth_loss": Write()}

    @on(BatchEnd, AbstractTrainingPhase)
    def smooth(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Update the average with the loss of a batch."""
        average, count = self._averages.get(repr(phase), (0.0, 0))
        loss = learner.batch.loss
        if loss.is_cpu and not learner.lag:
            value = loss.item()
        else:  # a loss on a device gives an average on the device, so that the host does not wait for it
            value = loss.detach()
            if isinstance(average, float):  # beta times a float of a checkpoint would not be rounded to the loss's type
                average = torch.full_like(value, average)
        average = self.beta * average + (1 - self.beta) * value
        count += 1
        self._averages[repr(phase)] = average, count
        step = learner.cbstate.history[phase].steps
        series = learner.cbstate.smooth_loss[phase]
        series.push(average / (1 - self.beta**count), step)
        if self.keep is not None:
            series.shorten(self.keep)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by phase, each with the number of batches in it. This waits for the device."""
        return {"averages": {phase: (float(average), count) for phase, (average, count) in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._averages = {phase: (average, count) for phase, (average, count) in state["averages"].items()}
