"""How lanes end: closed with their learner, dropped with it, or left open when Python ends.

What waits in a lane is never lost unheard. When a learner is dropped that nobody closed, its lanes process what they
have in the background. When Python ends, they have the `drain_timeout` for it, before the machinery of threads and of
dask is taken down. What is not done by then, or fails, is logged: there is nobody left to raise it to.
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

from flowtrain_dask.lanes.lane import Lane

if TYPE_CHECKING:
    from flowtrain_dask.cluster.connect import Connection

__all__ = ["Held"]

_logger = logging.getLogger("flowtrain")


class Held:
    """What has to be given back, also when the learner is dropped: nothing in it leads back to the learner.

    Args:
        patience: For how many seconds what waits is processed when Python ends.

    Attributes:
        lanes: The lanes that have had events.
        connection: The cluster, if there is one.
    """

    def __init__(self, patience: float) -> None:
        self.lanes: list[Lane] = []
        self.connection: Connection | None = None
        self._patience = patience
        self._process = os.getpid()
        _held.add(self)
        _watch_for_the_end()

    def give_back(self) -> None:
        """End the lanes, then leave the cluster."""
        if os.getpid() != self._process:
            return  # a child of this process has the objects, and neither the threads nor the connection
        for lane in self.lanes:
            lane.close()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    def finish(self) -> None:
        """Process what waits, log what was not processed or has failed, and give back."""
        if os.getpid() != self._process:
            return
        end = time.monotonic() + self._patience
        for lane in self.lanes:
            while not lane.given_up and not lane.flush(0.25) and not lane.over and time.monotonic() < end:
                pass
            if not lane.over and not lane.given_up and (left := lane.report().pending):
                _logger.warning(
                    "flowtrain: %d events of lane %s were not processed in %g s, and nobody closed their learner: "
                    "write `with Learner(...) as learner:`, or learner.close()",
                    left,
                    lane.job.lane,
                    self._patience,
                )
            try:
                lane.raise_failure()
            except Exception:
                _logger.exception(
                    "flowtrain: lane %s failed, and nobody called learner.flush() or learner.close()", lane.job.lane
                )
        self.give_back()

    def drop(self) -> None:
        """Finish in the background; called by the garbage collector."""
        if os.getpid() != self._process:
            return
        if self.connection is None and all(lane.idle for lane in self.lanes):
            self.give_back()
            return
        _ending.add(self)

        def finish() -> None:
            try:
                self.finish()
            finally:
                _ending.discard(self)

        try:  # another thread, as this may be a lane's, or the one that the client works in
            threading.Thread(target=finish, name="flowtrain finishes its lanes", daemon=True).start()
        except RuntimeError:  # Python is ending
            finish()


_held: WeakSet[Held] = WeakSet()
_ending: set[Held] = set()
_watching: list[bool] = []


def _watch_for_the_end() -> None:
    if _watching:
        return
    _watching.append(True)
    # Where Python has it: before the pools of threads end that a connection needs. `atexit` comes after that.
    register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(_finish_all)
    except RuntimeError:  # Python is ending
        _watching.clear()


def _finish_all() -> None:
    for held in {*_held, *_ending}:
        held.finish()
