"""Recorder: how far training is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowtrain.callback.access import Access, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchCancelled, BatchEnd, EpochBegin, EpochCancelled, EpochEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.state.by_phase import Counts, epoch_of

__all__ = ["Recorder"]


class Recorder(Callback):
    """Count epochs, batches and updates, for each phase: ``cbstate.history[phase]``, a `Counts`.

    Counted is what ended normally: a cancelled batch is no step; a cancelled epoch (`CancelEpochException`) is an
    epoch, one that an error or `CancelFittingException` ended is none. Several optimizers have an update each. The
    updates of a batch are added when it ends, also when it is cancelled after them; the update of a group that no batch
    has filled (rule 16) when the epoch ends.

    Writes ``cbstate.history``, so those that read it run after it. Reads nothing else, and runs after nothing. Costs
    three to four microseconds for each batch.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(Recorder(), n_batches=4)
    >>> learner.fit(2)
    >>> learner.cbstate.history[TrainingPhase]
    Counts(epochs=2, steps=8, steps_epoch=4, updates=8)

    Attributes:
        ends: For each phase, by name, where its epochs ended, in order: the number that the epoch has in
            ``cbstate.metrics_epoch``, and the batches that were completed by then, in this phase and in all training
            phases together. Plots are drawn by it.
    """

    def __init__(self) -> None:
        self.ends: dict[str, list[tuple[int, int, int]]] = {}
        self._updates = 0  # of the learner, as of the last batch that ended

    def state_access(self) -> Access:
        return {"cbstate.history": Write()}

    def setup(self, learner: LearnerView) -> None:
        """Count from here on."""
        self._updates = learner.updates

    @on(EpochBegin)
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Begin to count the batches of an epoch."""
        history = learner.cbstate.history
        epochs, steps, _, updates = history[phase]
        history[phase] = Counts((epochs, steps, 0, updates))
        self._updates = learner.updates

    @on(BatchEnd)
    def count_batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Count a completed batch."""
        history = learner.cbstate.history
        epochs, steps, steps_epoch, updates = history[phase]
        made = learner.updates
        history[phase] = Counts((epochs, steps + 1, steps_epoch + 1, updates + made - self._updates))
        self._updates = made

    @on(BatchCancelled)
    def keep_updates(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        """Add the updates of a batch that is no step."""
        self._add_updates(phase, learner)

    @on(EpochCancelled)
    def keep_last_updates(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """Add the update of a group that no batch has filled."""
        self._add_updates(phase, learner)

    def _add_updates(self, phase: Phase, learner: LearnerView) -> None:
        made = learner.updates
        if made != self._updates:
            history = learner.cbstate.history
            epochs, steps, steps_epoch, updates = history[phase]
            history[phase] = Counts((epochs, steps, steps_epoch, updates + made - self._updates))
            self._updates = made

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Count the epoch."""
        self._add_updates(phase, learner)
        history = learner.cbstate.history
        epochs, steps, steps_epoch, updates = history[phase]
        history[phase] = Counts((epochs + 1, steps, steps_epoch, updates))
        trained = sum(counts[1] for other, counts in history.items() if isinstance(other, AbstractTrainingPhase))
        self.ends.setdefault(repr(phase), []).append((epoch_of(history, phase), steps, trained))

    def state_dict(self) -> dict[str, Any]:
        """Return where epochs ended."""
        return {"ends": {phase: list(ends) for phase, ends in self.ends.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.ends = {}
        for phase, ends in state["ends"].items():
            if isinstance(ends, Mapping):  # a checkpoint of the first format has them by number
                ends = [(epoch, *counts) for epoch, counts in ends.items()]
            self.ends[phase] = [(epoch, own, trained) for epoch, own, trained in ends]
