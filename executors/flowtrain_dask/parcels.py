"""Parcels: what is large goes to a worker on the same machine in memory, and is not sent.

A parcel is a file that exists in memory only (``memfd_create``, Linux). Its writer keeps it open; a worker of the same
user opens it through ``/proc`` and reads it where it is. So the bytes are copied once, while Python is free to train,
and they pass through no socket and no scheduler. When the writer dies, nothing is left behind.

Nobody has to know beforehand who can be reached like that: a worker that cannot open a parcel says so.

A parcel is filled again for a later batch, unless somebody reads it: a worker that was stopped in the middle may go on
long after its batch was done by another one. Who reads has a shared lock on the file (``flock``), and who fills has the
exclusive one. The kernel gives a lock back when its process ends. Each filling has a mark, which a reader compares when
it has the lock: what it was told of may be gone by then.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import stat
import sys
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

if sys.platform != "win32":
    import fcntl

__all__ = ["Parcel", "Reading", "Ticket", "possible", "read"]

_PAGE = mmap.PAGESIZE
_MARK = 16


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
        self._mapping: mmap.mmap | None = None
        self._descriptor = os.memfd_create("flowtrain")

    def fill(self, pieces: Sequence[bytes | memoryview]) -> Ticket:
        """Put bytes into it, one piece after the other, in place of what is there; return where they are.

        Raises:
            BlockingIOError: Somebody reads what is in it.
            OSError: There is no memory.
        """
        size = sum([len(piece) for piece in pieces])
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            mapping = self._mapped(_PAGE + size)
            mark = secrets.token_bytes(_MARK)
            mapping[:_MARK] = mark
            to, start = _PAGE, ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            for piece in pieces:  # all of it without the lock of the interpreter
                if isinstance(piece, bytes):
                    ctypes.memmove(start + to, piece, len(piece))
                elif piece.readonly:
                    os.pwrite(self._descriptor, piece, to)
                elif len(piece):
                    ctypes.memmove(start + to, ctypes.byref(ctypes.c_char.from_buffer(piece)), len(piece))
                to += len(piece)
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return Ticket(os.getpid(), self._descriptor, size, mark)

    def _mapped(self, size: int) -> mmap.mmap:
        """Return the memory of the file, at least so many bytes of it."""
        if self._mapping is None or len(self._mapping) < size:
            os.posix_fallocate(self._descriptor, 0, size)  # what is only mapped fails when it is written to, for good
            self._mapping = mmap.mmap(self._descriptor, size)
        return self._mapping

    @property
    def size(self) -> int:
        """The bytes of memory that it has taken."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Give the memory back."""
        descriptor, self._descriptor = self._descriptor, -1
        self._mapping = None
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


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
        # Not by Python's mmap: that one keeps a number of the file open as long as something refers to its memory.
        self._length = _PAGE + size
        self._address = _map(self._length, mmap.MAP_PRIVATE, descriptor)
        array = (ctypes.c_char * self._length).from_address(self._address)
        weakref.finalize(array, _libc().munmap, self._address, self._length).atexit = False
        self._array = weakref.ref(array)
        self._own = False
        self._process = os.getpid()
        self.memory = memoryview(array).cast("B")[_PAGE:]
        self._descriptor = descriptor
        _readings.add(self)

    def own(self) -> None:
        """Put memory of this process in the place of the parcel's, with the same in it, if something refers to it.

        Raises:
            OSError: There is no memory.
        """
        array = self._array()
        if array is not None and not self._own:
            copy = _map(self._length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            ctypes.memmove(copy, self._address, self._length)
            # At once: a thread that reads there meanwhile sees one or the other.
            if _libc().mremap(copy, self._length, self._length, _MAYMOVE | _FIXED, self._address) != self._address:
                _libc().munmap(copy, self._length)
                raise _error()
            self._own = True

    def close(self) -> None:
        """Let the parcel be filled again. What still refers to its memory has a copy from here on, where it is."""
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
    """Leave a child that is being forked nothing that somebody fills again."""
    for reading in list(_readings):
        reading.own()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_own_all)


_MAYMOVE, _FIXED = 1, 2


@lru_cache(maxsize=1)
def _libc() -> Any:
    """Return the C library, with the types of what is called."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.argtypes = (address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.munmap.argtypes = (address, size)
    libc.mremap.argtypes = (address, size, size, ctypes.c_int, address)
    libc.mmap.restype = libc.mremap.restype = address
    return libc


def _map(length: int, flags: int, descriptor: int) -> int:
    address: int | None = _libc().mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _error()
    return address


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def read(ticket: Ticket) -> Reading | None:
    """Return what is in a parcel; ``None`` if this process cannot get at it, or it was filled again.

    It has to be closed: until then the parcel cannot be filled again.
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
        if os.fstat(descriptor).st_size >= _PAGE + ticket.size and _is_marked(descriptor, ticket):
            reading = Reading(descriptor, ticket.size)
            descriptor = -1
            return reading
    except OSError:  # it is being filled; there is no memory
        pass
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return None


def _is_marked(descriptor: int, ticket: Ticket) -> bool:
    return os.pread(descriptor, _MARK, 0) == ticket.mark
