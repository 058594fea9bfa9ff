"""GarbageCollect: Python's cyclic garbage collector runs between batches, not within them."""

from __future__ import annotations

import gc

from flowtrain.callback.access import Access, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.conditions import Every
from flowtrain.callback.events import BatchEnd, EpochBegin, EpochCancelled, EpochEnd, FitEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors.arguments import whole_number

__all__ = ["GarbageCollect"]


class GarbageCollect(Callback):
    """Turn Python's automatic garbage collection off during epochs, and collect every `every` batches.

    The automatic collection starts within a batch, whenever enough objects were made, and now and then it visits all
    objects, which takes long in a program with many imports. In distributed training the processes stop at different
    times, and each waits for the others. This callback collects young objects after every n-th batch, and all
    objects at the end of an epoch (https://docs.python.org/3/library/gc.html).

    When the epoch ends, normally or not, automatic collection is turned on again if it was on before.

    Reads and writes no state, and runs after no other callback; its resource is ``resource.gc``. Costs an addition for
    each batch, and the collections themselves.

    Args:
        every: Collect after the n-th, 2n-th, ... batch, counted for each phase.

    Raises:
        UsageError: `every` is no whole number, or below 1.

    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(GarbageCollect(every=10)).fit(1)
    """

    audited = False
    ranks = "every"  # each process has a collector of its own

    def __init__(self, every: int = 100) -> None:
        self.every = whole_number("GarbageCollect(): every", every)
        self.conditions = (Every(BatchEnd, self.every),)
        self._was_on = False

    def state_access(self) -> Access:
        """Declare the resource ``gc``, so that no other handler turns the collector on or off at the same time."""
        return {"resource.gc": Write()}

    @on(EpochBegin)
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Turn the automatic collection off."""
        self._was_on = gc.isenabled()
        gc.disable()

    @on(BatchEnd)
    def collect(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Collect the young objects after every n-th batch."""
        gc.collect(1)  # the two young generations: objects of many batches wait for the end of the epoch

    @on(EpochEnd)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Collect everything, and turn the automatic collection on again."""
        self._put_back()  # first, so that an interrupt during the collection does not leave it off
        gc.collect()

    @on(EpochCancelled)
    def cancel_epoch(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """Turn the automatic collection on again."""
        self._put_back()

    @on(FitEnd)
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Turn the automatic collection on again, if an interrupt has prevented it at the end of the epoch."""
        self._put_back()

    def _put_back(self) -> None:
        if self._was_on:
            gc.enable()
        self._was_on = False
