"""One firing of an event on several strands: a true barrier, and failures as in the serial order.

A `Firing` holds what the strands of one firing share. Each strand runs its handlers in order; before one that waits
for another strand it waits until that is done. What a handler raises is kept, and what depends on it is skipped, so
that exactly the handlers with no failed ancestor run. Nothing is raised before every strand has ended.

Plans of which every handler runs whatever failed (`Plan.always`) are not run here: no interrupt may stop those.

An interrupt (an exception that is no `Exception`) stops the firing: no handler starts any more, those that run are
waited for, and then the interrupt is raised. A second interrupt during that wait is raised at once.

A `Crew` has the threads that strands run on, and a `TimedPlan` runs one plan, inline or on strands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeAlias

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.plan import Plan, Step
from flowtrain_dask.parallel.strands import Strands
from flowtrain_dask.parallel.torch_state import TorchState

__all__ = ["CLOSED", "Crew", "Failures", "Firing", "TimedPlan"]

CLOSED = "This DaskExecutor is closed: its threads have ended. Give the learner a new one."

Failures: TypeAlias = list[tuple[Step, Exception]]
"""Handlers that failed, in serial order."""


class Firing:
    """What the strands of one firing share.

    Args:
        plan: What to run.
        waits: For each position, the positions that it waits for, as bits; see `Strands`.
        signals: The positions that are waited for, as bits.
        event: The event.
        phase: The phase.
    """

    def __init__(self, plan: Plan, waits: tuple[int, ...], signals: int, event: Event, phase: Phase) -> None:
        self.failures: list[tuple[int, Exception]] = []
        self._plan = plan
        self._waits = waits
        self._signals = signals
        self._event = event
        self._phase = phase
        self._home = threading.get_ident()
        self._torch = TorchState.capture()
        self._interrupt: BaseException | None = None
        # Guarded by the lock. (Entering the condition in its place can be interrupted with the lock taken.)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._done = 0
        self._lost = 0
        self._running = 0
        self._stopped = False

    def run(self, position: int) -> None:
        """Run the handler at a position, unless one that it depends on failed; does not raise."""
        plan, step, bit = self._plan, self._plan.steps[position], 1 << position
        if self._lost & plan.ancestors[position]:
            with self._lock:
                self._lost |= bit
            return
        try:
            if threading.get_ident() == self._home:
                step.call(self._event, self._phase, step.view)
            else:
                self._torch.call(step.call, self._event, self._phase, step.view)
        except Exception as failure:  # whatever a handler raises is collected, then raised
            with self._lock:
                self.failures.append((position, failure))
                self._lost |= bit
        except BaseException as interrupt:  # raised by `finish`, on the training thread
            self._interrupt = interrupt
            self.stop()

    def work(self, strand: tuple[int, ...]) -> None:
        """Run the handlers of a strand."""
        with self._lock:
            if self._stopped:
                return
            self._running += 1
        try:
            for position in strand:
                needed = self._waits[position]
                if needed:
                    with self._lock:
                        while self._done & needed != needed and not self._stopped:
                            self._changed.wait()
                if self._stopped:
                    return
                self.run(position)
                if self._signals >> position & 1:
                    with self._lock:
                        self._done |= 1 << position
                        self._changed.notify_all()
        finally:
            with self._lock:
                self._running -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Let no handler start any more."""
        with self._lock:
            self._stopped = True
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when no strand is running."""
        with self._lock:
            while self._running:
                self._changed.wait()

    def finish(self) -> Failures:
        """Return the failures in serial order; raise an interrupt that came from a handler."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                del interrupt  # its frames hold this firing
        found = [(self._plan.steps[position], failure) for position, failure in sorted(self.failures, key=_position)]
        self.failures.clear()  # the frames of an exception hold this firing
        return found


def _position(failure: tuple[int, Exception]) -> int:
    return failure[0]


