"""Parcels: what is large goes to a worker on the same machine in memory, and is not sent.

A parcel is a file that exists in memory only (``memfd_create``, Linux). Its writer keeps it open; a worker of the same
user opens it through ``/proc`` and reads it. So the bytes are copied once on either side, by the kernel, while Python
is free to train, and they pass through no socket and no scheduler. When the writer dies, nothing is left behind.

Nobody has to know beforehand who can be reached like that: a worker that cannot open a parcel says so.

A parcel is filled again when nobody waits for a worker that reads it. A worker that was stopped in the middle may still
do so: every filling has a mark, which the worker compares when it has read all of it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from typing import NamedTuple

from flowtrain_dask.pool import aligned

__all__ = ["Parcel", "Ticket", "possible", "unpack"]

_PAGE = mmap.PAGESIZE
_MARK = 16
_MOST_PIECES = 512  # the system takes 1,024 at once


class Ticket(NamedTuple):
    """Where a parcel is.

    Attributes:
        process: The number of the process that keeps it open.
        descriptor: The number under which it does.
        size: Its bytes, without the first page.
        mark: What the first page begins with.
    """

    process: int
    descriptor: int
    size: int
    mark: bytes


def possible() -> bool:
    """Return whether this system has what parcels need."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class Parcel:
    """Memory that another process on this machine can read.

    Raises:
        OSError: There are too many open files.
    """

    def __init__(self) -> None:
        self._descriptor = -1
        self._descriptor = os.memfd_create("flowtrain")

    def fill(self, pieces: Sequence[bytes | memoryview]) -> Ticket:
        """Put bytes into it, one piece after the other, in place of what is there; return where they are.

        Raises:
            OSError: There is no memory.
        """
        mark = secrets.token_bytes(_MARK)
        # The mark first, so that nobody takes for the old bytes what comes now.
        os.pwrite(self._descriptor, mark.ljust(_PAGE, b"\0"), 0)
        os.lseek(self._descriptor, _PAGE, os.SEEK_SET)
        size = _write_all(self._descriptor, pieces)
        return Ticket(os.getpid(), self._descriptor, size, mark)

    @property
    def size(self) -> int:
        """The bytes of memory that it has taken."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Give the memory back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def unpack(ticket: Ticket) -> memoryview | None:
    """Return a copy of what is in a parcel; ``None`` if this process cannot get at it, or it was filled again.

    A copy, because who reads it may keep what it reads.
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
        if os.fstat(descriptor).st_size < _PAGE + ticket.size or not _is_marked(descriptor, ticket):
            return None
        memory, start = aligned(ticket.size)
        copy = memoryview(memory)[start : start + ticket.size]
        done = 0
        while done < ticket.size:
            done += os.preadv(descriptor, [copy[done:]], _PAGE + done)
        return copy if _is_marked(descriptor, ticket) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _is_marked(descriptor: int, ticket: Ticket) -> bool:
    return os.pread(descriptor, _MARK, 0) == ticket.mark


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
