"""A lane: where deferred events wait, to be processed one at a time, in order.

The training thread puts an entry at the end (`Lane.put`); the lane's thread (`flowtrain_dask.lanes.driver`) takes what
has gathered, hands it over as one batch, and takes the next batch. There is never more than one batch in flight, so
batches size themselves: the slower a lane, the larger they get.

Every number is counted by one thread only: the training thread counts what it put, the lane's thread what is done.
So `put` takes no lock, and it wakes the lane's thread only if that sleeps. What waits for something looks again every
few milliseconds: a wait in a lock would not be interrupted by signals.

When a handler fails, the records before it are written first; then the failure is handed to the training thread
(`surface`), and the entries that were put until the training thread raises it are skipped, as they would not have
existed in place. What is put after that is processed, and `FitEnd` has its turn whenever it was put.
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

__all__ = ["Lane", "OnError"]

_POLL = 0.002
"""Seconds between two looks at something that is waited for."""


class Lane:
    """A bounded queue of events with a thread that has them processed.

    Args:
        job: What it is there for; its backends are open while there are entries.
        transport: Runs its batches; opened already.
        limits: How much may wait.
        surface: Takes a callable that raises a failure, to be called by the training thread soon.
        on_error: ``"raise"``, or ``"warn"``: a failure is logged, and the lane retires.
        stopping: Whether training is to end soon; then nothing waits for room any more.
        hurry: How many waiting events end the linger; half of what the limit allows if that is less.

    Attributes:
        given_up: Whether the training thread has stopped waiting for it.
        holds: What keeps its sinks open, also when the learner is gone.
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
        self._hurry = max(1, min(hurry, limits.pending // 2))
        self._driver = Driver(job, transport, limits.bytes, self._hurry, surface, on_error)
        self._thread: threading.Thread | None = None
        self.given_up = False
        self.holds: object = None
        guard(self)

    @property
    def gate(self) -> Gate:
        """What makes its thread stand still."""
        return self._driver.gate

    def put(self, duty: int, event: Event, phase: Phase, payload: Any, nbytes: int, seed: int | None = None) -> bool:
        """Put an event at the end; wait for room if there is none. Called by the training thread only.

        Args:
            duty: The position of its handler in the job.
            event: The event.
            phase: The phase.
            payload: What the handler declared to read; nobody changes it any more.
            nbytes: How many bytes it holds that nobody else does.
            seed: The seed of the random numbers that its handler draws.

        Returns:
            Whether the lane took it; otherwise it was dropped and counted.
        """
        driver = self._driver
        number = driver.put
        waiting = number - driver.done
        if driver.refuses or (waiting and self._is_full(waiting, nbytes)):
            if not self._make_room(self.job.duties[duty].name, nbytes):
                return False
            waiting = number - driver.done
        driver.queue.append(Entry(number, duty, event, phase, payload, nbytes, seed))
        driver.put_bytes += nbytes
        driver.put = number + 1
        room = driver.batches.largest - (driver.put_bytes - driver.done_bytes)
        if driver.asleep or waiting + 1 == self._hurry or -nbytes < room <= 0:  # enough for a full batch, now
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
        driver = self._driver
        goal = driver.put
        deadline = None if timeout is None else time.monotonic() + timeout
        while not driver.refuses and (driver.done < goal or driver.collected < goal):
            driver.rush = True
            self._wake_up()
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        return driver.done >= goal

    @property
    def over(self) -> bool:
        """Whether nothing is to be waited for: a failure is to be raised first, or it takes no more events."""
        return self._driver.failure is not None or self._driver.refuses

    @property
    def idle(self) -> bool:
        """Whether nothing waits, to be processed or to be raised."""
        driver = self._driver
        return driver.failure is None and (driver.refuses or driver.done >= driver.put)

    def raise_failure(self) -> None:
        """Raise the failure that waits to be raised, if there is one; the lane then goes on with what is put next."""
        self._driver.raise_failure()

    def close(self, timeout: float = 5.0) -> None:
        """End the lane's thread and give back what the transport holds; what has not been processed is dropped."""
        if self._driver.closed:
            return
        self._driver.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            end = time.monotonic() + timeout
            while self._thread.is_alive() and time.monotonic() < end:
                self._thread.join(0.05)
            self._driver.abandoned = True
        else:
            self._transport.close()
        self._drop_rest()

    def report(self) -> LaneReport:
        """Return how it stands; callable from any thread at any time."""
        driver = self._driver
        # What is done first: a number that is read later is never smaller.
        done, done_bytes = driver.done, driver.done_bytes
        return LaneReport(
            self.job.lane,
            self.job.callbacks,
            self._transport.where,
            driver.put,
            done,
            max(0, driver.put_bytes - done_bytes),
            driver.retired,
            driver.tally.copy(),
        )

    def orphan(self) -> None:
        """Be the copy in a forked child, which has no lane thread: take nothing, write nothing."""
        self._thread = None
        self._driver.orphan()

    def _is_full(self, waiting: int, nbytes: int) -> bool:
        driver, limits = self._driver, self._limits
        return waiting >= limits.pending or driver.put_bytes - driver.done_bytes + nbytes > limits.bytes

    def _make_room(self, callback: str, nbytes: int) -> bool:
        """Wait until there is room, or whatever else ends the wait; return whether the event is to be taken."""
        driver = self._driver
        begin = time.perf_counter()
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
        waiting = driver.put - driver.done
        return bool(waiting) and not driver.refuses and driver.failure is None and self._is_full(waiting, nbytes)

    def _wake_up(self) -> None:
        driver = self._driver
        if driver.closed:
            return
        if self._thread is None:
            driver.taken = time.monotonic()
            self._thread = threading.Thread(target=self._drive, name=f"flowtrain lane {self.job.lane}", daemon=True)
            self._thread.start()
        driver.asleep = False
        driver.wake.set()

    def _drive(self) -> None:
        # Through the lane: as long as its thread runs, the lane is there, and a fork can make it stand still.
        self._driver.drive()

    def _drop_rest(self) -> None:
        driver = self._driver
        for entry in driver.batches.drain():
            driver.tally.dropped[self.job.duties[entry.duty].name] += 1
