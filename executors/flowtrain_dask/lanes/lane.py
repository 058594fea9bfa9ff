"""A lane: deferred events wait in it, and are processed one at a time and in order.

The training thread puts an entry at the end of the queue (`Lane.put`). The lane's thread
(`flowtrain_dask.lanes.driver`) takes the entries that have gathered, hands them over as one batch, and then takes the
next batch. There is never more than one batch at work, so a slow lane gets large batches.

The threads share no lock, so `put` takes none, and it wakes the lane's thread only if that sleeps. A method that waits
looks again every few milliseconds, because a signal would not end a wait for a lock on every system.

When a handler fails, the records before the failure are written. Then the failure is handed to the training thread
(`surface`). The entries that are put until the training thread raises it are skipped, since they would not exist if the
handler had run in place. Entries that are put later are processed. `FitEnd` is processed whenever it was put.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain_dask.lanes.driver import Driver, OnError
from flowtrain_dask.lanes.gate import Gate, guard
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import LaneReport
from flowtrain_dask.lanes.transport import Transport
from flowtrain_dask.lanes.work import Entry, Job
from flowtrain_dask.parallel.threads import start

__all__ = ["Lane", "OnError"]

_POLL = 0.002
"""Seconds between two looks at a condition that is waited for, at most: a wait begins with shorter ones."""


class Lane:
    """A bounded queue of events with a thread that has them processed.

    Args:
        job: The job of the lane. Its backends must be open while there are entries.
        transport: Runs the batches. It is open already.
        limits: How many events, and how many bytes, may wait.
        surface: Called with a callable that raises a failure, which the training thread is to call soon.
        on_error: ``"raise"``, or ``"warn"``: a failure is logged, and the lane retires.
        stopping: Returns whether training is about to stop; then `put` no longer waits for room.
        hurry: How many waiting events end the linger; half of the limit if that is less.

    Attributes:
        given_up: Whether the training thread has stopped waiting for the lane.
        holds: Keeps the sinks of the lane open, even if the learner is gone.
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        limits: Limits,
        *,
        surface: Callable[[Callable[[], None]], None],
        on_error: OnError = "raise",
        stopping: Callable[[], bool] = lambda: False,
        hurry: int = 4000,
    ) -> None:
        self.job = job
        self._transport = transport
        self._limits = limits
        self._stopping = stopping
        # At half of the limit the thread stops lingering, so that training need not wait for room.
        self._hurry = max(1, min(hurry, limits.pending // 2))
        self._driver = Driver(job, transport, limits.bytes, self._hurry, surface, on_error)
        self._thread: threading.Thread | None = None
        self._driving = threading.Lock()  # held by the lane's thread as long as it lives
        self.given_up = False
        self.holds: object = None
        guard(self)

    @property
    def gate(self) -> Gate:
        """The gate that makes the lane's thread stand still."""
        return self._driver.gate

    def put(self, handler: int, event: Event, phase: Phase, payload: Any, nbytes: int, seed: int | None = None) -> bool:
        """Put an event at the end, after waiting for room if there is none. Only the training thread calls this.

        Args:
            handler: The position of the handler in the job.
            event: The event.
            phase: The phase.
            payload: The snapshot of the state that the handler declares to read.
            nbytes: How many bytes the payload holds that no other object holds.
            seed: The seed for the random numbers that the handler draws.

        Returns:
            Whether the lane took the event; otherwise it was dropped and counted.
        """
        driver = self._driver
        number, total = driver.received
        waiting = number - driver.done
        # An empty lane takes an event of any size, or a large one would wait for ever.
        if driver.refuses or (waiting and self._is_full(waiting, total, nbytes)):
            if not self._make_room(self.job.handlers[handler].name, nbytes):
                return False
            waiting = number - driver.done  # events were done meanwhile
        total += nbytes
        driver.queue.append(Entry(number, handler, event, phase, payload, nbytes, seed, total))
        room = driver.batches.largest - (total - driver.done_bytes)
        if driver.asleep or waiting + 1 == self._hurry or -nbytes < room <= 0:  # this event completes a full batch
            self._wake_up()
        return True

    def put_back(self, entry: Entry, handler: int, recorded: bool) -> None:
        """Put an event that has waited in a checkpoint, as `put` does.

        Args:
            entry: The event.
            handler: The position of its handler in the job.
            recorded: Whether its records are in the sinks, and its effect on the callbacks alone is missing.
        """
        if recorded:
            self._driver.replayed.add(self._driver.received[0])
        self.put(handler, entry.event, entry.phase, entry.payload, entry.nbytes, entry.seed)

    def pause(self, timeout: float) -> bool:
        """Make the lane's thread stand still behind the event that is at work, until `flush` or the next event.

        Args:
            timeout: The most seconds to wait for this event.

        Returns:
            Whether the thread stands still.
        """
        driver, end = self._driver, time.monotonic() + timeout
        driver.pausing = True
        while not (driver.paused or self._thread is None or self.over):
            driver.wake.set()
            if time.monotonic() >= end:
                driver.pausing = False
                return False
            time.sleep(_POLL)
        return not self.over

    def unprocessed(self) -> tuple[list[Entry], int]:
        """Give the callbacks of this process a state, while the lane stands still.

        Returns:
            The events that this state has not seen, and how many of them, the first ones, have their records in the
            sinks already.
        """
        driver = self._driver
        seen = self._transport.settle()
        return [*seen, *driver.batches.waiting()], sum(entry.sequence < driver.unrecorded for entry in seen)

    def note_saved(self, events: int, nbytes: int) -> None:
        """Take note of how many events of the lane are in the last checkpoint, and of their bytes there."""
        self._driver.tally.saved, self._driver.tally.saved_bytes = events, nbytes

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all events are done and the callbacks of this process have their state.

        Args:
            timeout: The most seconds to wait; ``None`` for as long as it takes.

        Returns:
            Whether both is so; ``False`` if the time was over. After a failure there is nothing left to wait for: see
            `raise_failure`.

        Raises:
            UsageError: A handler of the lane calls this, and would wait for itself.
        """
        if self._thread is not None and self._thread is threading.current_thread():
            raise UsageError(
                f"flush() in a deferred handler of lane {self.job.lane} would wait for that handler itself. Call it "
                f"where training is run."
            )
        driver = self._driver
        goal, _ = driver.received
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _POLL / 64
        while not driver.refuses and (driver.done < goal or driver.collected < goal):
            driver.rush = True  # again each time: the lane's thread may have reset it before the last event was put
            self._wake_up()
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        return driver.done >= goal

    def hurry(self) -> None:
        """Have the events that wait processed now, and not when more have gathered."""
        self._driver.rush = True
        self._wake_up()

    def retire(self, failure: BaseException) -> None:
        """Log a failure of a handler that ran in place, and take no more events. The lane must be empty."""
        self._driver.retire(failure)

    @property
    def over(self) -> bool:
        """Whether waiting is of no use: a failure must be raised first, or the lane takes no events."""
        return self._driver.failure is not None or self._driver.refuses

    @property
    def idle(self) -> bool:
        """Whether there is no event to process and no failure to raise."""
        driver = self._driver
        return driver.failure is None and (driver.refuses or driver.done >= driver.received[0])

    def raise_failure(self) -> None:
        """Raise the failure that is to be raised, if there is one. Events that are put later are processed again."""
        self._driver.raise_failure()

    def close(self, timeout: float = 5.0) -> None:
        """End the lane's thread and close the transport. Events that are not done are dropped and counted.

        Args:
            timeout: The most seconds to wait for the handler that is at work.
        """
        if self._driver.closed:
            return
        self._driver.end()
        # A handler of the lane may close it, through its learner: the lane's thread cannot wait for itself.
        if self._thread is not None and self._thread is not threading.current_thread():
            end = time.monotonic() + timeout
            while self._thread.is_alive() and time.monotonic() < end:
                self._thread.join(0.05)
            self._driver.abandoned = True
        else:
            self._transport.close()
        self._drop_rest()

    def report(self) -> LaneReport:
        """Return the counts of the lane. Any thread may call this at any time."""
        driver = self._driver
        # The numbers of done entries are read first: the numbers of put entries, read later, are never smaller.
        done, done_bytes = driver.done, driver.done_bytes
        received, received_bytes = driver.received
        return LaneReport(
            self.job.lane,
            self.job.callbacks,
            self._transport.where,
            received,
            done,
            max(0, received_bytes - done_bytes),
            driver.retired,
            driver.tally.copy(),
        )

    def orphan(self) -> None:
        """Become the copy in a forked child, which has no lane's thread: take no events, write no records."""
        self._thread = None
        self._driver.orphan()

    def _is_full(self, waiting: int, total: int, nbytes: int) -> bool:
        limits = self._limits
        return waiting >= limits.pending or total - self._driver.done_bytes + nbytes > limits.bytes

    def _make_room(self, callback: str, nbytes: int) -> bool:
        """Wait until there is room, or until something else ends the wait; return whether to take the event."""
        driver = self._driver
        begin = time.perf_counter()
        # If training is stopping the wait ends, and the few events that are left are taken beyond the limit.
        if not driver.refuses and self._limits.when_full == "block":
            while self._has_no_room(nbytes) and not self._stopping():
                self._wake_up()
                time.sleep(_POLL)
            driver.tally.stalled(callback, time.perf_counter() - begin)
            if not driver.refuses:
                return True
        driver.tally.dropped[callback] += 1
        return False

    def _has_no_room(self, nbytes: int) -> bool:
        driver = self._driver
        received, total = driver.received
        waiting = received - driver.done
        return bool(waiting) and not driver.refuses and driver.failure is None and self._is_full(waiting, total, nbytes)

    def _wake_up(self) -> None:
        driver = self._driver
        driver.pausing = False
        if driver.closed:
            return
        # The thread starts with the first event, so that a lane without events costs none.
        if self._thread is None:
            driver.taken_at = time.monotonic()  # the linger of the first batch begins now
            self._thread = start(self._drive, f"flowtrain lane {self.job.lane}")
        driver.wake.set()

    def _drive(self) -> None:
        """Be the lane's thread. It refers to the lane, so a lane with a running thread stays known to `guard`."""
        # An interrupt can make the training thread start a second thread, just before it knows of the first.
        if self._driving.acquire(blocking=False):
            self._thread = threading.current_thread()
            self._driver.drive()

    def _drop_rest(self) -> None:
        driver = self._driver
        for entry in driver.batches.drain():
            driver.tally.dropped[self.job.handlers[entry.handler].name] += 1
