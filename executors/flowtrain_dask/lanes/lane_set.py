"""The lanes of one learner: the only object that opens them, lists them, waits for all of them and ends them.

A `LaneSet` refers to the learner weakly, so that lanes can outlive it: events that wait in a lane are processed even if
the learner is dropped.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable
from functools import partial

from flowtrain.graph.clock import Clock
from flowtrain.graph.executor import Site
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import LaneReport
from flowtrain_dask.lanes.threads import LaneThreads
from flowtrain_dask.lanes.transport import OnError, Transport
from flowtrain_dask.lanes.work import Job

__all__ = ["LaneSet"]

_logger = logging.getLogger("flowtrain")


class LaneSet:
    """The lanes of one learner, with the threads that work on them.

    Args:
        site: The loop of the learner.
        limits: How many events, and how many bytes of them, may wait in each lane.
        on_error: What happens when a handler fails.

    Attributes:
        lanes: The lanes that have had an event, in the order of their first ones.
    """

    def __init__(self, site: Site, limits: Limits, on_error: OnError) -> None:
        self.lanes: tuple[Lane, ...] = ()
        self._site = weakref.ref(site)
        self._limits = limits
        self._on_error: OnError = on_error
        self._threads = LaneThreads()

    def open(self, job: Job, transport: Transport) -> Lane:
        """Open a lane, for its first event."""
        site = self._site

        def raise_on_training_thread(raise_failure: Callable[[], None]) -> None:
            """Have a failure raised on the training thread."""
            loop = site()
            if loop is not None:
                loop.mailbox.put(raise_failure)

        loop = site()
        lane = Lane(
            job,
            transport,
            self._limits,
            self._threads,
            raise_on_training_thread=raise_on_training_thread,
            on_error=self._on_error,
            stopping=self.is_stopping,
            clock=partial(_clock, site),
            holds=None if loop is None else loop.open_sinks,
        )
        self.lanes += (lane,)
        return lane

    @property
    def is_stopping(self) -> Callable[[], bool]:
        """Returns whether training is about to stop. The function refers neither to this object nor to the learner."""
        return partial(_is_stopping, self._site)

    @property
    def idle(self) -> bool:
        """Whether no lane has an event to process or a failure to raise."""
        return all(lane.idle for lane in self.lanes)

    @property
    def gave_up(self) -> bool:
        """Whether the last `wait` has left events, because training was stopped."""
        return any(lane.given_up for lane in self.lanes)

    def report(self) -> tuple[LaneReport, ...]:
        """Return the counts of the lanes."""
        return tuple(lane.report() for lane in self.lanes)

    def wait(self, limit: float) -> None:
        """Wait until every lane is done or has failed, or until the time is over after training was stopped.

        Args:
            limit: The most seconds to wait from then on. Lanes that are not done in time are marked as given up.
        """
        end = math.inf

        def is_over() -> bool:
            """Return whether the time is over, which begins to count when training is about to stop."""
            nonlocal end
            if end == math.inf and _is_stopping(self._site):
                end = time.monotonic() + limit
            return time.monotonic() >= end

        for lane in self.lanes:  # all at once, and not one after the other
            if not lane.over:
                lane.process_soon()
        for lane in self.lanes:
            lane.wait(is_over)

    def failures(self) -> list[BaseException]:
        """Return the failures of the lanes. From here on each lane processes events again."""
        failures: list[BaseException] = []
        for lane in self.lanes:
            try:
                lane.raise_failure()
            except BaseException as failure:  # the failures of all lanes are raised together
                failures.append(failure)
        return failures

    def log_pending(self, limit: float) -> None:
        """Log how many events of each lane that was given up were not processed in some seconds."""
        for lane in self.lanes:
            if lane.given_up:
                text = "flowtrain: %d events of lane %s were not processed in %g s"
                _logger.warning(text, lane.report().pending, lane.name, limit)

    def close(self) -> None:
        """End the lanes and their threads. Events that are not done are dropped."""
        for lane in self.lanes:
            lane.close()
        self._threads.close()


def _clock(site: weakref.ref[Site]) -> Clock | None:
    """Return the clock of the timeline that is written now; ``None`` without one."""
    loop = site()
    return None if loop is None else loop.clock


def _is_stopping(site: weakref.ref[Site]) -> bool:
    """Return whether training is about to stop."""
    loop = site()
    return loop is None or loop.mailbox.stopping
