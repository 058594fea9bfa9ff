"""Batches: how many of the entries that wait in a lane are handed over at once.

A batch should not take much longer than a second, and not hold much of what the lane may hold: a copy of it may go on
its way, its snapshots are lent until all of it is done, and its records come all at once. How long an event takes is
known from the batch before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from flowtrain_dask.lanes.work import Entry

__all__ = ["Batches"]

_FIRST = 64
_EVENTS = 4096
_SECONDS = 1.0
"""The most that one batch takes: of events (also before it is known how long one takes), and expected time."""


class Batches:
    """Takes batches from the front of a queue, whose end belongs to another thread.

    Args:
        queue: The entries that wait.
        limit_bytes: What the entries of the lane may hold.
        largest: The bytes of a full batch, if the limit allows.

    Attributes:
        largest: The bytes of a full batch.
    """

    def __init__(self, queue: deque[Entry], limit_bytes: int, largest: int = 8 << 20) -> None:
        self._queue = queue
        self._limit_bytes = limit_bytes
        self.largest = 0
        self.fill(largest)
        self._pace = 0.0  # seconds for an event, as of the last batch

    def take(self) -> list[Entry]:
        """Take the next batch: all that waits, but no more than what one batch should take; one entry at least."""
        most = min(_EVENTS, max(1, int(_SECONDS / self._pace))) if self._pace else _FIRST
        queue, batch, size = self._queue, list[Entry](), 0
        while queue and len(batch) < most and (not batch or size + queue[0].nbytes <= self.largest):
            batch.append(queue.popleft())
            size += batch[-1].nbytes
        return batch

    def fill(self, largest: int) -> None:
        """Let batches be of so many bytes: but a small part of the limit, since a batch is copied on its way."""
        self.largest = min(largest, self._limit_bytes // 8)

    def took(self, seconds: float, events: int) -> None:
        """Learn how long a number of events took."""
        self._pace = seconds / events

    def put_back(self, rest: Sequence[Entry]) -> None:
        """Let what a batch has left undone be the next."""
        self._queue.extendleft(reversed(rest))

    def drain(self) -> list[Entry]:
        """Take all that waits."""
        return [self._queue.popleft() for _ in range(len(self._queue))]
