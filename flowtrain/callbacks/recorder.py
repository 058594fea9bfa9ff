"""Recorder: the numbers of epochs, batches and updates."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flowtrain.callback.access import Access, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchCancelled, BatchEnd, EpochBegin, EpochCancelled, EpochEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.state.by_phase import Counts, epoch_of

__all__ = ["Recorder"]


class Recorder(Callback):
    """Count epochs, batches and updates of each phase in ``cbstate.history[phase]``, a `Counts`.

    A cancelled batch does not count as a step. An epoch counts if it ends normally or by `CancelEpochException`, but
    not if an error or `CancelFittingException` ends it. Each update of each of several optimizers counts. The updates
    of a batch are added when the batch ends or is cancelled; the update of an accumulation group that the epoch has not
    filled (rule 16) is added when the epoch ends.

    In a training of several ranks each rank counts its own batches until the epoch ends. Then all ranks have the counts
    of the rank with the most: in an evaluation a rank may have fewer batches than another one, or none.

    Writes ``cbstate.history``, so callbacks that read it run after this one. Reads no other state, and runs after no
    other callback. Costs a few additions for each batch.

    Attributes:
        ends: For each phase by name, a tuple for the end of each epoch, in order: the number that the epoch has in
            ``cbstate.metrics_epoch``, the complete batches of this phase, and the complete batches and the updates of
            all training phases together. Plots use it to draw values of epochs and of batches on one axis, and
            `History` to say after which update an epoch ended.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(Recorder(), n_batches=4)
    >>> history = learner.fit(2)
    >>> learner.cbstate.history[TrainingPhase]
    Counts(epochs=2, steps=8, steps_epoch=4, updates=8)
    """

    def __init__(self) -> None:
        self.ends: dict[str, list[tuple[int, int, int, int]]] = {}
        self._packed: dict[str, array[int]] = {}  # the same numbers one after another, as a checkpoint has them
        self._updates = 0  # the updates of the learner at the end of the last batch
        self._phase: Phase | None = None  # the phase of the present epoch, or of one that was not complete
        self._counts: Callable[[Phase], Counts | None] = lambda phase: None  # returns the counts of a phase
        self._of_ranks: Sequence[Counts | None] = ()  # the counts of each rank in the present epoch

    def state_access(self) -> Access:
        """Declare a write of ``cbstate.history``."""
        return {"cbstate.history": Write()}

    def setup(self, learner: LearnerView) -> None:
        """Count the updates that the learner makes from now on, and keep a way to the counts for `rank_state`."""
        self._updates = learner.updates
        history = learner.cbstate.history
        self._counts = lambda phase: history[phase]  # a function, so that a copy of this callback copies no counts

    @on(EpochBegin)
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Set the number of batches in the epoch to 0."""
        history = learner.cbstate.history
        epochs, steps, _, updates = history[phase]
        history[phase] = Counts((epochs, steps, 0, updates))
        self._updates = learner.updates
        self._phase, self._of_ranks = phase, ()

    @on(BatchEnd)
    def count_batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Count a complete batch, and the updates that were made in it."""
        history = learner.cbstate.history
        epochs, steps, steps_epoch, updates = history[phase]
        made = learner.updates
        history[phase] = Counts((epochs, steps + 1, steps_epoch + 1, updates + made - self._updates))
        self._updates = made

    @on(BatchCancelled)
    def keep_updates(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        """Add the updates of a cancelled batch, which does not count as a step."""
        self._add_updates(phase, learner)

    @on(EpochCancelled)
    def keep_last_updates(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """Add the update of an accumulation group that a cancelled epoch has not filled."""
        self._add_updates(phase, learner)

    def _add_updates(self, phase: Phase, learner: LearnerView) -> None:
        made = learner.updates
        if made != self._updates:
            history = learner.cbstate.history
            epochs, steps, steps_epoch, updates = history[phase]
            history[phase] = Counts((epochs, steps, steps_epoch, updates + made - self._updates))
            self._updates = made

    def rank_state(self) -> Counts | None:
        """Return the counts of the phase of the present epoch."""
        return None if self._phase is None else self._counts(self._phase)

    def merge_ranks(self, states: Sequence[Counts | None]) -> None:
        """Keep the counts of all ranks for the end of the epoch."""
        self._of_ranks = states

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Count the epoch, and note the numbers of batches at its end."""
        history = learner.cbstate.history
        counted = [counts for counts in self._of_ranks if counts is not None]
        if counted:
            history[phase] = Counts(map(max, zip(*counted, strict=True)))
        self._phase, self._of_ranks = None, ()
        self._add_updates(phase, learner)
        epochs, steps, steps_epoch, updates = history[phase]
        history[phase] = Counts((epochs + 1, steps, steps_epoch, updates))
        trained = sum(counts[1] for other, counts in history.items() if isinstance(other, AbstractTrainingPhase))
        made = sum(counts[3] for counts in history.values())
        self._add_end(repr(phase), (epoch_of(history, phase), steps, trained, made))

    def _add_end(self, phase: str, end: tuple[int, int, int, int]) -> None:
        self.ends.setdefault(phase, []).append(end)
        self._packed.setdefault(phase, array("q")).extend(end)

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of batches at the ends of epochs; ``cbstate.history`` is in the checkpoint itself."""
        # Copied as memory: a run of millions of epochs has as many ends.
        ends = {phase: torch.frombuffer(array("q", row), dtype=torch.int64) for phase, row in self._packed.items()}
        return {"ends": {phase: numbers.view(-1, 4) for phase, numbers in ends.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.ends.clear()  # filled again, because a `History` may hold it
        self._packed.clear()
        for phase, ends in state["ends"].items():
            if isinstance(ends, torch.Tensor):
                ends = ends.tolist()
            elif isinstance(ends, Mapping):  # early checkpoints have a mapping from the number of the epoch
                ends = [(epoch, *counts) for epoch, counts in ends.items()]
            for epoch, own, trained, *made in ends:
                # Early checkpoints lack the updates: without accumulation there is one for each batch.
                self._add_end(phase, (epoch, own, trained, *(made or [trained])))