class Crew:
    """The training thread and the pool that helps it; one firing at a time.

    The pool's threads start with the first firing, and end with `close`, or when nobody holds the crew any more.

    Args:
        workers: How many strands can run at the same time, the training thread's included.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.closed = False
        self.busy = False
        self._pool: ThreadPoolExecutor | None = None
        self._left_behind: Firing | None = None

    def fire(self, plan: Plan, strands: Strands, event: Event, phase: Phase) -> Failures:
        """Run a plan on its strands; return the failures in serial order when every strand has ended.

        Args:
            plan: What to run.
            strands: How it is spread; the first strand runs on the calling thread.
            event: The event.
            phase: The phase.

        Raises:
            ExecutorError: The crew is closed.
        """
        if self.closed:
            raise ExecutorError(CLOSED)
        if self._left_behind is not None:
            self._left_behind.wait()
            self._left_behind = None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max(1, self.workers - 1), "flowtrain-dask")
        firing = Firing(plan, strands.waits, strands.signals, event, phase)
        here, *others = strands.strands
        self.busy = True
        try:
            ends = [self._pool.submit(copy_context().run, firing.work, strand) for strand in others]
            firing.work(here)
            for end in ends:
                end.result()
        except BaseException:  # an interrupt of the training thread
            firing.stop()
            self._left_behind = firing
            firing.wait()
            self._left_behind = None
            raise
        finally:
            self.busy = False
        return firing.finish()

    def close(self) -> None:
        """End the threads.

        Raises:
            ExecutorError: A handler is running.
        """
        if self.busy:
            raise ExecutorError("close() was called in a handler, whose own thread it would end. Call it after fit().")
        self.closed = True
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class TimedPlan:
    """Runs one plan, inline or on strands, and times it.

    `inline` and `parallel` run the handlers and return the failures. `settle` comes last, after all book-keeping: it
    raises for the failures and fires what the handlers asked for, either can raise, and either can fire the same event
    again.

    Args:
        plan: The plan.
        crew: Runs strands.
        site: The loop.
        serial: The serial executor's runner of the plan.
        clock: The time in seconds.
    """

    def __init__(
        self, plan: Plan, crew: Crew, site: Site, serial: Runner, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.plan = plan
        self.serial = serial
        self._crew = crew
        self._site = site
        self._clock = clock
        self._rank = {step.node.name: position for position, step in enumerate(plan.steps)}

    def fire(self, strands: Strands, event: Event, phase: Phase) -> None:
        """Run on strands, whatever that takes; inline where a handler that runs on a strand fires the event."""
        if self.busy:
            return self.serial(event, phase)
        _, failures = self.parallel(strands, event, phase)
        return self.settle(failures, event, phase)

    @property
    def busy(self) -> bool:
        """Whether strands are running: an event that a handler fires meanwhile runs inline, on the handler's thread."""
        return self._crew.busy

    def inline(self, event: Event, phase: Phase) -> tuple[list[float], Failures]:
        """Run as the serial executor does; return the seconds of each handler that ran, and the failures."""
        plan, clock = self.plan, self._clock
        times: list[float] = []
        failures: Failures = []
        lost = 0
        before = clock()
        for position, step in enumerate(plan.steps):
            if plan.ancestors[position] & lost:
                lost |= 1 << position
                continue
            try:
                step.call(event, phase, step.view)
            except Exception as failure:  # whatever a handler raises is collected, then raised
                failures.append((step, failure))
                lost |= 1 << position
            now = clock()
            times.append(now - before)
            before = now
        return times, failures

    def parallel(self, strands: Strands, event: Event, phase: Phase) -> tuple[float, Failures]:
        """Run on strands; return the seconds that it took, and the failures."""
        fired = self._site.fired
        start = len(fired)
        before = self._clock()
        failures = self._crew.fire(self.plan, strands, event, phase)
        took = self._clock() - before
        if len(fired) - start > 1:  # strands fire in any order; one callback's own events keep theirs
            fired[start:] = sorted(fired[start:], key=lambda one: self._rank.get(one[0], len(self._rank)))
        if len(self._site.requests) > 1:
            self._site.requests.sort(key=lambda one: self._rank.get(one[0], len(self._rank)))
        return took, failures

    def settle(self, failures: Failures, event: Event, phase: Phase) -> None:
        """Raise what the failures amount to, and fire what the handlers asked for; the list is emptied.

        An exception holds the frames that it went through, and those hold the list, so a list that kept it would keep
        the whole batch alive until the garbage collector comes.
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
