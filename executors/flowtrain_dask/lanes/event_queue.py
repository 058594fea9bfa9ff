"""The events of one lane that are not done, in order, and how many of them are handed over at once.

The training thread puts events at the end, and the thread that works on the lane does everything else. They share no
lock, and each attribute has one writer: an interrupt can come between any two instructions of the training thread. So
the training thread does not count events beside the queue: their number is read from the last one
(`EventQueue.received`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from flowtrain.callback.events import Event
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.work import Entry

__all__ = ["EventQueue"]

_FIRST = 64
_EVENTS = 4096
_SECONDS = 1.0
"""The limits of a batch: the events of the first one, the events of any other, and its expected seconds."""


class EventQueue:
    """The entries of a lane, from the moment when they are put until they are done.

    A batch should take about a second at most, and hold a small part of the bytes that the lane may hold: its bytes may
    be copied on the way, its snapshots stay in memory until all of it is done, and its records come all at once. The
    time of an event is known from the batch before.

    Args:
        limits: How many entries, and how many bytes of them, may wait.
        largest: The bytes of a full batch, if the limit allows.

    Attributes:
        largest: The bytes of a full batch.
        done: How many entries are done, whether run or skipped.
        done_bytes: How many bytes these held.
    """

    def __init__(self, limits: Limits, largest: int = 8 << 20) -> None:
        self._put: deque[Entry] = deque()
        self._front: deque[Entry] = deque()  # no longer in `_put`, and not at work
        self._at_work: Sequence[Entry] = ()
        self._taken = 0, 0  # the number of entries that have left `_put`, and their bytes
        self._limits = limits
        self.largest = 0
        self.fill(largest)
        self._pace = 0.0  # seconds for an event in the last batch
        self.done = self.done_bytes = 0

    # --- the training thread

    @property
    def received(self) -> tuple[int, int]:
        """How many entries have been put so far, and how many bytes they held."""
        try:
            last = self._put[-1]
        except IndexError:  # all of them have been taken
            return self._taken
        return last.sequence + 1, last.total

    def is_full(self, nbytes: int, number: int, total: int) -> bool:
        """Return whether there is no room for an entry. An empty lane has room for any, or it would wait for ever.

        Args:
            nbytes: The bytes of the entry.
            number: How many entries have been put so far; see `received`.
            total: How many bytes they held.
        """
        waiting, limits = number - self.done, self._limits
        return waiting > 0 and (waiting >= limits.pending or total - self.done_bytes + nbytes > limits.bytes)

    def put(self, entry: Entry) -> None:
        """Put an entry at the end. Its number and total follow from `received`."""
        self._put.append(entry)

    # --- both threads

    @property
    def nbytes(self) -> int:
        """How many bytes the entries hold that are not done."""
        return self.received[1] - self.done_bytes

    def numbers(self) -> tuple[int, int, int]:
        """Return how many entries have been put, how many of them are done, and the bytes of the others."""
        # The numbers of done entries are read first: the numbers of put entries, read later, are never smaller.
        done, done_bytes = self.done, self.done_bytes
        number, total = self.received
        return number, done, max(0, total - done_bytes)

    def __len__(self) -> int:
        return len(self._front) + len(self._put)

    @property
    def has_new(self) -> bool:
        """Whether entries have been put that neither `take` nor `skip` has looked at."""
        return bool(self._put)

    # --- the thread that works on the lane

    def take(self) -> Sequence[Entry]:
        """Take the next batch: all entries that wait, up to the limits of a batch, but at least one."""
        self._pull()
        # Until a batch has been timed, a small one is taken: many slow events in it would keep the first records back.
        most = min(_EVENTS, max(1, int(_SECONDS / self._pace))) if self._pace else _FIRST
        front, batch, size = self._front, list[Entry](), 0
        # An event that is larger than a full batch goes alone.
        while front and len(batch) < most and (not batch or size + front[0].nbytes <= self.largest):
            batch.append(front.popleft())
            size += batch[-1].nbytes
        self._at_work = batch
        return batch

    def fill(self, largest: int) -> None:
        """Set the bytes of a full batch: at most an eighth of the limit, because a batch may be copied on its way."""
        self.largest = min(largest, self._limits.bytes // 8)

    def took(self, seconds: float, events: int) -> None:
        """Learn how long a number of events took."""
        self._pace = seconds / events

    def finish(self, events: int) -> Sequence[Entry]:
        """Count the first events of the batch that is at work as done; return them."""
        done, self._at_work = self._at_work[:events], self._at_work[events:]
        self._count(done)
        return done

    def put_back(self) -> None:
        """Put the entries of the batch that are not done before all others."""
        self._front.extendleft(reversed(self._at_work))
        self._at_work = ()

    def skip(self, before: int, kept: type[Event] | None) -> list[Entry]:
        """Count entries as done that are not to run; return them.

        Args:
            before: Entries with smaller numbers are skipped.
            kept: The type of the events that run nevertheless; ``None`` for none.
        """
        self.put_back()
        self._pull()
        front, skipped = deque[Entry](), list[Entry]()
        for entry in self._front:
            runs = entry.sequence >= before or (kept is not None and isinstance(entry.event, kept))
            (front if runs else skipped).append(entry)
        self._front = front
        self._count(skipped)
        return skipped

    # --- while no thread works on the lane

    def waiting(self) -> list[Entry]:
        """Return all entries that wait."""
        return [*self._front, *self._put]

    def drain(self) -> list[Entry]:
        """Take all entries that wait. They are not counted as done."""
        self._pull()
        drained = list(self._front)
        self._front.clear()
        return drained

    def forget(self) -> None:
        """Count all entries as done, in a forked child that processes none."""
        self._at_work = ()
        self.done, self.done_bytes = self.received
        self.drain()

    def _pull(self) -> None:
        while self._put:
            entry = self._put[0]
            self._taken = entry.sequence + 1, entry.total  # first: `received` reads it if `_put` is empty
            self._front.append(self._put.popleft())

    def _count(self, entries: Sequence[Entry]) -> None:
        self.done_bytes += sum(entry.nbytes for entry in entries)
        self.done += len(entries)
