"""A gate: how another thread makes a lane's thread stand still between two events, and how every fork does so.

A data loader starts its workers by copying this process, beside running lanes. Only the thread that forks lives on in
the child: a lock that another thread held stays locked there for ever, and what it had written in part is written
twice. So before a fork every lane is made to stand still between two events; afterwards the parent's lanes go on. The
child's copies of the lanes take no events, and its copies of their backends are what a backend is when it is sent to
another process: they encode and never write.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Protocol
from weakref import WeakSet

__all__ = ["Gate", "guard"]


class Gate:
    """A lock that lets whoever wants the lane to stand still go first.

    The lane's thread enters it around everything that must not be interrupted, such as an event or the writing of
    records. It leaves and enters again at once, so with a plain lock nobody else would get in between.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._inside = 0  # the thread that is inside, by its number

    def hold(self, timeout: float) -> bool:
        """Wait until the lane's thread is outside, and keep it there; return whether it is.

        Args:
            timeout: The most seconds to wait: a long handler is not waited for.
        """
        if self._inside == threading.get_ident():
            return False  # a handler forks, or asks for a flush: it cannot wait for itself
        self._wanted += 1
        deadline = time.monotonic() + timeout
        while not self._lock.acquire(timeout=0.01):  # short: a signal does not interrupt it
            if time.monotonic() >= deadline:
                self._wanted -= 1
                return False
        return True

    def release(self) -> None:
        """End what `hold` began."""
        self._wanted -= 1
        self._lock.release()

    def __enter__(self) -> None:
        while self._wanted:
            time.sleep(0.001)
        self._lock.acquire()
        self._inside = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._inside = 0
        self._lock.release()


class _Standing(Protocol):
    """A lane, as forks see it."""

    @property
    def gate(self) -> Gate:
        """What makes its thread stand still."""
        ...

    def orphan(self) -> None:
        """Be the copy in a forked child."""
        ...


_PATIENCE = 5.0
"""Seconds that a fork waits for lanes to stand still; a handler that takes longer is not waited for."""

_lanes: WeakSet[_Standing] = WeakSet()
_held: list[_Standing] = []
_installed: list[int] = []


def guard(lane: _Standing) -> None:
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
