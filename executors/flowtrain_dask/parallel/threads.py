"""Starting and waking threads in such a way that an interrupt cannot leave a lock taken.

Ctrl-C raises `KeyboardInterrupt` in the main thread after any call, which is usually the training thread.
`threading.Event`, `Condition` and `Thread.start` take locks in Python code: an interrupt between the taking and the
block that gives back leaves the lock taken, and the next thread that wants it waits for ever. `Wake` and `start` do
the same in one call of C each, which an interrupt cannot divide. Threads that never get an interrupt, such as those of
lanes, may use anything.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections.abc import Callable

__all__ = ["Wake", "cores", "start"]


class Wake:
    """Ends the wait of one thread. A wake that comes before the wait ends the next one; two of them count as one.

    The waiting thread looks at its condition before each wait, and a thread that changes the condition calls `set`
    after the change. So no change is missed, and a wake without a change does no harm.
    """

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken = threading.Lock()  # taken: nobody has called `set` since the last wait
        self._taken.acquire()

    def set(self) -> None:
        """End the wait. Any thread may call this."""
        if self._taken.locked():
            with contextlib.suppress(RuntimeError):  # another thread has released it at the same moment
                self._taken.release()

    def wait(self, timeout: float = -1) -> None:
        """Wait until `set` is called, unless it was called already.

        Args:
            timeout: The most seconds to wait; -1 for no limit.
        """
        self._taken.acquire(timeout=timeout)

    def clear(self) -> None:
        """Forget a wake that came before."""
        self._taken.acquire(blocking=False)


def start(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread and return it; it may begin to run only a moment later.

    `Thread.start` waits for the new thread in Python code, so it is called on a thread of its own.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    _thread.start_new_thread(thread.start, ())
    return thread


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # less than the machine has, in a container or under a batch system
    return os.cpu_count() or 1
