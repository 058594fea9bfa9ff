"""How lanes end: closed with their learner, dropped with it, or still open when Python ends.

Events that wait in a lane are never lost without a message. If nobody closed a learner and it is dropped, its lanes
process their events in the background. When Python ends, lanes have `drain_timeout` seconds to process their events,
before Python ends its thread pools and dask's threads. Events that are not done by then, and failures, are logged,
because nobody is left to whom a failure could be raised.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakSet

from flowtrain_dask.lanes.lane_set import LaneSet

if TYPE_CHECKING:
    from flowtrain_dask.cluster.connection import Connection

__all__ = ["Teardown"]

_logger = logging.getLogger("flowtrain")


class Teardown:
    """The lanes and the connection of one executor, which must end even if the learner is dropped.

    No attribute leads to the learner, so that this object can outlive it.

    Args:
        patience: For how many seconds lanes process their events when Python ends.

    Attributes:
        lanes: The lanes; ``None`` if there is no plan yet.
        connection: The connection to the cluster, if there is one.
    """

    def __init__(self, patience: float) -> None:
        self.lanes: LaneSet | None = None
        self.connection: Connection | None = None
        self._patience = patience
        self._process = os.getpid()
        _open.add(self)
        _register_finish()

    def close(self) -> None:
        """End the lanes, then close the connection."""
        if os.getpid() != self._process:
            return  # a forked child has copies of the objects, but neither the threads nor the connection
        if self.lanes is not None:
            self.lanes.close()
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def finish(self) -> None:
        """Let the lanes process their events, log failures and the events that are not done, and close."""
        if os.getpid() != self._process:
            return
        end = time.monotonic() + self._patience
        try:
            self._finish_lanes(end)
        finally:
            self.close()

    def _finish_lanes(self, end: float) -> None:
        """Let the lanes process their events until a moment of `time.monotonic`, and log what is left."""
        for lane in () if self.lanes is None else self.lanes.lanes:
            was_given_up = lane.given_up  # the log has told how many of its events are left
            if not was_given_up and not lane.wait(lambda: time.monotonic() >= end) and (left := lane.report().pending):
                _logger.warning(
                    "flowtrain: %d events of lane %s were not processed in %g s, and nobody closed their learner: "
                    "write `with Learner(...) as learner:`, or learner.close()",
                    left,
                    lane.name,
                    self._patience,
                )
            try:
                lane.raise_failure()
            except BaseException:  # even `SystemExit` of a handler must not leave the other lanes undone
                _logger.exception(
                    "flowtrain: lane %s failed, and nobody called learner.flush() or learner.close()", lane.name
                )

    def drop(self) -> None:
        """Finish in the background. The garbage collector calls this when the executor is dropped."""
        if os.getpid() != self._process:
            return
        if self.connection is None and (self.lanes is None or self.lanes.idle):
            self.close()
            return
        _ending.add(self)

        def finish() -> None:
            """Finish, and be known to `_finish_all` until then."""
            try:
                self.finish()
            finally:
                _ending.discard(self)

        try:  # on another thread: the collector may run on a lane's thread, or on one that the client needs
            threading.Thread(target=finish, name="flowtrain finishes its lanes", daemon=True).start()
        except RuntimeError:  # Python is ending, and starts no threads
            finish()


_open: WeakSet[Teardown] = WeakSet()
_ending: set[Teardown] = set()  # those that finish in the background, so that they are not collected meanwhile
_registered: list[bool] = []


def _register_finish() -> None:
    if _registered:
        return
    _registered.append(True)
    # A connection needs thread pools. `threading._register_atexit` runs before these end, and `atexit` after that.
    register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(_finish_all)
    except RuntimeError:  # Python is ending
        _registered.clear()


def _finish_all() -> None:
    for teardown in {*_open, *_ending}:
        try:
            teardown.finish()
        except Exception:  # the lanes of the other learners must end too
            _logger.exception("flowtrain: lanes could not be ended")
