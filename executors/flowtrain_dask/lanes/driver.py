"""A lane's thread: it takes events from the queue in batches, has them processed, and writes their records.

The thread sleeps until there are events, lets more gather for a moment (the linger), and hands them to the transport as
one batch. It writes the records of the result, counts the events as done, and takes the next batch.

The training thread and the lane's thread share the attributes of a `Driver` without a lock. Each attribute has one
writer: the training thread appends to the queue, and the lane's thread alone takes entries from it and counts them. An
interrupt can come between any two instructions of the training thread, so it does not count the entries beside the
queue: their number is read from the last entry (`Driver.received`).

When a handler fails, the lane's thread skips the entries that the training thread has put before it raises the failure.
`raise_failure` only marks where these end (`Driver.resume_at`).
"""

from __future__ import annotations

import logging
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
from flowtrain_dask.lanes.work import BatchResult, Entry, Job, Record
from flowtrain_dask.parallel.threads import Wake

__all__ = ["Batches", "Driver", "OnError"]

OnError = Literal["raise", "warn"]
"""What happens when a deferred handler fails; see `flowtrain_dask.executor.DaskExecutor`."""

_logger = logging.getLogger("flowtrain")

_TOGETHER = 256
"""The most records that are written at once. A lane that is abandoned writes no more than these."""

_FIRST = 64
_EVENTS = 4096
_SECONDS = 1.0
"""The limits of a batch: the events of the first one, the events of any other, and its expected seconds."""


_sequence_of: Callable[[Record], int] = itemgetter(0)
_callback_of: Callable[[Record], int] = itemgetter(1)


