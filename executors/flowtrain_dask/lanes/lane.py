"""A lane: where deferred events wait, and the thread that has them processed one at a time, in order.

The training thread puts an entry at the end (`Lane.put`); the lane's thread takes what has gathered during the linger,
hands it to the transport as one batch, writes the records of the result, and takes the next batch. There is never more
than one batch in flight, so batches size themselves: the slower a lane, the larger they get.

Every number is counted by one thread only: the training thread counts what it put, the lane's thread what is done.
So `put` takes no lock, and it wakes the lane's thread only if that sleeps. What waits for something looks again every
few milliseconds: a wait in a lock would not be interrupted by signals.

When a handler fails, the records before it are written first; then the failure is handed to the training thread
(`surface`), and the entries that were put until the training thread raises it are skipped, as they would not have
existed in place. What is put after that is processed, and `FitEnd` has its turn whenever it was put.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from flowtrain.errors import UsageError
from flowtrain.events import Event, FitEnd
from flowtrain.phases import Phase
from flowtrain.records import LoggerBackend, deliver
from flowtrain_dask.lanes.batches import Batches
from flowtrain_dask.lanes.forks import guard
from flowtrain_dask.lanes.gate import Gate
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import LaneReport, Tally
from flowtrain_dask.lanes.transport import Abandoned, Transport
from flowtrain_dask.lanes.work import Entry, Job, Outcome, Record

__all__ = ["Lane", "OnError"]

OnError = Literal["raise", "warn"]

_logger = logging.getLogger("flowtrain")

_TOGETHER = 256
"""Records that are written at once, at most: a lane that is abandoned writes no more than these."""
_POLL = 0.002
"""Seconds between two looks at something that is waited for."""


class Lane:
    """A bounded queue of events with a thread that has them processed.

    Args:
        job: What it is there for.
        transport: Runs its batches; opened already.
        sinks: For each callback its backends, which are open while there are entries.
        limits: How much may wait.
        surface: Takes a callable that raises a failure, to be called by the training thread soon.
        on_error: ``"raise"``, or ``"warn"``: a failure is logged, and the lane retires.
        stopping: Whether training is to end soon; then nothing waits for room any more.
        hurry: How many waiting events end the linger; half of what the limit allows if that is less.

    Attributes:
        given_up: Whether the training thread has stopped waiting for it.
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        sinks: Sequence[Sequence[LoggerBackend]],
        limits: Limits,
        *,
        surface: Callable[[Callable[[], None]], None],
        on_error: OnError = "raise",
        stopping: Callable[[], bool] = lambda: False,
        hurry: int = 4000,
    ) -> None:
        self.job = job
        self._transport = transport
        self._sinks = sinks
        self._limits = limits
        self._surface = surface
        self._on_error = on_error
        self._stopping = stopping
        self._hurry = max(1, min(hurry, limits.pending // 2))
        self._tally = Tally()
        self._queue: deque[Entry] = deque()
        self._batches = Batches(self._queue, limits.bytes, transport.largest)
        self._flight: Sequence[Entry] = ()  # taken from the queue and not done
        # The training thread's numbers, then the lane thread's.
        self._put = self._put_bytes = 0
        self._done = self._done_bytes = 0
        self._written = 0  # records of entries before this one are in the sink
        self._failure: BaseException | None = None
        self._failing = threading.Lock()  # held while a failure comes, is raised, or has entries skipped
        self._refuses = False  # closed or retired: `put` takes nothing
        self._retired = self._closed = self._abandoned = self._rush = False
        self._asleep = True  # `put` wakes the lane's thread, or starts it
        self._taken = 0.0  # when the last batch was
        self._collected = 0  # the state after this many entries is at home
        self.given_up = False
        self.gate = Gate()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        guard(self)

    # --- the training thread

    def put(self, duty: int, event: Event, phase: Phase, payload: Any, nbytes: int) -> bool:
        """Put an event at the end; wait for room if there is none. Called by the training thread only.

        Args:
            duty: The position of its handler in the job.
            event: The event.
            phase: The phase.
            payload: What the handler declared to read; nobody changes it any more.
            nbytes: How many bytes it holds that nobody else does.

        Returns:
            Whether the lane took it; otherwise it was dropped and counted.
        """
        number = self._put
        waiting = number - self._done
        if self._refuses or (waiting and self._is_full(waiting, nbytes)):
            if not self._make_room(self.job.duties[duty].name, nbytes):
                return False
            waiting = number - self._done
        self._queue.append(Entry(number, duty, event, phase, payload, nbytes))
        self._put_bytes += nbytes
        self._put = number + 1
        room = self._batches.largest - (self._put_bytes - self._done_bytes)
        if self._asleep or waiting + 1 == self._hurry or -nbytes < room <= 0:  # enough for a full batch, now
            self._wake_up()
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was put is done and the callbacks' state is at home.

        Args:
            timeout: The most seconds to wait; ``None`` for as long as it takes.

        Returns:
            Whether it is; ``False`` when the time was over. After a failure there is nothing left to do: see
            `raise_failure`.

        Raises:
            UsageError: A handler of the lane asks for it, and would wait for itself.
        """
        if self._thread is not None and self._thread is threading.current_thread():
            raise UsageError(
                f"flush() in a deferred handler of lane {self.job.lane} would wait for that handler itself. Call it "
                f"where training is run."
            )
        goal = self._put
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._refuses and (self._done < goal or self._collected < goal):
            self._rush = True
            self._wake_up()
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        return self._done >= goal

    @property
    def over(self) -> bool:
        """Whether nothing is to be waited for: a failure is to be raised first, or it takes no more events."""
        return self._failure is not None or self._refuses

    @property
    def idle(self) -> bool:
        """Whether nothing waits, to be processed or to be raised."""
        return self._failure is None and (self._refuses or self._done >= self._put)

    def raise_failure(self) -> None:
        """Raise the failure that waits to be raised, if there is one; the lane then goes on with what is put next."""
        failure = self._failure
        if failure is None:
            return
        with self._failing:  # the lane's thread counts nothing meanwhile
            self._skip()
            self._failure = None  # from here on nothing is skipped
        try:
            raise failure
        finally:
            del failure

    def close(self, timeout: float = 5.0) -> None:
        """End the lane's thread and give back what the transport holds; what has not been processed is dropped."""
        if self._closed:
            return
        self._closed = self._refuses = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            end = time.monotonic() + timeout
            while self._thread.is_alive() and time.monotonic() < end:
                self._thread.join(0.05)
            self._abandoned = True  # what its handler still gives comes too late: the sinks are being closed
        else:
            self._transport.close()
        self._drop_rest()

    def retire(self, why: str) -> None:
        """Take no more events; what waits is dropped."""
        self._refuses = self._retired = True
        self._tally.last_error = why
        self._wake.set()

    def report(self) -> LaneReport:
        """Return how it stands; callable from any thread at any time."""
        # What is done first: a number that is read later is never smaller.
        done, done_bytes = self._done, self._done_bytes
        return LaneReport(
            self.job.lane,
            self.job.callbacks,
            self._transport.where,
            self._put,
            done,
            max(0, self._put_bytes - done_bytes),
            self._retired,
            self._tally.copy(),
        )

    def orphan(self) -> None:
        """Be the copy in a forked child, which has no lane thread: take nothing, write nothing."""
        self._closed = self._refuses = True
        self.gate, self._failing = Gate(), threading.Lock()
        self._wake = threading.Event()
        self._thread = None
        self._transport.close()
        self._queue.clear()
        self._done, self._done_bytes = self._put, self._put_bytes
        for backend in {id(one): one for backends in self._sinks for one in backends}.values():
            state = backend.__getstate__()
            if isinstance(state, dict):
                vars(backend).update(state)

    def _is_full(self, waiting: int, nbytes: int) -> bool:
        limits = self._limits
        return waiting >= limits.pending or self._put_bytes - self._done_bytes + nbytes > limits.bytes

    def _make_room(self, callback: str, nbytes: int) -> bool:
        """Wait until there is room, or whatever else ends the wait; return whether the event is to be taken."""
        begin = time.perf_counter()
        if not self._refuses and self._limits.when_full == "block":
            while self._has_no_room(nbytes) and not self._stopping():
                self._wake_up()
                time.sleep(_POLL)
            self._tally.stalled(callback, time.perf_counter() - begin)
            if not self._refuses:
                return True
        self._tally.dropped[callback] += 1
        return False

    def _has_no_room(self, nbytes: int) -> bool:
        waiting = self._put - self._done
        return bool(waiting) and not self._refuses and self._failure is None and self._is_full(waiting, nbytes)

    def _wake_up(self) -> None:
        if self._closed:
            return
        if self._thread is None:
            self._taken = time.monotonic()
            self._thread = threading.Thread(target=self._drive, name=f"flowtrain lane {self.job.lane}", daemon=True)
            self._thread.start()
        self._asleep = False
        self._wake.set()

    # --- the lane's thread

    def _drive(self) -> None:
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
        begin = self._taken
        while not self._closed and not self._queue and not self._wants_home():
            self._wake.clear()
            self._asleep = True
            if not self._queue and not self._closed and not self._wants_home():
                self._wake.wait()
            self._asleep = False
            begin = time.monotonic()
        end = begin + self._transport.linger
        while not self._closed and not self._is_pressed():
            self._wake.clear()
            left = end - time.monotonic()
            if left <= 0:
                break
            if not self._is_pressed():
                self._wake.wait(left)
        return not self._closed

    def _is_pressed(self) -> bool:
        """Return whether there is no time to linger."""
        if self._rush or len(self._queue) >= self._hurry:
            return True
        return self._put_bytes - self._done_bytes >= self._batches.largest

    def _wants_home(self) -> bool:
        return self._rush and self._collected < self._put

    def _round(self) -> None:
        batch: Sequence[Entry] = ()
        with self._failing:
            if self._failure is not None or self._retired:
                self._skip()
            else:
                batch = self._flight = self._batches.take()
                self._taken = time.monotonic()
        if batch:
            begin = time.monotonic()
            outcome = self._transport.process(batch, self.gate, self._is_closed, self._tally)
            self._batches.fill(self._transport.largest)
            self._batches.took(time.monotonic() - begin, max(1, outcome.done))
            self._accept(batch, outcome)
        elif self._rush:
            done = self._done
            try:
                self._transport.collect(self._is_closed, self._tally)
            finally:  # what cannot be brought home now is not asked for again and again
                self._collected = done
                self._rush = False

    def _accept(self, batch: Sequence[Entry], outcome: Outcome) -> None:
        """Write the records of a result, each sequence number's once, and count what is done with."""
        done, rest = batch[: outcome.done], batch[outcome.done :]
        try:
            with self.gate:
                self._write([record for record in outcome.records if record[0] >= self._written])
        finally:
            self._written = done[-1].sequence + 1 if done else self._written
            self._done_bytes += sum(entry.nbytes for entry in done)
            self._done += len(done)
            self._flight = rest
        if outcome.failure is not None:
            self._fail(outcome.failure[1])
        else:
            self._flight = ()
            self._batches.put_back(rest)

    def _write(self, records: Sequence[Record]) -> None:
        """Write records; a sink that fails gets nothing more, and keeps nothing from the others."""
        failures: dict[int, Exception] = {}
        for start in range(0, len(records), _TOGETHER):
            for callback, own in groupby(records[start : start + _TOGETHER], itemgetter(1)):
                if self._abandoned:
                    return
                written = [(position, data) for _, _, position, data in own]
                deliver(self._sinks[callback], written, failures)
                self._tally.records += len(written)
        if failures:
            raise next(iter(failures.values()))

    def _fail(self, failure: BaseException) -> None:
        """Hand a failure to the training thread, or log it and retire."""
        text = f"{type(failure).__name__}: {failure}"
        if self._on_error == "warn":
            notes = "; ".join(getattr(failure, "__notes__", ()))
            _logger.warning(
                "flowtrain retires lane %s, its callbacks see no more events: %s (%s)", self.job.lane, text, notes
            )
            self.retire(text)
            self._skip()
            return
        self._tally.last_error = text
        with self._failing:  # what the training thread puts after it has raised the failure is not skipped
            self._failure = failure
            self._skip()
        self._surface(self.raise_failure)

    def _skip(self) -> None:
        """Count what waits as skipped, all but `FitEnd`: that one runs for every callback, whatever failed."""
        skipped, kept = list[Entry](), list[Entry]()
        for entry in (*self._flight, *self._batches.drain()):
            (kept if isinstance(entry.event, FitEnd) and not self._retired else skipped).append(entry)
        self._flight = ()
        self._batches.put_back(kept)
        self._tally.skipped += len(skipped)
        self._done_bytes += sum(entry.nbytes for entry in skipped)
        self._done += len(skipped)

    def _drop_rest(self) -> None:
        for entry in self._batches.drain():
            self._tally.dropped[self.job.duties[entry.duty].name] += 1

    def _is_closed(self) -> bool:
        return self._closed
