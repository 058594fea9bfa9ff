"""A gate: how another thread makes a lane's thread stand still between two events."""

from __future__ import annotations

import threading
import time

__all__ = ["Gate"]


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
