"""The seam between a lane and the place where its handlers run.

Lanes in this process: the lane's own thread runs the handlers, on the live callbacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeAlias

from flowtrain.callback.callback import Callback
from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.work import Entry, Job, Outcome, run_entries

__all__ = [
    "Abandoned",
    "OnLoss",
    "ThreadTransport",
    "Transport",
]

OnLoss: TypeAlias = Literal["local", "raise"]
"""What happens to a lane when its cluster is lost: it goes on in this process, or that is an error."""


class Abandoned(Exception):
    """The lane is being closed, so a transport has stopped waiting. It never leaves the lane."""


class Transport(Protocol):
    """Runs batches somewhere. All but `open` is called by one thread, which is the lane's.

    Attributes:
        linger: For how many seconds a lane lets events gather before it hands them over.
    """

    linger: float

    @property
    def largest(self) -> int:
        """How many bytes of events it takes at once, if one of them is not more; that may change."""
        ...

    @property
    def where(self) -> str:
        """Where it runs them, for the report: ``"thread"``, or an address."""
        ...

    def open(self, timeout: float) -> None:
        """Get ready, before training.

        Raises:
            ExecutorError: It cannot; the text says what to do.
        """

    def process(
        self, entries: Sequence[Entry], gate: AbstractContextManager[Any], closing: Callable[[], bool], tally: Tally
    ) -> Outcome:
        """Run a batch, or the first part of it, and return what it gave; what is left is handed over again.

        Records of events that were handed back before may be among it.

        Args:
            entries: The next entries, in order.
            gate: To be held while something happens that a fork must not interrupt.
            closing: Whether to give up.
            tally: Where restarts and replays are counted.

        Raises:
            Abandoned: `closing` said so.
        """
        ...

    def collect(self, closing: Callable[[], bool], tally: Tally) -> None:
        """Bring the state home: the callbacks' attributes are those after all entries so far."""

    def close(self) -> None:
        """Give back what is held."""


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