class Batches:
    """The entries that wait in a lane, and how many of them are handed over at once.

    A batch should take about a second at most, and hold a small part of the bytes that the lane may hold: its bytes may
    be copied on the way, its snapshots stay in memory until all of it is done, and its records come all at once. The
    time of an event is known from the batch before.

    Args:
        queue: The entries that the training thread has put. Only this object takes entries from it.
        limit_bytes: How many bytes the entries of the lane may hold.
        largest: The bytes of a full batch, if the limit allows.

    Attributes:
        largest: The bytes of a full batch.
        taken: The number of entries that were taken from the queue, and their bytes.
    """

    def __init__(self, queue: deque[Entry], limit_bytes: int, largest: int = 8 << 20) -> None:
        self._queue = queue
        self._front: deque[Entry] = deque()  # taken from the queue, and not handed over
        self._limit_bytes = limit_bytes
        self.largest = 0
        self.fill(largest)
        self.taken = 0, 0
        self._pace = 0.0  # seconds for an event in the last batch

    def __len__(self) -> int:
        return len(self._front) + len(self._queue)

    def take(self) -> list[Entry]:
        """Take the next batch: all entries that wait, up to the limits of a batch, but at least one."""
        self._pull()
        # Until a batch has been timed, a small one is taken: many slow events in it would keep the first records back.
        most = min(_EVENTS, max(1, int(_SECONDS / self._pace))) if self._pace else _FIRST
        front, batch, size = self._front, list[Entry](), 0
        # An event that is larger than a full batch goes alone.
        while front and len(batch) < most and (not batch or size + front[0].nbytes <= self.largest):
            batch.append(front.popleft())
            size += batch[-1].nbytes
        return batch

    def fill(self, largest: int) -> None:
        """Set the bytes of a full batch: at most an eighth of the limit, because a batch may be copied on its way."""
        self.largest = min(largest, self._limit_bytes // 8)

    def took(self, seconds: float, events: int) -> None:
        """Learn how long a number of events took."""
        self._pace = seconds / events

    def put_back(self, rest: Sequence[Entry]) -> None:
        """Put the entries that a batch has not processed before all others."""
        self._front.extendleft(reversed(rest))

    def waiting(self) -> list[Entry]:
        """Return all entries that wait, while the lane's thread stands still."""
        return [*self._front, *self._queue]

    def drain(self) -> list[Entry]:
        """Take all entries that wait."""
        self._pull()
        drained = list(self._front)
        self._front.clear()
        return drained

    def _pull(self) -> None:
        queue = self._queue
        while queue:
            entry = queue[0]
            self.taken = entry.sequence + 1, entry.total  # first: `Driver.received` reads it if the queue is empty
            self._front.append(queue.popleft())


class Driver:
    """Has the events of one lane processed, on a thread that the lane starts.

    Args:
        job: The job of the lane.
        transport: Runs its batches.
        limit_bytes: How many bytes the entries of the lane may hold.
        hurry: How many waiting entries end the linger.
        surface: Called with a callable that raises a failure, which the training thread is to call soon.
        on_error: ``"raise"``, or ``"warn"``: a failure is logged, and the lane retires.

    Attributes:
        queue: The entries that wait. The training thread appends to it.
        batches: The entries that wait, as the lane's thread takes them.
        done: How many entries are done, whether run or skipped.
        done_bytes: How many bytes these held.
        collected: The callbacks of this process have the state after this many entries.
        failure: The failure that the training thread is to raise.
        resume_at: Entries before this one are skipped: they were put before the last failure was raised.
        rush: Whether the training thread waits until all entries are done and the callbacks have their state.
        refuses: Whether the lane takes no entries: it is closed or retired.
        retired: Whether a failure has taken the lane out of service.
        closed: Whether the thread is to end.
        abandoned: Whether nobody waits for the thread any more: the sinks are being closed, so it writes no records.
        pausing: Whether the thread is to stand still, as soon as the event that is at work is done.
        paused: Whether the thread stands still: records, counts and the state of the callbacks belong together.
        replayed: The entries whose records are in the sinks already, by their sequence numbers.
        asleep: Whether the thread must be woken, or started, when an entry is put.
        taken_at: When the last batch was taken.
        wake: Ends a wait of the thread.
        gate: Makes the thread stand still.
        tally: Further counts.
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
        self._in_flight: Sequence[Entry] = ()  # handed over and not done
        self.done = self.done_bytes = 0
        self.collected = 0
        self._written = 0  # the records of entries before this one are in the sink
        self.failure: BaseException | None = None
        self.resume_at = 0
        self._resumed_at = 0  # entries before this one have been skipped where they had to be
        self.rush = self.refuses = self.retired = self.closed = self.abandoned = False
        self.pausing = self.paused = self._gave_way = False
        self.replayed: set[int] = set()
        self.asleep = True
        self.taken_at = 0.0
        self.wake = Wake()
        self.gate = Gate()
        self.tally = Tally()

    # --- the training thread

    @property
    def received(self) -> tuple[int, int]:
        """How many entries have been put into the queue so far, and how many bytes they hold."""
        try:
            last = self.queue[-1]
        except IndexError:  # the lane's thread has taken all of them
            return self.batches.taken
        return last.sequence + 1, last.total

    @property
    def unrecorded(self) -> int:
        """The first entry whose records are not in the sinks, by its sequence number."""
        return self._written

    def raise_failure(self) -> None:
        """Raise the failure that is to be raised, if there is one. Entries that are put later are processed again."""
        failure = self.failure
        if failure is None:
            return
        self.resume_at = self.received[0]
        self.failure = None  # last: until then the lane's thread skips all entries
        try:
            raise failure
        finally:
            del failure

    def end(self) -> None:
        """Let the thread end after the event that is at work."""
        self.closed = self.refuses = True
        self.wake.set()

    def orphan(self) -> None:
        """Become the copy in a forked child, which has no lane's thread: take no entries, write no records."""
        self.closed = self.refuses = True
        self.gate, self.wake = Gate(), Wake()
        self._transport.close()
        self.done, self.done_bytes = self.received
        self.batches.drain()
        # A backend without its open files is like one that was never opened: it encodes records, and writes none.
        for backend in {id(one): one for backends in self._sinks for one in backends}.values():
            state = backend.__getstate__()
            if isinstance(state, dict):
                vars(backend).update(state)

    # --- the lane's thread

    def drive(self) -> None:
        """Process entries until the lane is closed."""
        try:
            while self._wait():
                try:
                    self._stand_still()
                    self._process_next()
                except Abandoned:
                    if not self._gave_way:
                        return
                    self._gave_way = False  # the thread is only to stand still: the batch is handed over again
                    self.batches.put_back(self._in_flight)
                    self._in_flight = ()
                except BaseException as failure:  # such as a full sink or a lost cluster: the training thread raises it
                    self._fail(failure)
        finally:
            self._transport.close()

    def _wait(self) -> bool:
        """Sleep until there is something to do and the linger is over; return whether the lane is still open.

        The linger begins with the first entry that waits. If the thread did not sleep, that entry came after the last
        batch was taken.
        """
        begin = self.taken_at
        while not self._is_stopped() and not self.batches and not self._must_collect():
            self.wake.clear()
            self.asleep = True
            # The queue is looked at again, because an entry that was put before `asleep` was set has woken nobody.
            if not self.batches and not self._is_stopped() and not self._must_collect():
                self.wake.wait()
            self.asleep = False
            begin = time.monotonic()
        end = begin + self._transport.linger
        while not self._is_stopped() and not self._must_hurry():
            self.wake.clear()
            left = end - time.monotonic()
            if left <= 0:
                break
            if not self._must_hurry():
                self.wake.wait(left)
        return not self.closed

    def _stand_still(self) -> None:
        """Stand still as long as the training thread wants it."""
        while self.pausing and not self.closed:
            self.wake.clear()
            self.asleep = self.paused = True
            if self.pausing and not self.closed:
                self.wake.wait()
        self.asleep = self.paused = False

    def _must_hurry(self) -> bool:
        """Return whether the linger is to end now."""
        if self.rush or len(self.batches) >= self._hurry:
            return True
        return self.received[1] - self.done_bytes >= self.batches.largest

    def _must_collect(self) -> bool:
        """Return whether the training thread waits for the state of the callbacks."""
        return self.rush and self.collected < self.received[0]

    def _process_next(self) -> None:
        """Process the next batch, skip entries after a failure, or bring the state of the callbacks back."""
        # No batch is taken between a failure and the moment at which the training thread has raised it.
        failing = self.failure is not None or self.retired
        if failing or self._resumed_at < self.resume_at:
            self._skip()
        batch: Sequence[Entry] = () if failing else self.batches.take()
        if batch:
            self._in_flight = batch
            self.taken_at = begin = time.monotonic()
            result = self._transport.process(batch, self.gate, self._is_stopped, self.tally)
            self.batches.fill(self._transport.largest)
            self.batches.took(time.monotonic() - begin, max(1, result.done))
            self._accept(batch, result)
        elif self.rush:
            done = self.done
            try:
                self._transport.collect(self._is_stopped, self.tally)
            finally:  # if the state cannot be brought back now, it is not asked for again and again
                self.collected = done
                self.rush = False

    def _accept(self, batch: Sequence[Entry], result: BatchResult) -> None:
        """Write the records of a result, those of each entry once, and count the entries that are done."""
        done, rest = batch[: result.done], batch[result.done :]
        try:
            # A fork must not copy a sink that is half written.
            with self.gate:
                self._write(
                    [
                        record
                        for record in result.records
                        if _sequence_of(record) >= self._written and _sequence_of(record) not in self.replayed
                    ]
                )
        finally:
            # Counted after a failed write too: the records of these entries may be in the sink in part, and a second
            # write would double them.
            self._written = done[-1].sequence + 1 if done else self._written
            self.done_bytes += sum(entry.nbytes for entry in done)
            self.done += len(done)
            self._in_flight = rest
        if result.failure is not None:
            self._fail(result.failure[1])
        else:
            self._in_flight = ()
            self.batches.put_back(rest)

    def _write(self, records: Sequence[Record]) -> None:
        """Write records. A sink that fails gets no more records; the other sinks get theirs."""
        failures: dict[int, Exception] = {}
        for start in range(0, len(records), _TOGETHER):
            for callback, own in groupby(records[start : start + _TOGETHER], _callback_of):
                if self.abandoned:
                    return
                written = [(position, data) for _, _, position, data in own]
                deliver(self._sinks[callback], written, failures)
                self.tally.records += len(written)
        if failures:
            raise next(iter(failures.values()))

    def _fail(self, failure: BaseException) -> None:
        """Hand a failure to the training thread, or log it and retire the lane."""
        if self._on_error == "warn":
            self.retire(failure)
            return
        self.tally.last_error = f"{type(failure).__name__}: {failure}"
        self.failure = failure
        self._skip()
        self._surface(self.raise_failure)

    def retire(self, failure: BaseException) -> None:
        """Log a failure, and take no more entries. Another thread may call this if the lane is empty."""
        self.tally.last_error = text = f"{type(failure).__name__}: {failure}"
        notes = "; ".join(getattr(failure, "__notes__", ()))
        _logger.warning("flowtrain retires lane %s, its callbacks see no more events: %s (%s)", self._name, text, notes)
        self.refuses = self.retired = True
        self._skip()

    def _skip(self) -> None:
        """Skip the entries that were put before the failure is, or was, raised.

        `FitEnd` is not skipped unless the lane has retired: it runs for every callback, whatever failed.
        """
        put, _ = self.received  # first: if the failure is still there after this, they were put before it is raised
        before = put if self.failure is not None or self.retired else self.resume_at
        skipped, kept = list[Entry](), list[Entry]()
        for entry in (*self._in_flight, *self.batches.drain()):
            runs = entry.sequence >= before or (isinstance(entry.event, FitEnd) and not self.retired)
            (kept if runs else skipped).append(entry)
        self._in_flight = ()
        self.batches.put_back(kept)
        self._resumed_at = before
        self.tally.skipped += len(skipped)
        self.done_bytes += sum(entry.nbytes for entry in skipped)
        self.done += len(skipped)

    def _is_stopped(self) -> bool:
        self._gave_way = self._gave_way or self.pausing  # the training thread may change its mind at once
        return self.closed or self.pausing
