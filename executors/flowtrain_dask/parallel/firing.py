"""One firing of an event on several strands: the event ends when every strand has, and failures are the serial ones.

A `Firing` is the state that the strands of one firing share. Each strand runs its handlers in order. Before a handler
with predecessors on other strands it waits until those are done. An exception of a handler is kept, and handlers that
depend on it are skipped, so that exactly the handlers without a failed ancestor run. Nothing is raised before every
strand has ended.

A plan whose handlers all run whatever fails (`Plan.always`) is not run here, because an interrupt must not stop it.

An interrupt, an exception that is no `Exception`, stops the firing: no further handler starts, those at work are waited
for, and then the interrupt is raised. A second interrupt during that wait is raised at once. Python may raise an
interrupt in the training thread after any call, so every count is kept by a thread of the pool, which gets none, and
the training thread waits by `Wake`.

A `StrandPool` owns the threads of the strands, and a `TimedPlan` runs one plan, inline or on strands.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError, raise_worst
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.plan import Plan, PlannedHandler
from flowtrain_dask.parallel.strands import Strands
from flowtrain_dask.parallel.threads import Wake, start
from flowtrain_dask.parallel.torch_state import TorchState

__all__ = ["POOL_CLOSED", "Firing", "HandlerFailures", "StrandPool", "TimedPlan"]

POOL_CLOSED = "This DaskExecutor is closed: its threads have ended. Give the learner a new one."

_LOOK = 0.05
"""The most seconds of one wait. A signal that comes just before a wait for a lock does not end it."""

_START = 1.0
"""Seconds in which a thread that was just started begins to run, unless the system gives no further thread."""

HandlerFailures: TypeAlias = list[tuple[PlannedHandler, Exception]]
"""The handlers that failed, in serial order, each with its exception."""


class Firing:
    """The state that the strands of one firing share. It is made on the training thread, which runs the first strand.

    Args:
        plan: The plan.
        strands: How the handlers of the plan are spread.
        event: The event.
        phase: The phase.

    Attributes:
        failures: The exceptions of handlers by position, in the order in which they came.
        stopped: Whether an interrupt has come: no further handler starts.
    """

    def __init__(self, plan: Plan, strands: Strands, event: Event, phase: Phase) -> None:
        self.failures: list[tuple[int, Exception]] = []
        self.stopped = False
        self._plan = plan
        self._strands = strands
        self._event = event
        self._phase = phase
        self._training_thread = threading.get_ident()
        self._torch = TorchState.capture()
        self._interrupt: BaseException | None = None
        self._wakes = tuple(Wake() for _ in strands.strands)
        self._lock = threading.Lock()  # guards the numbers below and `stopped`
        self._done = 0  # the positions of handlers that are done and waited for, as bits
        self._lost = 0  # the positions of handlers that failed or were skipped, as bits
        self._running = 0  # strands that the pool is running
        self._left = len(strands.strands) - 1  # strands that the pool has not ended

    def run(self, position: int) -> None:
        """Run the handler at a position, unless it depends on a handler that failed. Nothing is raised."""
        plan, planned, bit = self._plan, self._plan.handlers[position], 1 << position
        if self._lost & plan.ancestors[position]:
            with self._lock:
                self._lost |= bit
            return
        try:
            if threading.get_ident() == self._training_thread:
                planned.call(self._event, self._phase, planned.view)
            else:
                self._torch.call(planned.call, self._event, self._phase, planned.view)
        except Exception as failure:  # a handler may raise anything; `finish` returns it
            with self._lock:
                self.failures.append((position, failure))
                self._lost |= bit
        except BaseException as interrupt:  # `finish` raises it on the training thread
            self._interrupt = interrupt
            self.stop()

    def work(self, number: int) -> None:
        """Run the handlers of a strand, given by its number, on the calling thread."""
        strands, wake = self._strands, self._wakes[number]
        for position in strands.strands[number]:
            needed = strands.waits[position]
            while self._done & needed != needed and not self.stopped:
                wake.wait(_LOOK)
            if self.stopped:
                return
            self.run(position)
            if strands.signals >> position & 1:
                with self._lock:
                    self._done |= 1 << position
                self._wake_all()

    def help(self, number: int) -> None:
        """Run a strand on a thread of the pool, and count it."""
        with self._lock:
            starts = not self.stopped
            self._running += starts
        try:
            if starts:
                self.work(number)
        except BaseException as failure:  # not of a handler: a fault here must not end the thread unseen
            self._interrupt = failure
            self.stop()
        finally:
            with self._lock:
                self._running -= starts
                self._left -= 1
            self._wakes[0].set()

    def stop(self) -> None:
        """Let no further handler start."""
        with self._lock:  # so that a strand of the pool is either counted as running or never starts
            self.stopped = True
        self._wake_all()

    def join(self) -> None:
        """Wait until the pool has ended all of its strands. Only the training thread calls this."""
        while self._left:
            self._wakes[0].wait(_LOOK)

    def join_running(self) -> None:
        """Wait until the pool runs no strand of a firing that was stopped. Only the training thread calls this.

        An interrupt may have come before all strands were handed to the pool, so `join` could wait for ever.
        """
        while self._running:
            self._wakes[0].wait(_LOOK)

    def finish(self, interrupt: BaseException | None = None) -> HandlerFailures:
        """Return the failures in serial order; if there is an interrupt, raise it with the failures noted on it.

        Args:
            interrupt: An interrupt of the training thread between two handlers. That of a handler is known.
        """
        interrupt, self._interrupt = interrupt or self._interrupt, None
        failures = sorted(self.failures, key=_position)
        self.failures.clear()  # the frames of an exception hold this firing
        try:
            if interrupt is not None:
                raise_worst([*(failure for _, failure in failures), interrupt])
            return [(self._plan.handlers[position], failure) for position, failure in failures]
        finally:
            del interrupt, failures

    def _wake_all(self) -> None:
        for wake in self._wakes:
            wake.set()


def _position(failure: tuple[int, Exception]) -> int:
    return failure[0]


class StrandPool:
    """The threads that run strands beside the training thread, for one firing at a time.

    A thread starts when a firing first needs it. All end with `close`, or when nobody refers to the pool any more.

    Args:
        workers: How many strands can run at the same time, the training thread's included.

    Attributes:
        workers: The same.
        busy: Whether strands are running.
        closed: Whether the pool is closed.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.busy = False
        self.closed = False
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._firing: Firing | None = None  # the one that runs, or one that was interrupted twice
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def fire(self, plan: Plan, strands: Strands, event: Event, phase: Phase) -> HandlerFailures:
        """Run a plan on its strands and return the failures in serial order when every strand has ended.

        Args:
            plan: The plan.
            strands: How its handlers are spread. The first strand runs on the calling thread.
            event: The event.
            phase: The phase.

        Raises:
            ExecutorError: The pool is closed.
        """
        if self.closed:
            raise ExecutorError(POOL_CLOSED)
        if self._firing is not None:
            self._firing.stop()
            self._firing.join_running()
        others = range(1, len(strands.strands))
        while len(self._threads) < len(others):
            self._threads.append(start(partial(_run_tasks, self._tasks), f"flowtrain-dask_{len(self._threads)}"))
        firing = Firing(plan, strands, event, phase)
        try:
            self.busy = True
            self._firing = firing
            for number in others:
                self._tasks.put(partial(copy_context().run, partial(firing.help, number)))
            firing.work(0)
            firing.join()
            self._firing = None
        except BaseException as interrupt:  # of the training thread
            firing.stop()
            firing.join_running()
            self._firing = None
            firing.finish(interrupt)
        finally:
            self.busy = False
        return firing.finish()

    def close(self) -> None:
        """End the threads, and wait until they have ended.

        Raises:
            ExecutorError: A handler calls this.
        """
        if self.busy:
            raise ExecutorError("close() was called in a handler, whose own thread it would end. Call it after fit().")
        self.closed = True
        self._tasks.put(None)
        deadline = time.monotonic() + _START
        for thread in self._threads:
            while thread.ident is None and time.monotonic() < deadline:  # `start` returns before the thread runs
                time.sleep(0.001)
            while thread.is_alive():
                thread.join()


