"""A lane's thread: what it does with the events that wait, and what it shares with the training thread.

It sleeps until there is something to do, lets events gather during the linger, and hands them to the transport as one
batch. It writes the records of the result, counts what is done, and takes the next batch.

What both threads look at are plain attributes, each number counted by one of them only: the training thread reads how
far the lane is without a lock, and without a call. A failure is the exception. Entries behind it are counted as skipped
by whichever thread is there first, so that takes a lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Literal

from flowtrain.callback.events import FitEnd
from flowtrain.logging.backend import deliver
from flowtrain_dask.lanes.gate import Gate
from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.transport import Abandoned, Transport
from flowtrain_dask.lanes.work import Entry, Job, Outcome, Record

__all__ = ["Batches", "Driver", "OnError"]

OnError = Literal["raise", "warn"]

_logger = logging.getLogger("flowtrain")

_TOGETHER = 256
"""Records that are written at once, at most: a lane that is abandoned writes no more than these."""

_FIRST = 64
_EVENTS = 4096
_SECONDS = 1.0
"""The most that one batch takes: of events (also before it is known how long one takes), and expected time."""


class Batches:
    """Takes batches from the front of a queue, whose end belongs to another thread.

    A batch should not take much longer than a second, and not hold much of what the lane may hold: a copy of it may go
    on its way, its snapshots are lent until all of it is done, and its records come all at once. How long an event
    takes is known from the batch before.

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


