"""The interface between a lane and the place where its handlers run.

`Transport` is the interface. `ThreadTransport` is the one for this process: the thread that works on the lane runs the
handlers, on the callbacks of the learner. The one for a cluster is in `flowtrain_dask.cluster.transport`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from flowtrain.callback.callback import Callback
from flowtrain_dask.lanes.gate import Gate
from flowtrain_dask.lanes.report import LaneCounts
from flowtrain_dask.lanes.work import BatchResult, Entry, Job, run_entries

__all__ = [
    "SLOW",
    "Abandoned",
    "LaneContext",
    "OnLoss",
    "ThreadTransport",
    "Transport",
]

OnLoss: TypeAlias = Literal["local", "raise"]
"""When the cluster of a lane is lost: ``"local"``: the lane continues in this process. ``"raise"``: it is an error."""


class Abandoned(Exception):
    """The lane is closed or is to stand still, so a transport has stopped waiting. The lane catches this."""


class LaneContext:
    """The gate and the counts of a lane, and whether its transport is to give up.

    Args:
        deadline: The moment of `time.monotonic` at which a transport gives up; ``None`` for none.

    Attributes:
        gate: Entered around everything that a fork must not interrupt.
        counts: The counts of the lane.
        closed: Whether the lane is closed.
        pausing: Whether the lane is to stand still after the event that is at work.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.gate = Gate()
        self.counts = LaneCounts()
        self.closed = False
        self.pausing = False
        self._deadline = deadline

    def is_stopped(self) -> bool:
        """Return whether a transport is to give up after the event that is at work."""
        return self.closed or self.pausing or (self._deadline is not None and time.monotonic() >= self._deadline)


class Transport(Protocol):
    """Runs the batches of one lane. All methods except `open` are called by one thread at a time.

    Attributes:
        linger: For how many seconds a lane lets events gather before it hands them over.
    """

    linger: float

    @property
    def largest(self) -> int:
        """How many bytes of events a batch may have, unless a single event is larger. The number may change."""
        ...

    @property
    def where(self) -> str:
        """Where the handlers run, for the report: ``"thread"``, or an address."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether the handlers run in another process, for which the calling thread waits."""
        ...

    def open(self, timeout: float) -> None:
        """Get ready, before training.

        Args:
            timeout: The most seconds that this may take.

        Raises:
            ExecutorError: The place where the handlers are to run cannot be used; the text says what to do.
        """

    def run_batch(self, entries: Sequence[Entry], context: LaneContext) -> BatchResult:
        """Run a batch, or the first part of it, and return the result. The lane hands over the rest again.

        The result may contain records of earlier entries once more; the lane drops these.

        Args:
            entries: The next entries, in order.
            context: The context of the lane.

        Raises:
            Abandoned: `LaneContext.is_stopped` returned ``True``.
        """
        ...

    def bring_state_back(self, context: LaneContext) -> None:
        """Give the callbacks of this process the attributes that they have after all entries so far.

        Raises:
            Abandoned: `LaneContext.is_stopped` returned ``True``.
        """

    def settle(self) -> Sequence[Entry]:
        """Give the callbacks of this process a state that they had, without asking anyone, while the lane stands still.

        Returns:
            The entries that were processed since that state.
        """
        ...

    def close(self) -> None:
        """Give back all resources."""


_SECONDS = 1.0
"""How long `run_batch` runs further events before it returns, so that the records of the first ones are written."""


SLOW = 0.002
"""Seconds. Events in this process that take at least so long each are processed as they come."""


class ThreadTransport:
    """Runs the batches of one lane on the calling thread.

    Args:
        job: The job of the lane.
        callbacks: The callbacks of the lane.
        linger: For how many seconds a lane lets events gather. Without it, each wake-up would slow training down.
            Events that take at least `SLOW` seconds each do not gather: a wake-up is a small part of their time, and a
            short fit would wait for them at its end. Nor does the first event, which shows how long events take.
    """

    where = "thread"
    is_remote = False

    def __init__(self, job: Job, callbacks: Sequence[Callback], linger: float = 0.05) -> None:
        self.linger = 0.0
        self._linger = linger
        self.largest = 8 << 20
        self._job = job
        self._callbacks = callbacks

    def open(self, timeout: float) -> None:
        """Do nothing: there is nothing to open."""

    def run_batch(self, entries: Sequence[Entry], context: LaneContext) -> BatchResult:
        """Run a batch, until the lane is to stop or it is time to write records."""
        begin = time.monotonic()
        end = begin + _SECONDS

        def enough() -> bool:
            """Return whether to hand the records over now."""
            return time.monotonic() >= end or context.is_stopped()

        # The handlers are not seeded: a thread beside training must leave the generators of the process alone.
        result = run_entries(self._callbacks, self._job, entries, self._job.run, self._job.lane, context.gate, enough)
        slow = time.monotonic() - begin >= SLOW * max(1, result.done)
        self.linger = 0.0 if slow else self._linger
        return result

    def bring_state_back(self, context: LaneContext) -> None:
        """Do nothing: the handlers have changed the callbacks themselves."""

    def settle(self) -> Sequence[Entry]:
        """Return no entry: the handlers have changed the callbacks themselves."""
        return ()

    def close(self) -> None:
        """Do nothing: there is nothing to close."""
