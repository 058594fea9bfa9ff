"""Reading parcels: how another process on the machine finds one, and reads it where it is.

What is read can be written to, and that stays in this process. While somebody reads, the parcel is used for nothing
else, so a reading ends when its batch is done. What a callback keeps of it becomes memory of this process then, at the
same address; what nobody keeps costs no copy.
"""

from __future__ import annotations

import os
import stat
import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager

from flowtrain_dask.snapshots.mappings import mapped, replace
from flowtrain_dask.snapshots.parcels import MARK, START, Ticket, possible

if sys.platform != "win32":
    import fcntl

__all__ = ["Reading", "Readings", "read"]


class Reading:
    """What is in a parcel, read where it is. It can be written to: that stays in this process.

    Args:
        descriptor: The file, opened and locked by this process, which it owns from here on.
        size: The bytes.

    Attributes:
        memory: What is in it.

    Raises:
        OSError: There is no memory.
    """

    _descriptor = -1

    def __init__(self, descriptor: int, size: int) -> None:
        array = mapped(START + size, descriptor, shared=False)
        self._array = weakref.ref(array)
        self._own = False
        self._process = os.getpid()
        self.memory = memoryview(array).cast("B")[START:]
        self._descriptor = descriptor
        _readings.add(self)

    def own(self) -> None:
        """Put memory of this process in the place of the parcel's, with the same in it, if something refers to it.

        Raises:
            OSError: There is no memory.
        """
        array = self._array()
        if array is not None and not self._own:
            replace(array)
            self._own = True

    def close(self) -> None:
        """Let the parcel be used again. What still refers to its memory has a copy from here on, where it is."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        self.memory = memoryview(b"")
        _readings.discard(self)
        try:
            self.own()
        except OSError:  # then the file stays as it is, and open
            return
        if self._process == os.getpid():  # a child has the same lock
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __del__(self) -> None:
        self.close()


_readings: weakref.WeakSet[Reading] = weakref.WeakSet()


def _own_all() -> None:
    """Leave a child that is being forked nothing that somebody uses again."""
    for reading in list(_readings):
        reading.own()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_own_all)


def read(ticket: Ticket) -> Reading | None:
    """Return what is in a parcel; ``None`` if this process cannot get at it, or something else is in it by now.

    It has to be closed: until then the parcel cannot be used again.
    """
    if not possible():
        return None
    path = f"/proc/{ticket.process}/fd/{ticket.descriptor}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # of another machine's numbers: to open a pipe might wait for ever
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if not _is_marked(descriptor, ticket):  # it may be anybody's file, which is not to be locked
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_size >= START + ticket.size and _is_marked(descriptor, ticket):
            reading = Reading(descriptor, ticket.size)
            descriptor = -1
            return reading
    except OSError:  # it is being begun anew; there is no memory
        pass
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return None


class Readings(AbstractContextManager["Readings"]):
    """The parcels of one batch, read until the block ends.

    Args:
        tickets: Where they are.

    Attributes:
        complete: Whether all of them were found.
    """

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._readings: list[Reading] = []
        for ticket in tickets:
            reading = read(ticket)
            if reading is None:
                break
            self._readings.append(reading)
        self.complete = len(self._readings) == len(tickets)

    @property
    def memories(self) -> list[memoryview]:
        """What is in each of them."""
        return [reading.memory for reading in self._readings]

    def __exit__(self, *exc: object) -> None:
        for reading in self._readings:
            reading.close()


def _is_marked(descriptor: int, ticket: Ticket) -> bool:
    return os.pread(descriptor, MARK, 0) == ticket.mark