class Driver:
    """Has the events of one lane processed, in a thread that the lane starts.

    Args:
        job: What the lane is there for.
        transport: Runs its batches.
        limit_bytes: What the entries of the lane may hold.
        hurry: How many waiting events end the linger.
        surface: Takes a callable that raises a failure, to be called by the training thread soon.
        on_error: ``"raise"``, or ``"warn"``: a failure is logged, and the lane retires.

    Attributes:
        queue: The entries that wait; the training thread puts them at its end.
        batches: Takes them from its front.
        put: How many entries there were, counted by the training thread; `put_bytes` is what they hold.
        done: How many are done with, counted by the lane's thread; `done_bytes` is what they held.
        collected: The state after this many entries is at home.
        failure: What waits to be raised by the training thread.
        rush: Whether the training thread waits for all that was put, and for the state.
        refuses: Whether the lane takes nothing: it is closed or retired.
        retired: Whether a failure took it out of service.
        closed: Whether the thread is to end.
        abandoned: Whether what a handler still gives comes too late: the sinks are being closed.
        asleep: Whether who puts something has to wake the thread, or to start it.
        taken: When the last batch was.
        wake: Ends a wait of the thread.
        gate: Makes the thread stand still.
        tally: What else is counted.
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        limit_bytes: int,
        hurry: int,
        surface: Callable[[Callable[[], None]], None],
        on_error: OnError,
    ) -> None:
        self._name = job.lane
        self._transport = transport
        self._sinks = job.backends
        self._hurry = hurry
        self._surface = surface
        self._on_error = on_error
        self.queue: deque[Entry] = deque()
        self.batches = Batches(self.queue, limit_bytes, transport.largest)
        self._flight: Sequence[Entry] = ()  # taken from the queue and not done
        self.put = self.put_bytes = 0
        self.done = self.done_bytes = 0
        self.collected = 0
        self._written = 0  # records of entries before this one are in the sink
        self.failure: BaseException | None = None
        self._failing = threading.Lock()  # held while a failure comes, is raised, or has entries skipped
        self.rush = self.refuses = self.retired = self.closed = self.abandoned = False
        self.asleep = True
        self.taken = 0.0
        self.wake = threading.Event()
        self.gate = Gate()
        self.tally = Tally()

    # --- the training thread

    def raise_failure(self) -> None:
        """Raise the failure that waits to be raised, if there is one; the lane then goes on with what is put next."""
        failure = self.failure
        if failure is None:
            return
        with self._failing:  # the lane's thread counts nothing meanwhile
            self._skip()
            self.failure = None  # from here on nothing is skipped
        try:
            raise failure
        finally:
            del failure

    def end(self) -> None:
        """Let the thread end after the event that is at work."""
        self.closed = self.refuses = True
        self.wake.set()

    def orphan(self) -> None:
        """Be the copy in a forked child, where nobody holds its locks any more: take nothing, write nothing."""
        self.closed = self.refuses = True
        self.gate, self._failing = Gate(), threading.Lock()
        self.wake = threading.Event()
        self._transport.close()
        self.queue.clear()
        self.done, self.done_bytes = self.put, self.put_bytes
        for backend in {id(one): one for backends in self._sinks for one in backends}.values():
            state = backend.__getstate__()
            if isinstance(state, dict):
                vars(backend).update(state)

    # --- the lane's thread

    def drive(self) -> None:
        """Process what is put, until the lane is closed."""
        try:
            while self._wait():
                try:
                    self._round()
                except Abandoned:
                    return
                except BaseException as failure:  # a sink that is full, a cluster that is gone: the lane must tell
                    self._fail(failure)
        finally:
            self._transport.close()

    def _wait(self) -> bool:
        """Sleep until there is something to do and the linger is over; return whether to go on.

        The linger begins with the first event that waits, which came after the last batch was taken.
        """
        begin = self.taken
        while not self.closed and not self.queue and not self._wants_home():
            self.wake.clear()
            self.asleep = True
            if not self.queue and not self.closed and not self._wants_home():
                self.wake.wait()
            self.asleep = False
            begin = time.monotonic()
        end = begin + self._transport.linger
        while not self.closed and not self._is_pressed():
            self.wake.clear()
            left = end - time.monotonic()
            if left <= 0:
                break
            if not self._is_pressed():
                self.wake.wait(left)
        return not self.closed

    def _is_pressed(self) -> bool:
        """Return whether there is no time to linger."""
        if self.rush or len(self.queue) >= self._hurry:
            return True
        return self.put_bytes - self.done_bytes >= self.batches.largest

    def _wants_home(self) -> bool:
        return self.rush and self.collected < self.put

    def _round(self) -> None:
        batch: Sequence[Entry] = ()
        with self._failing:
            if self.failure is not None or self.retired:
                self._skip()
            else:
                batch = self._flight = self.batches.take()
                self.taken = time.monotonic()
        if batch:
            begin = time.monotonic()
            outcome = self._transport.process(batch, self.gate, self._is_closed, self.tally)
            self.batches.fill(self._transport.largest)
            self.batches.took(time.monotonic() - begin, max(1, outcome.done))
            self._accept(batch, outcome)
        elif self.rush:
            done = self.done
            try:
                self._transport.collect(self._is_closed, self.tally)
            finally:  # what cannot be brought home now is not asked for again and again
                self.collected = done
                self.rush = False

    def _accept(self, batch: Sequence[Entry], outcome: Outcome) -> None:
        """Write the records of a result, each sequence number's once, and count what is done with."""
        done, rest = batch[: outcome.done], batch[outcome.done :]
        try:
            with self.gate:
                self._write([record for record in outcome.records if record[0] >= self._written])
        finally:
            self._written = done[-1].sequence + 1 if done else self._written
            self.done_bytes += sum(entry.nbytes for entry in done)
            self.done += len(done)
            self._flight = rest
        if outcome.failure is not None:
            self._fail(outcome.failure[1])
        else:
            self._flight = ()
            self.batches.put_back(rest)

    def _write(self, records: Sequence[Record]) -> None:
        """Write records; a sink that fails gets nothing more, and keeps nothing from the others."""
        failures: dict[int, Exception] = {}
        for start in range(0, len(records), _TOGETHER):
            for callback, own in groupby(records[start : start + _TOGETHER], itemgetter(1)):
                if self.abandoned:
                    return
                written = [(position, data) for _, _, position, data in own]
                deliver(self._sinks[callback], written, failures)
                self.tally.records += len(written)
        if failures:
            raise next(iter(failures.values()))

    def _fail(self, failure: BaseException) -> None:
        """Hand a failure to the training thread, or log it and retire."""
        text = f"{type(failure).__name__}: {failure}"
        if self._on_error == "warn":
            notes = "; ".join(getattr(failure, "__notes__", ()))
            _logger.warning(
                "flowtrain retires lane %s, its callbacks see no more events: %s (%s)", self._name, text, notes
            )
            self._retire(text)
            self._skip()
            return
        self.tally.last_error = text
        with self._failing:  # what the training thread puts after it has raised the failure is not skipped
            self.failure = failure
            self._skip()
        self._surface(self.raise_failure)

    def _retire(self, why: str) -> None:
        """Take no more events; what waits is dropped."""
        self.refuses = self.retired = True
        self.tally.last_error = why
        self.wake.set()

    def _skip(self) -> None:
        """Count what waits as skipped, all but `FitEnd`: that one runs for every callback, whatever failed."""
        skipped, kept = list[Entry](), list[Entry]()
        for entry in (*self._flight, *self.batches.drain()):
            (kept if isinstance(entry.event, FitEnd) and not self.retired else skipped).append(entry)
        self._flight = ()
        self.batches.put_back(kept)
        self.tally.skipped += len(skipped)
        self.done_bytes += sum(entry.nbytes for entry in skipped)
        self.done += len(skipped)

    def _is_closed(self) -> bool:
        return self.closed
