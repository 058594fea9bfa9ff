"""Recorder: how far training is."""

from __future__ import annotations

from flowtrain.access import Access, Write
from flowtrain.callback import Callback, on
from flowtrain.events import BatchEnd, EpochBegin, EpochEnd, UpdateEnd
from flowtrain.phasemap import Counts
from flowtrain.phases import Phase
from flowtrain.protect import LearnerView

__all__ = ["Recorder"]


class Recorder(Callback):
    """Count epochs, batches and updates, for each phase: ``cbstate.history[phase]``, a `Counts`.

    Counted is what ended normally: a cancelled batch is no step; a cancelled epoch (`CancelEpochException`) is an
    epoch, one that an error or `CancelFittingException` ended is none. Several optimizers have an update each.
    """

    def state_access(self) -> Access:
        return {"cbstate.history": Write()}

    @on(EpochBegin)
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Begin to count the batches of an epoch."""
        history = learner.cbstate.history
        epochs, steps, _, updates = history[phase]
        history[phase] = Counts((epochs, steps, 0, updates))

    @on(BatchEnd)
    def count_batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Count a completed batch."""
        history = learner.cbstate.history
        epochs, steps, steps_epoch, updates = history[phase]
        history[phase] = Counts((epochs, steps + 1, steps_epoch + 1, updates))

    @on(UpdateEnd)
    def count_update(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        """Count an update."""
        history = learner.cbstate.history
        epochs, steps, steps_epoch, updates = history[phase]
        history[phase] = Counts((epochs, steps, steps_epoch, updates + 1))

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Count the epoch."""
        history = learner.cbstate.history
        epochs, steps, steps_epoch, updates = history[phase]
        history[phase] = Counts((epochs + 1, steps, steps_epoch, updates))
