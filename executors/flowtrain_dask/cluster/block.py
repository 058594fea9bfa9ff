"""A block of memory through which a worker on the same machine gets a large batch.

Dask sends a batch through the scheduler, which makes some ten copies of it. Here it takes two: the process that trains
writes the bytes into a file that exists in memory only (``memfd_create``, Linux), and the worker, which opens the file
through ``/proc``, copies them out. When the owner dies nothing is left behind.

A block is filled again for the next batch, whoever may still read: a worker that was stopped and taken for lost may go
on after its batch was done by another one. So the block begins with a mark, and each filling writes a new one before
anything else. A worker looks at the mark when it has made its copy. If that is the one that it was told, nobody has
written meanwhile; if it is another one, the copy may be torn and is not used.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from typing import NamedTuple

from flowtrain_dask.cluster.codec import memory_for

__all__ = ["Block", "Place", "possible", "read"]

_NAME = "flowtrain"
_MARK = 64
"""The bytes of a mark. The content begins behind it."""
_PIECES = 1000
"""The system writes some 1024 pieces at once, at most."""


class Place(NamedTuple):
    """Where a worker finds the content of a block.

    Attributes:
        process: The number of the process that keeps the file open.
        descriptor: The number of the open file in that process.
        mark: What the file begins with, as long as this is its content.
        size: The bytes of the content.
    """

    process: int
    descriptor: int
    mark: bytes
    size: int


def possible() -> bool:
    """Return whether this system has files that exist in memory only, and finds those of another process."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class Block:
    """Memory that holds one batch after the other.

    Args:
        kept: How many bytes of memory are kept between two batches.

    Raises:
        OSError: There are too many open files.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._descriptor = -1  # for `close`, should there be no file
        self._descriptor = os.memfd_create(_NAME)

    def fill(self, pieces: Sequence[bytes | memoryview]) -> Place:
        """Replace the content by some bytes, one piece after the other; return where they are.

        Raises:
            OSError: There is no memory.
        """
        mark = secrets.token_bytes(_MARK)
        os.pwrite(self._descriptor, mark, 0)  # first: from here on nobody takes the content for the one before
        rest, at = [memoryview(piece) for piece in pieces if len(piece)], _MARK
        while rest:
            written = os.pwritev(self._descriptor, rest[:_PIECES], at)  # without the interpreter's lock
            at += written
            done = 0
            while done < len(rest) and written >= len(rest[done]):
                written -= len(rest[done])
                done += 1
            rest = rest[done:]
            if written:
                rest[0] = rest[0][written:]
        return Place(os.getpid(), self._descriptor, mark, at - _MARK)

    def shrink(self) -> None:
        """Give back the memory of a large batch."""
        if os.fstat(self._descriptor).st_size > self._kept:
            os.ftruncate(self._descriptor, self._kept)

    def close(self) -> None:
        """Give back all memory."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def read(place: Place) -> memoryview | None:
    """Return a copy of the content of a block, in memory of `memory_for`; ``None`` if it is not found, or torn."""
    path = f"/proc/{place.process}/fd/{place.descriptor}"
    try:
        # On another machine, or in another container, these numbers are somebody's file, which is not to be touched.
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        memory, at = memory_for(place.size), 0
        while at < place.size and (copied := os.preadv(descriptor, [memory[at:]], _MARK + at)):
            at += copied
        return memory if at == place.size and os.pread(descriptor, _MARK, 0) == place.mark else None
    finally:
        os.close(descriptor)
