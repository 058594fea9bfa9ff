"""Forks beside running lanes: a data loader starts its workers by copying this process.

Only the thread that forks lives on in the child. Whatever lock another thread held stays locked there for ever, and
whatever it had written in part is written twice. So before a fork every lane is made to stand still between two
events; afterwards the parent's lanes go on. The child's copies of them take nothing, and its copies of their backends
are what a backend is when it is sent to another process: they encode and never write.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from flowtrain_dask.lanes.lane import Lane

__all__ = ["guard"]

_PATIENCE = 5.0
"""Seconds that a fork waits for lanes to stand still; a handler that takes longer is not waited for."""

_lanes: WeakSet[Lane] = WeakSet()
_held: list[Lane] = []
_installed: list[int] = []


def guard(lane: Lane) -> None:
    """Make a lane stand still whenever this process is forked, as long as the lane lives."""
    if not _installed and hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
        _installed.append(os.getpid())
        os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
    _lanes.add(lane)


def _before() -> None:
    end = time.monotonic() + _PATIENCE
    for lane in list(_lanes):
        if lane.gate.hold(max(0.0, end - time.monotonic())):
            _held.append(lane)


def _after_in_parent() -> None:
    while _held:
        _held.pop().gate.release()


def _after_in_child() -> None:
    _held.clear()
    for lane in list(_lanes):
        with contextlib.suppress(Exception):  # a child that cannot let go of a sink is a child all the same
            lane.orphan()
