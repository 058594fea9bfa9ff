"""A gate, by which another thread makes a lane stand still between two events; every fork uses it.

The lane's thread is the one that works on the lane at the moment, if any does.

A data loader starts its workers by forking this process while lanes run. Only the forking thread exists in the child: a
lock that another thread held stays locked there for ever, and a record that it had written in part is written twice. So
before a fork every lane is made to stand still between two events, and afterwards the lanes of the parent continue. The
child's copies of the lanes take no events, and its copies of their backends only encode and never write, like backends
that were sent to another process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

from flowtrain.logging.backend import LoggerBackend

__all__ = ["Gate", "close_copies", "guard"]


class Gate:
    """Lets other threads hold up a lane's thread.

    The lane's thread enters the gate around everything that must not be interrupted, such as an event or the writing of
    records. It leaves and enters again at once, so a plain lock would hardly ever let another thread in between. Here a
    holder only says that it holds the gate, and the lane's thread waits outside until nobody does.

    No lock is involved: the lane's thread says that it is inside before it looks for holders, and a holder says that it
    holds before it looks whether the lane's thread is inside, so at least one of them sees the other. An interrupt of a
    holder leaves nothing behind that `release` does not remove.
    """

    def __init__(self) -> None:
        self._holders: set[int] = set()  # threads, by their identifiers
        self._inside = 0  # the identifier of the thread that is inside

    def hold(self, timeout: float) -> bool:
        """Keep the lane's thread outside, after waiting until it is; return whether this was possible.

        Args:
            timeout: The most seconds to wait, since a handler may take long.
        """
        caller = threading.get_ident()
        if self._inside == caller:
            return False  # a handler forks, and would wait for itself
        self._holders.add(caller)
        deadline = time.monotonic() + timeout
        while self._inside:
            if time.monotonic() >= deadline:
                self.release()
                return False
            time.sleep(0.001)
        return True

    def release(self) -> None:
        """Let the lane's thread in again, as far as the calling thread is concerned."""
        self._holders.discard(threading.get_ident())

    def __enter__(self) -> None:
        caller = threading.get_ident()
        self._inside = caller
        while self._holders:
            self._inside = 0
            time.sleep(0.001)
            self._inside = caller

    def __exit__(self, *exc: object) -> None:
        self._inside = 0


class _Standing(Protocol):
    """A lane, as forks use it."""

    @property
    def gate(self) -> Gate:
        """The gate of its thread."""
        ...

    def become_forked_copy(self) -> None:
        """Become the copy in a forked child."""
        ...


def close_copies(backends: Iterable[Iterable[LoggerBackend]]) -> None:
    """Make the copies of backends in a forked child encode records and write none."""
    # A backend without its open files is like one that was never opened.
    for backend in {id(one): one for group in backends for one in group}.values():
        state = backend.__getstate__()
        if isinstance(state, dict):
            vars(backend).update(state)


_PATIENCE = 5.0
"""Seconds that a fork waits for lanes to stand still. It does not wait for a handler that takes longer."""

_lanes: WeakSet[_Standing] = WeakSet()
_installed: list[int] = []


def guard(lane: _Standing) -> None:
    """Make a lane stand still whenever this process is forked, as long as the lane lives."""
    if not _installed and hasattr(os, "register_at_fork"):  # Windows has no forks
        _installed.append(os.getpid())
        os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
    _lanes.add(lane)


def _before() -> None:
    end = time.monotonic() + _PATIENCE
    for lane in list(_lanes):
        lane.gate.hold(max(0.0, end - time.monotonic()))


def _after_in_parent() -> None:
    for lane in list(_lanes):  # those that could not be held too: an interrupt may have ended `hold` half-way
        lane.gate.release()


def _after_in_child() -> None:
    for lane in list(_lanes):
        with contextlib.suppress(Exception):  # the child must run even if a backend cannot be taken apart
            lane.become_forked_copy()
