"""Timer: how long epochs and batches take, and how long batches wait for data."""

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
    """Record how long epochs take, and for each batch the wait for data and the step, in seconds.

    Writes three series to ``cbstate.tracehistory[phase]``; the step of a value is the number of complete batches:

    - ``"Time.Data"``: from the end of the previous batch, or the beginning of the epoch, to `BatchBegin`;
    - ``"Time.Step"``: from `BatchBegin` to `BatchEnd`;
    - ``"Time.Epoch"``: from `EpochBegin` to `EpochEnd`.

    A cancelled batch records no time of its own; its time is part of the epoch's. An epoch that is ended by an error or
    `CancelFittingException` records no time. The clock is the clock of the host: the work of a GPU counts at the point
    where the host waits for it. Handlers count too: at `BatchBegin` and `BatchEnd` a handler that runs before this
    callback belongs to the time that ends there, a handler that runs after it to the time that begins. In a training of
    several ranks the times are those of the rank: a rank that is quick waits for the others within ``"Time.Step"``.

    Reads ``cbstate.history``, so it runs after `Recorder`. Costs two readings of the clock and two numbers in memory
    for each batch, and no synchronisation with a GPU.

    Args:
        clock: A function that returns a time in seconds.

    Raises:
        UsageError: `clock` cannot be called.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(Timer(), n_batches=4)
    >>> history = learner.fit(2)
    >>> series = learner.cbstate.tracehistory[TrainingPhase]
    >>> len(series["Time.Step"]), len(series["Time.Epoch"])
    (8, 2)
    """

    may_cancel = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        if not callable(clock):
            raise UsageError(f"Timer(clock={clock!r}): clock is a function that returns seconds, as time.perf_counter.")
        self.clock = clock
        # When the epoch began, the wait for a batch began, and the step began; NaN if there is no such time.
        self._epoch = self._since = self._batch = math.nan

    @on(EpochBegin, access={})
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Start the time of the epoch, and of the wait for its first batch."""
        self._epoch = self._since = self.clock()

    @on(BatchBegin, access={})
    def begin_batch(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        """Start the time of the step."""
        self._batch = self.clock()

    @on(BatchEnd, access={**_HISTORY, "cbstate.tracehistory.Time": {"Data": Write(), "Step": Write()}})
    def end_batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the times of the batch, and start the time of the wait for the next one."""
        now = self.clock()
        step, series = learner.cbstate.history[phase].steps, learner.cbstate.tracehistory[phase]
        if self._since == self._since:  # not NaN: `Learner.step` runs a batch outside of an epoch, without a wait
            series.push("Time.Data", self._batch - self._since, step)
            self._since = now
        series.push("Time.Step", now - self._batch, step)

    @on(BatchCancelled, access={})
    def cancel_batch(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        """Start the time of the wait for the next batch, after a cancelled one."""
        if self._since == self._since:
            self._since = self.clock()

    @on(EpochEnd, access={**_HISTORY, "cbstate.tracehistory.Time.Epoch": Write()})
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the time of the epoch."""
        learner.cbstate.tracehistory[phase].push(
            "Time.Epoch", self.clock() - self._epoch, learner.cbstate.history[phase].steps
        )
        self._since = math.nan

    @on(EpochCancelled, access={})
    def cancel_epoch(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """Stop the time of the wait, since a cancelled epoch has no further batch."""
        self._since = math.nan
