"""Parcels: large batches for workers on the same machine, handed over in memory in place of being sent.

A parcel is a file that exists in memory only (``memfd_create``, Linux). Its writer keeps it open, a worker of the same
user opens it through ``/proc`` and maps it, with pages of its own for what it writes. So the bytes are copied once, by
the kernel, while Python is free to train, and they pass through no socket and no scheduler. When the writer dies,
nothing is left behind.

Nobody has to know beforehand who can be reached like that: a worker that cannot open a parcel says so.
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Parcel", "Ticket", "possible", "unpack"]

_PAGE = mmap.PAGESIZE
_MOST_PIECES = 512  # the system takes 1,024 at once


class Ticket(NamedTuple):
    """Where a parcel is.

    Attributes:
        process: The number of the process that keeps it open.
        descriptor: The number under which it does.
        size: Its bytes, without the first page.
        mark: What the first page begins with: another process or parcel may have the same numbers by now.
    """

    process: int
    descriptor: int
    size: int
    mark: bytes


def possible() -> bool:
    """Return whether this system has what parcels need."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class Parcel:
    """Bytes that another process on this machine can map.

    Args:
        pieces: The bytes, one piece after the other.

    Raises:
        OSError: There is no memory, or too many files are open.
    """

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        mark = secrets.token_bytes(16)
        self._descriptor = os.memfd_create("flowtrain")
        try:
            size = _write_all(self._descriptor, [mark, bytes(_PAGE - len(mark)), *pieces]) - _PAGE
        except BaseException:
            self.close()
            raise
        self.ticket = Ticket(os.getpid(), self._descriptor, size, mark)

    def close(self) -> None:
        """Give the memory back, as soon as nobody has it mapped."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def unpack(ticket: Ticket) -> memoryview | None:
    """Return the bytes of a parcel, to be written to as one likes; ``None`` if this process cannot get at it."""
    try:
        descriptor = os.open(f"/proc/{ticket.process}/fd/{ticket.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.pread(descriptor, len(ticket.mark), 0) != ticket.mark:
            return None
        if os.fstat(descriptor).st_size != _PAGE + ticket.size:
            return None
        # The views of it keep it mapped.
        return memoryview(mmap.mmap(descriptor, _PAGE + ticket.size, access=mmap.ACCESS_COPY))[_PAGE:]
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, pieces: Sequence[bytes | memoryview]) -> int:
    """Write pieces, however many the system takes at once; return their bytes."""
    left = [memoryview(piece) for piece in pieces if len(piece)]
    total = 0
    while left:
        written = os.writev(descriptor, left[:_MOST_PIECES])
        total += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if written:
            left[0] = left[0][written:]
    return total
