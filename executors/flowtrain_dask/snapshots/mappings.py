"""Files mapped into memory that keep no number of the file open: the memory of parcels.

Python's own `mmap` keeps the file open for as long as something refers to its memory. So here it maps memory of no
file, and the file is mapped over that at the same place. Python gives the memory back when nobody refers to it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import lru_cache
from typing import Any

__all__ = ["address_of", "mapped", "replace"]

_MAYMOVE, _FIXED = 1, 2  # of mremap, as Linux has them; Python does not name them
_OVER = 0x10  # MAP_FIXED of mmap


def mapped(length: int, descriptor: int, *, shared: bool) -> mmap.mmap:
    """Return the first bytes of a file as memory, which can be written to.

    Args:
        length: How many bytes.
        descriptor: The open file; it may be closed afterwards.
        shared: Whether what is written is seen by all that have the file, children that are forked included; otherwise
            it stays in this process.

    Raises:
        OSError: There is no memory.
    """
    memory = _ordinary(length)
    kind = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | _OVER
    found = _libc().mmap(address_of(memory), length, mmap.PROT_READ | mmap.PROT_WRITE, kind, descriptor, 0)
    if found != address_of(memory):
        raise _error("mmap", length)
    return memory


def replace(memory: mmap.mmap) -> None:
    """Put memory of this process in the place of what `mapped` returned, with the same in it.

    A thread that reads there meanwhile sees one or the other. What a thread writes there meanwhile may be lost: nobody
    may write.

    Raises:
        OSError: There is no memory.
    """
    address, length = address_of(memory), len(memory)
    libc = _libc()
    copy = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if copy is None or copy == ctypes.c_void_p(-1).value:
        raise _error("mmap", length)
    ctypes.memmove(copy, address, length)
    if libc.mremap(copy, length, length, _MAYMOVE | _FIXED, address) != address:
        error = _error("mremap", length)
        libc.munmap(copy, length)
        raise error


def address_of(memory: mmap.mmap) -> int:
    """Return where memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _ordinary(length: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OSError(error.errno, f"mmap of {length:,} bytes: {error.strerror}") from error


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


def _error(call: str, length: int) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call} of {length:,} bytes: {os.strerror(number)}")
