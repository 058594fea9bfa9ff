"""Timer: where the time of training goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchBegin, BatchCancelled, BatchEnd, EpochBegin, EpochCancelled, EpochEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError

__all__ = ["Timer"]

_HISTORY: Access = {"cbstate.history": Read()}


class Timer(Callback):
    """Record in seconds how long epochs take, and in each batch the wait for data and the step.

    Writes three series to ``cbstate.tracehistory[phase]``, each at the number of batches completed:

    - ``"Time.Data"``: from the end of the batch before, or the begin of the epoch, to `BatchBegin`;
    - ``"Time.Step"``: from `BatchBegin` to `BatchEnd`;
    - ``"Time.Epoch"``: from `EpochBegin` to `EpochEnd`.

    Of a cancelled batch nothing is recorded; its time is in the epoch's. An epoch that an error or
    `CancelFittingException` ended has no time. The clock is the host's: work that a GPU still has to do counts where
    the host waits for it. Handlers count too, at `BatchBegin` and `BatchEnd` on the side on which they run.

    Reads ``cbstate.history``; so it runs after `Recorder`. Costs two readings of the clock and two numbers in memory
    for each batch, and no synchronisation with a GPU.

    Args:
        clock: Returns seconds.

    Raises:
        UsageError: `clock` cannot be called.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(Timer(), n_batches=4)
    >>> learner.fit(2)
    >>> series = learner.cbstate.tracehistory[TrainingPhase]
    >>> len(series["Time.Step"]), len(series["Time.Epoch"])
    (8, 2)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        if not callable(clock):
            raise UsageError(f"Timer(clock={clock!r}): clock is a function that returns seconds, as time.perf_counter.")
        self.clock = clock
        self._epoch = self._since = self._batch = math.nan

    @on(EpochBegin, access={})
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Begin the epoch, and the wait for its first batch."""
        self._epoch = self._since = self.clock()

    @on(BatchBegin, access={})
    def begin_batch(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        """End the wait, and begin the step."""
        self._batch = self.clock()

    @on(BatchEnd, access={**_HISTORY, "cbstate.tracehistory.Time": {"Data": Write(), "Step": Write()}})
    def end_batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the batch."""
        now = self.clock()
        step, series = learner.cbstate.history[phase].steps, learner.cbstate.tracehistory[phase]
        if self._since == self._since:  # NaN outside of an epoch: a batch of `Learner.step` waits for no loader
            series.push("Time.Data", self._batch - self._since, step)
            self._since = now
        series.push("Time.Step", now - self._batch, step)

    @on(BatchCancelled, access={})
    def cancel_batch(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        """Begin the wait for the batch after a cancelled one."""
        if self._since == self._since:
            self._since = self.clock()

    @on(EpochEnd, access={**_HISTORY, "cbstate.tracehistory.Time.Epoch": Write()})
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the epoch."""
        learner.cbstate.tracehistory[phase].push(
            "Time.Epoch", self.clock() - self._epoch, learner.cbstate.history[phase].steps
        )
        self._since = math.nan

    @on(EpochCancelled, access={})
    def cancel_epoch(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """Wait for no further batch."""
        self._since = math.nan
