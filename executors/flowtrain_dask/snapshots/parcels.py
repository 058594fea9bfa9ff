"""Parcels: memory that a worker on the same machine reads where it is, so that nothing large is sent.

A parcel is a file that exists in memory only (``memfd_create``, Linux). Its owner keeps it open; a worker of the same
user opens it through ``/proc``, see `flowtrain_dask.cluster.readings`. What is in it passes through no socket and no
scheduler. When the owner dies, nothing is left behind. Nobody has to know beforehand who can be reached like that: a
worker that cannot open a parcel says so.

There are two uses. A large snapshot is copied into a parcel to begin with, see `flowtrain_dask.snapshots.pool`: the
training thread makes the only copy there is. And a lane fills one with what else a large batch consists of.

A parcel is used again for something else, unless somebody reads it: a worker that was stopped in the middle may go on
long after its batch was done by another one. Who reads has a shared lock on the file (``flock``), and who begins anew
takes the exclusive one. The kernel gives a lock back when its process ends. Each beginning has a mark, which a reader
compares when it has the lock: what it was told of may be gone by then.

A child that is forked sees the memory of its parent's parcels, not a copy of it, and no count in the parent tells
whether it does. So what was in use when a child was forked is not used again (`Parcel.forks`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from flowtrain_dask.snapshots.mappings import address_of, mapped

if sys.platform != "win32":
    import fcntl

__all__ = ["MARK", "NAME", "START", "Parcel", "Ticket", "forks", "parcel_at", "possible"]

NAME = "flowtrain"
"""What its file is called."""

START = mmap.PAGESIZE
"""Where a parcel's content begins; its mark is before."""
MARK = 16
"""The bytes of a mark."""


class Ticket(NamedTuple):
    """Where a parcel is, and what for.

    Attributes:
        process: The number of the process that keeps it open.
        descriptor: The number under which it does.
        size: The bytes of its content.
        mark: What the file begins with, as long as this is its content.
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

    Args:
        nbytes: Room for so much; it grows when it is filled with more.

    Attributes:
        memory: The mark and, from `START` on, the content. Who refers to it keeps the memory, also when the parcel is
            closed.
        ticket: Where it is, from the first `renew` on.
        forks: What `forks` returned at the last `renew`.

    Raises:
        OSError: There are too many open files, or there is no memory.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._descriptor = -1
        self._process = os.getpid()
        self.forks = forks()
        self.memory: Any = b""
        self.ticket = Ticket(self._process, -1, 0, b"")
        self._descriptor = os.memfd_create(NAME)
        if nbytes:
            self._grow(nbytes)

    def renew(self, nbytes: int) -> Ticket:
        """Begin anew: what was in it is found by nobody any more. Return where the new content is.

        Args:
            nbytes: The bytes of what comes into it now.

        Raises:
            BlockingIOError: Somebody reads what is in it; or this is a child that was forked, whose parent has it.
            OSError: There is no memory.
        """
        if self._process != os.getpid():
            raise BlockingIOError(f"this memory belongs to process {self._process}, and this is {os.getpid()}")
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self._grow(nbytes)
            mark = secrets.token_bytes(MARK)
            self.memory[:MARK] = mark
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.forks = forks()
        self.ticket = Ticket(self._process, self._descriptor, nbytes, mark)
        return self.ticket

    def fill(self, pieces: Sequence[bytes | memoryview]) -> Ticket:
        """Begin anew with bytes, one piece after the other; return where they are.

        Raises:
            BlockingIOError: Somebody reads what is in it.
            OSError: There is no memory.
        """
        ticket = self.renew(sum([len(piece) for piece in pieces]))
        to, start = START, address_of(self.memory)
        for piece in pieces:  # all of it without the lock of the interpreter
            if isinstance(piece, bytes):
                ctypes.memmove(start + to, piece, len(piece))
            elif piece.readonly:
                _write(self._descriptor, piece, to)
            elif len(piece):
                ctypes.memmove(start + to, ctypes.byref(ctypes.c_char.from_buffer(piece)), len(piece))
            to += len(piece)
        return ticket

    @property
    def address(self) -> int:
        """Where its content begins in this process; 0 where it is closed or has no room yet."""
        memory = self.memory  # once: another thread may close it
        return address_of(memory) + START if memory else 0

    @property
    def size(self) -> int:
        """The bytes of memory that it has taken."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Let nobody find it any more, and give its memory back when nobody refers to that."""
        descriptor, self._descriptor = self._descriptor, -1
        self.memory = b""
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _grow(self, nbytes: int) -> None:
        """Have the memory for a content."""
        if len(self.memory) >= START + nbytes:
            return
        os.posix_fallocate(self._descriptor, 0, START + nbytes)  # what is only mapped fails when written to, for good
        self.memory = mapped(START + nbytes, self._descriptor, shared=True)
        _by_address[self.address] = self


def _write(descriptor: int, piece: memoryview, to: int) -> None:
    written = 0
    while written < len(piece):  # the system takes 2 GiB at once at most
        written += os.pwrite(descriptor, piece[written:], to + written)


def forks() -> int:
    """Return a number that is another one after each child that is forked."""
    return _forks


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    # Afterwards once more: what other threads do while the hooks of others run counts as before the fork.
    os.register_at_fork(before=_count_fork, after_in_parent=_count_fork)


_by_address: WeakValueDictionary[int, Parcel] = WeakValueDictionary()


def parcel_at(address: int) -> Parcel | None:
    """Return the parcel whose content begins at an address, if there is one and it is open."""
    found = _by_address.get(address)
    return found if found is not None and found.address == address else None
