"""The two ways to run one firing of a plan, timed: inline in serial order, or on strands.

Both only run handlers and return the failures in serial order. `Ways.settle` does what comes after: it raises for the
failures, and fires what the handlers asked for. It is called last, after all book-keeping, because either can raise,
and either can fire the same event again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from flowtrain.events import Event
from flowtrain.execution import Site
from flowtrain.phases import Phase
from flowtrain.plan import Plan, Step
from flowtrain_dask.parallel.firing import Crew
from flowtrain_dask.parallel.strands import Strands

__all__ = ["Failures", "Ways"]

Failures: TypeAlias = list[tuple[Step, Exception]]


class Ways:
    """Runs one plan.

    Args:
        plan: The plan.
        crew: Who runs strands.
        site: The loop.
        clock: The time in seconds.
    """

    def __init__(
        self, plan: Plan, crew: Crew, site: Site, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._plan = plan
        self._crew = crew
        self._site = site
        self._clock = clock
        self._rank = {step.node.name: position for position, step in enumerate(plan.steps)}

    @property
    def busy(self) -> bool:
        """Whether strands are running: then a handler fires an event by itself, and that runs where it is."""
        return self._crew.busy

    def inline(self, event: Event, phase: Phase) -> tuple[list[float], Failures]:
        """Run as the serial executor does; return the seconds of each handler that ran, and the failures."""
        plan, clock = self._plan, self._clock
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
        failures = self._crew.fire(self._plan, strands, event, phase)
        took = self._clock() - before
        if len(fired) - start > 1:  # strands fire in any order; one callback's own events keep theirs
            fired[start:] = sorted(fired[start:], key=lambda one: self._rank.get(one[0], len(self._rank)))
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
                self._site.fail(self._plan, event, phase, handed)
            finally:
                handed.clear()
        if self._site.fired:
            self._site.drain(phase)
