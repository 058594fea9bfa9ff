"""The interface between a lane and the place where its handlers run.

`Transport` is the interface. `ThreadTransport` is the one for this process: the thread that works on the lane runs the
handlers, on the callbacks of the learner. The one for a cluster is in `flowtrain_dask.cluster.transport`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias

from flowtrain.callback.callback import Callback
from flowtrain.graph.clock import Clock, Mark
from flowtrain_dask.lanes.gate import Gate
from flowtrain_dask.lanes.report import LaneCounts
from flowtrain_dask.lanes.work import BatchResult, Entry, Job, leave_stamps, run_entries

__all__ = [
    "SLOW",
    "Abandoned",
    "ClockNow",
    "LaneContext",
    "OnError",
    "OnLoss",
    "ThreadTransport",
    "Transport",
]

OnError: TypeAlias = Literal["raise", "warn"]
"""What happens when a deferred handler fails; see `flowtrain_dask.executor.DaskExecutor`."""

OnLoss: TypeAlias = Literal["local", "raise"]
"""When the cluster of a lane is lost: ``"local"``: the lane continues in this process. ``"raise"``: it is an error."""


class Abandoned(Exception):
    """The lane is closed or is to stand still, so a transport has stopped waiting. The lane catches this."""


ClockNow: TypeAlias = Callable[[], Clock | None]
"""Returns the clock of the timeline that is written now; ``None`` without one."""

_SHORTEST_WAIT = 100_000
"""ns. A shorter wait for a lane is not in a timeline: most flushes find that all is done."""


class LaneContext:
    """The gate and the counts of a lane, its times for a timeline, and whether its transport is to give up.

    Args:
        deadline: The moment of `time.monotonic` at which a transport gives up; ``None`` for none.
        clock: Returns the clock of the timeline that is written now; ``None`` without one.

    Attributes:
        gate: Entered around everything that a fork must not interrupt.
        counts: The counts of the lane.
        closed: Whether the lane is closed.
        pausing: Whether the lane is to stand still after the event that is at work.
        timed: Whether the results are to have the times of handlers, for a timeline.
    """

    def __init__(self, deadline: float | None = None, clock: ClockNow = lambda: None) -> None:
        self.gate = Gate()
        self.counts = LaneCounts()
        self.closed = False
        self.pausing = False
        self.timed = False
        self._deadline = deadline
        self._clock = clock

    def pause(self) -> None:
        """Have the lane stand still after the event that is at work, until `go_on`."""
        self.pausing = True

    def go_on(self) -> None:
        """Let the lane process events again."""
        self.pausing = False

    def close(self) -> None:
        """Have the lane process nothing more, for good."""
        self.closed = True

    def become_forked_copy(self) -> None:
        """Be closed, with a gate that no thread has entered: a forked child has none of the threads."""
        self.close()
        self.gate = Gate()

    def is_stopped(self) -> bool:
        """Return whether a transport is to give up after the event that is at work."""
        return self.closed or self.pausing or (self._deadline is not None and time.monotonic() >= self._deadline)

    def run(self, transport: Transport, job: Job, entries: Sequence[Entry]) -> BatchResult:
        """Have a transport run a batch, and leave stamps of it and of its events if there is a clock."""
        clock = self._clock()
        self.timed = clock is not None
        begin = time.perf_counter_ns()
        result = transport.run_batch(entries, self)
        if clock is not None:
            leave_stamps(clock, job, entries, result, begin)
        return result

    def stalled(self, lane: str, callback: str, begin: int) -> None:
        """Count a wait of training for room, for an event of a callback; it began at a time in ns and ends now."""
        end = time.perf_counter_ns()
        self.counts.stalled(callback, (end - begin) * 1e-9)
        clock = self._clock()
        if clock is not None:
            clock.add(Mark(f"lane {lane} is full", "stall", {"callback": callback}), begin, end)

    @contextmanager
    def wait(self, name: str) -> Generator[None]:
        """Give a context in which a thread waits for the lane, which leaves a stamp if there is a clock."""
        begin = time.perf_counter_ns()
        yield
        end, clock = time.perf_counter_ns(), self._clock()
        if clock is not None and end - begin >= _SHORTEST_WAIT:
            clock.add(Mark(name, "stall"), begin, end)


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

    def restore_state(self) -> Sequence[Entry]:
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
        job = self._job
        result = run_entries(
            self._callbacks, job, entries, job.run, job.lane, context.gate, enough, timed=context.timed
        )
        slow = time.monotonic() - begin >= SLOW * max(1, result.done)
        self.linger = 0.0 if slow else self._linger
        return result

    def bring_state_back(self, context: LaneContext) -> None:
        """Do nothing: the handlers have changed the callbacks themselves."""

    def restore_state(self) -> Sequence[Entry]:
        """Return no entry: the handlers have changed the callbacks themselves."""
        return ()

    def close(self) -> None:
        """Do nothing: there is nothing to close."""