def _run_tasks(tasks: SimpleQueue[Callable[[], object] | None]) -> None:
    """Be a thread of the pool. It knows the queue and not the pool, which can be dropped while the thread waits."""
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds the firing, and with it the batch
    tasks.put(None)  # ends the next thread: one `None` ends all, however many there are


class TimedPlan:
    """Runs one plan, inline or on strands, and times it.

    `inline` and `parallel` run the handlers and return the failures. The caller does its book-keeping and calls
    `end_event` last, because that raises for the failures and fires the events that handlers asked for: it may raise,
    and it may fire the same event again.

    Args:
        plan: The plan.
        pool: The threads of strands.
        site: The loop.
        serial: The serial executor's runner of the plan.
        clock: Returns the time in seconds.
        processor: Returns the seconds that the calling thread has computed.

    Attributes:
        plan: The same.
        serial: The same.
        waiting: The positions of the handlers that waited for more than half of their time in the last inline firing
            without failures, for a disk or a network: running beside others they need no core.
    """

    def __init__(
        self,
        plan: Plan,
        pool: StrandPool,
        site: Site,
        serial: Runner,
        clock: Callable[[], float] = time.perf_counter,
        processor: Callable[[], float] = time.thread_time,
    ) -> None:
        self.plan = plan
        self.serial = serial
        self.waiting: frozenset[int] = frozenset()
        self._processor = processor
        self._pool = pool
        self._site = site
        self._clock = clock
        self._rank = {planned.node.name: position for position, planned in enumerate(plan.handlers)}

    def fire(self, strands: Strands, event: Event, phase: Phase) -> None:
        """Run the plan on strands. Nothing is measured: this is the runner of a plan that was decided on."""
        if self.busy:
            return self.serial(event, phase)
        _, failures = self.parallel(strands, event, phase)
        return self.end_event(failures, event, phase)

    @property
    def busy(self) -> bool:
        """Whether strands are running. An event that a handler fires meanwhile runs inline, on the handler's thread."""
        return self._pool.busy

    def inline(self, event: Event, phase: Phase) -> tuple[list[float], HandlerFailures]:
        """Run the plan as the serial executor does.

        Returns:
            The seconds of each handler that ran, and the failures in serial order.

        Raises:
            BaseException: A handler raised an interrupt. The failures before it are noted on it.
        """
        plan, clock, processor = self.plan, self._clock, self._processor
        times: list[float] = []
        computed: list[float] = []
        failures: HandlerFailures = []
        lost = 0
        before, computed_before = clock(), processor()
        for position, planned in enumerate(plan.handlers):
            if plan.ancestors[position] & lost:
                lost |= 1 << position
                continue
            try:
                planned.call(event, phase, planned.view)
            except Exception as failure:  # a handler may raise anything; `end_event` raises for all failures together
                failures.append((planned, failure))
                lost |= 1 << position
            except BaseException as interrupt:
                raise_worst([*(failure for _, failure in failures), interrupt])
            now, computed_now = clock(), processor()
            times.append(now - before)
            computed.append(computed_now - computed_before)
            before, computed_before = now, computed_now
        if not failures:
            pairs = enumerate(zip(times, computed, strict=True))
            self.waiting = frozenset(at for at, (took, busy) in pairs if busy < took / 2)
        return times, failures

    def parallel(self, strands: Strands, event: Event, phase: Phase) -> tuple[float, HandlerFailures]:
        """Run the plan on strands.

        Returns:
            The seconds from the beginning to the end of the last strand, and the failures in serial order.
        """
        fired = self._site.fired
        first = len(fired)
        before = self._clock()
        failures = self._pool.fire(self.plan, strands, event, phase)
        took = self._clock() - before
        # Strands ask for events in any order. The sort is stable: the events of one callback keep their order.
        if len(fired) - first > 1:
            fired[first:] = sorted(fired[first:], key=lambda one: self._rank.get(one[0], len(self._rank)))
        if len(self._site.requests) > 1:
            self._site.requests.sort(key=lambda one: self._rank.get(one[0], len(self._rank)))
        return took, failures

    def end_event(self, failures: HandlerFailures, event: Event, phase: Phase) -> None:
        """Raise for the failures, if there are any, then fire the events that handlers asked for.

        The list of failures is emptied. An exception holds the frames that it went through, and these hold the list,
        so a list that kept the exception would keep the whole batch alive until the garbage collector runs.
        """
        if failures:
            handed = list(failures)
            failures.clear()
            try:
                self._site.fail(self.plan, event, phase, handed)
            finally:
                handed.clear()
        if self._site.fired or self._site.requests:
            self._site.drain(phase)
