"""Memory from the operating system, as arrays of bytes that give it back when nobody refers to them any more.

Not by Python's `mmap`: that one keeps a number of the file open for as long as something refers to its memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import lru_cache
from typing import Any

__all__ = ["mapped", "replace"]

_MAYMOVE, _FIXED = 1, 2  # as Linux has them; Python does not name them


def mapped(length: int, descriptor: int, *, shared: bool) -> Any:
    """Return the first bytes of a file as an array of ctypes, which can be written to.

    Args:
        length: How many bytes.
        descriptor: The open file; it may be closed afterwards.
        shared: Whether what is written is seen by all that have the file; otherwise it stays in this process.

    Raises:
        OSError: There is no memory.
    """
    address = _map(length, mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE, descriptor)
    array = (ctypes.c_char * length).from_address(address)
    weakref.finalize(array, _libc().munmap, address, length).atexit = False
    return array


def replace(array: Any) -> None:
    """Put memory of this process in the place of what `mapped` returned, with the same in it.

    It happens at once: a thread that reads there meanwhile sees one or the other.

    Raises:
        OSError: There is no memory.
    """
    address, length = ctypes.addressof(array), len(array)
    copy = _map(length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    ctypes.memmove(copy, address, length)
    if _libc().mremap(copy, length, length, _MAYMOVE | _FIXED, address) != address:
        error = _error("mremap", length)
        _libc().munmap(copy, length)
        raise error


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
        raise _error("mmap", length)
    return address


def _error(call: str, length: int) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call} of {length:,} bytes: {os.strerror(number)}")
