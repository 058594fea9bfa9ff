"""Reading parcels: how another process on the machine finds one, and reads it where it is.

What is read can be written to, and that stays in this process. While somebody reads, the parcel is used for nothing
else, so a reading ends when its batch is done. What a callback keeps of it becomes memory of this process then, at the
same address; what nobody keeps costs no copy.

A child that a handler forks reads on, perhaps long after the handler: it has the same lock, which ends with the child.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager

from flowtrain_dask.snapshots.mappings import mapped, replace
from flowtrain_dask.snapshots.parcels import MARK, NAME, START, Ticket, forks, possible

if sys.platform != "win32":
    import fcntl

__all__ = ["Reading", "Readings", "read"]


class Reading:
    """What is in a parcel, read where it is. It can be written to: that stays in this process.

    Args:
        descriptor: The file, opened and locked by this process, which it owns from here on.
        size: The bytes.
        before: What `forks` returned before the file was opened.

    Attributes:
        memory: What is in it.

    Raises:
        OSError: There is no memory.
    """

    _descriptor = -1

    def __init__(self, descriptor: int, size: int, before: int) -> None:
        memory = mapped(START + size, descriptor, shared=False)
        self._mapped = weakref.ref(memory)
        self._forks = before
        self.memory = memoryview(memory)[START:]
        self._descriptor = descriptor

    def close(self) -> None:
        """Let the parcel be used again. What still refers to its memory has a copy from here on, where it is.

        By then nobody writes to it any more: the batch is done.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        self.memory = memoryview(b"")
        memory = self._mapped()
        if memory is not None:
            try:
                replace(memory)
            except OSError:  # no memory: then it is read until nobody refers to it
                weakref.finalize(memory, os.close, descriptor).atexit = False
                return
        if self._forks == forks():  # otherwise a child may read on: the lock ends when it closes the file, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def read(ticket: Ticket) -> Reading | None:
    """Return what is in a parcel; ``None`` where it is not to be found, or something else is in it by now.

    It has to be closed: until then the parcel cannot be used again.

    Raises:
        OSError: There is no memory, or too many files are open.
    """
    if not possible():
        return None
    path = f"/proc/{ticket.process}/fd/{ticket.descriptor}"
    try:
        # On another machine, or in another container, these numbers are somebody's file, which is not to be touched.
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            return None
    except OSError:
        return None
    before = forks()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    try:
        if not _is_marked(descriptor, ticket):  # somebody else's by now, which is not to be locked
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_size >= START + ticket.size and _is_marked(descriptor, ticket):
            reading = Reading(descriptor, ticket.size, before)
            descriptor = -1
            return reading
    except BlockingIOError:  # it is being begun anew
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
        missing: Why not all of them can be read; empty if they can.
    """

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._readings: list[Reading] = []
        self.missing = ""
        for ticket in tickets:
            try:
                reading = read(ticket)
            except OSError as error:
                self.missing = f"{type(error).__name__}: {error}"
                return
            if reading is None:
                self.missing = "memory of the process that trains is not found"
                return
            self._readings.append(reading)

    @property
    def memories(self) -> list[memoryview]:
        """What is in each of them."""
        return [reading.memory for reading in self._readings]

    def __exit__(self, *exc: object) -> None:
        for reading in self._readings:
            reading.close()


def _is_marked(descriptor: int, ticket: Ticket) -> bool:
    return os.pread(descriptor, MARK, 0) == ticket.mark
