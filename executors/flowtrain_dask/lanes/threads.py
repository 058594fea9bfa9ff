"""Lanes in this process: the lane's own thread runs the handlers, on the live callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flowtrain.callback import Callback
from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.work import Entry, Job, Outcome, run_entries

__all__ = ["ThreadTransport"]

_SECONDS = 1.0
"""How long records wait at most for those of later events, but for the event that is at work."""


class ThreadTransport:
    """Runs the batches of one lane on the thread that calls.

    Args:
        job: What the lane is there for.
        callbacks: The callbacks themselves.
        linger: For how many seconds a lane lets events gather; without it the wake-ups slow the training thread.
    """

    where = "thread"

    def __init__(self, job: Job, callbacks: Sequence[Callback], linger: float = 0.05) -> None:
        self.linger = linger
        self.largest = 8 << 20
        self._job = job
        self._callbacks = callbacks

    def open(self, timeout: float) -> None:
        """There is nothing to open."""

    def process(
        self, entries: Sequence[Entry], gate: AbstractContextManager[Any], closing: Callable[[], bool], tally: Tally
    ) -> Outcome:
        """Run a batch, or what of it is done when the lane is closed or records should be written."""
        end = time.monotonic() + _SECONDS

        def enough() -> bool:
            return time.monotonic() >= end or closing()

        return run_entries(self._callbacks, self._job, entries, self._job.run, self._job.lane, gate, enough)

    def collect(self, closing: Callable[[], bool], tally: Tally) -> None:
        """The state never left."""

    def close(self) -> None:
        """There is nothing to close."""
