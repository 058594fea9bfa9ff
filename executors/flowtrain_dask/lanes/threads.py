"""The threads that work on lanes: few threads for many lanes.

There are as many threads as cores, and one more for each lane that waits most of its time, for a network or a disk. A
lane is worked on by one thread at a time, so its events keep their order whichever thread that is.

One thread *leads*: it waits until a lane is due, and leaves with that lane, and the next free thread leads. Only the
leader looks at lanes and keeps the times at which they are due, so these need no lock.

An interrupt cannot break this: the training thread puts a lane into a queue of C (`LaneThreads.wake`), and starts a
thread if none leads. A lane that is in the queue twice is looked at twice, which does no harm.
"""

from __future__ import annotations

import contextlib
import threading
import time
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from typing import Protocol

from flowtrain.errors import UsageError
from flowtrain_dask.parallel.threads import cores, start

__all__ = ["MOST_THREADS", "LaneThreads", "Workable"]

MOST_THREADS = 32
"""How many threads there are at most, however many lanes wait."""

_STUCK = 2.0
"""Seconds after which a thread at work is taken for one that waits. A batch ends after about one second, so this is a
single event, whose handler may wait for an event of another lane."""

_LEAST = 1e-3
"""Seconds. Shorter work does not tell whether a lane waits."""


class Workable(Protocol):
    """A lane, as threads use it."""

    @property
    def name(self) -> str:
        """The name of the lane."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether the lane waits for another process while it is worked on."""
        ...

    def due(self) -> float | None:
        """Return when the lane is to be worked on, in seconds of `time.monotonic`; ``None``: not until it is woken."""

    def begin(self) -> bool:
        """Let the calling thread work on the lane, unless another one does; return whether it may."""
        ...

    def work(self) -> None:
        """Work on the lane for about a second at most. Nothing is raised."""


class LaneThreads:
    """The threads of the lanes of one learner. They start with the first event, and end with `close`.

    Args:
        computing: How many threads there are for lanes that compute; by default the number of cores.
    """

    def __init__(self, computing: int | None = None) -> None:
        self._computing = cores() if computing is None else computing
        self._woken: SimpleQueue[Workable | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._leading = threading.Lock()  # held by the leader
        self._lanes: set[Workable] = set()  # all that were ever woken
        self._waiting: set[Workable] = set()  # those of them that wait most of their time
        self._at_work: dict[int, tuple[Workable, float]] = {}  # by thread: its lane, and when it began
        # Only the leader uses these.
        self._number = count()
        self._queue: list[tuple[float, int, Workable]] = []  # a heap of the times at which lanes are due
        self._due: dict[Workable, float] = {}  # the times in it that count

    def __len__(self) -> int:
        return len(self._threads)

    def wake(self, lane: Workable) -> None:
        """Have a lane looked at. The training thread calls this, and may be interrupted anywhere."""
        self._lanes.add(lane)
        self._woken.put(lane)
        self.relieve()

    def relieve(self) -> None:
        """Start a thread if all are at work and there should be more: no thread leads then, and lanes are not seen."""
        if self._leading.locked() or len(self._at_work) < len(self._threads):
            return
        late = time.monotonic() - _STUCK
        stuck = sum(began < late for _, began in list(self._at_work.values()))
        if len(self._threads) < self._wanted(stuck):
            self._start()

    def lane_here(self) -> Workable | None:
        """Return the lane on which the calling thread works; ``None`` on any other thread."""
        found = self._at_work.get(threading.get_ident())
        return None if found is None else found[0]

    def check_no_lane_here(self) -> None:
        """Check that the calling thread works on no lane.

        Raises:
            UsageError: A handler of a lane calls this. It would wait for itself, or for a lane that waits for it.
        """
        if (here := self.lane_here()) is not None:
            raise UsageError(
                f"flush() in a deferred handler of lane {here.name} would wait for that handler itself. Call it "
                f"where training is run."
            )

    def close(self, timeout: float = 5.0) -> None:
        """End the threads, and wait until those have ended that work on no lane."""
        self._woken.put(None)
        if threading.current_thread() in self._threads:
            return
        end = time.monotonic() + timeout
        for thread in self._threads:
            while thread.ident not in self._at_work and _lives(thread) and time.monotonic() < end:
                time.sleep(0.001)
        # A lane refers to its threads, so they must not refer to it, or callbacks would live until the collector comes.
        for lanes in (self._lanes, self._waiting, self._queue, self._due):
            lanes.clear()
        with contextlib.suppress(Empty):
            while True:
                self._woken.get_nowait()
        self._woken.put(None)  # for a thread that is at work

    def _start(self) -> None:
        self._threads.append(start(self._serve, f"flowtrain lanes_{len(self._threads)}"))

    def _wanted(self, stuck: int = 0) -> int:
        """Return how many threads there should be, if some of them are stuck in one event."""
        return min(MOST_THREADS, len(self._lanes), self._computing + len(self._waiting) + stuck)

    def _serve(self) -> None:
        """Be one of the threads."""
        here = threading.get_ident()
        while (lane := self._lead(here)) is not None:
            began, computed = time.monotonic(), time.thread_time()
            lane.work()
            took, computed = time.monotonic() - began, time.thread_time() - computed
            del self._at_work[here]
            # Among n threads that want the interpreter's lock all the time, one computes an n-th of the time. These
            # threads and the training thread are n; a lane that computes less than half of that waits for other things.
            if took >= _LEAST and not lane.is_remote:
                change = self._waiting.add if computed * 2 * (len(self._threads) + 1) < took else self._waiting.discard
                change(lane)
            self._woken.put(lane)
            del lane

    def _lead(self, here: int) -> Workable | None:
        """Wait until a lane is due, and return it to be worked on; ``None`` when the threads are to end."""
        with self._leading:
            while True:
                lane = self._next()
                if lane is None:
                    self._woken.put(None)  # for the next leader
                    return None
                if lane.is_remote:
                    self._waiting.add(lane)
                due = lane.due()
                if due is None:
                    self._due.pop(lane, None)
                elif due > time.monotonic():
                    if self._due.get(lane) != due:
                        self._due[lane] = due
                        heappush(self._queue, (due, next(self._number), lane))
                # If another thread works on the lane, that thread has the lane looked at again when it has ended.
                elif lane.begin():
                    self._at_work[here] = lane, time.monotonic()
                    # Without a free thread nobody would lead.
                    if len(self._at_work) == len(self._threads) < self._wanted():
                        self._start()
                    return lane

    def _next(self) -> Workable | None:
        """Return the next lane to look at: its time has come, or it was woken. ``None``: the threads are to end."""
        while self._queue:
            due, _, lane = self._queue[0]
            left = due - time.monotonic()
            if self._due.get(lane) == due and left > 0:
                try:
                    return self._woken.get(timeout=left)
                except Empty:
                    continue
            heappop(self._queue)
            if self._due.get(lane) == due:
                del self._due[lane]
                return lane
        return self._woken.get()


def _lives(thread: threading.Thread) -> bool:
    """Return whether a thread runs, or was started only now: `start` returns before the thread runs."""
    return thread.is_alive() or thread.ident is None
