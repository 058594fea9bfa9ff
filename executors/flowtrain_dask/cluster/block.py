"""A block of memory through which a worker on the same machine gets a large batch.

dask sends a batch through the scheduler, which makes some ten copies of it. A block makes two: the training process
writes the bytes into a file that exists in memory only (``memfd_create``, Linux), and the worker opens this file
through ``/proc`` and copies the bytes out. When the training process dies, the memory is freed.

A block is filled again for the next batch without waiting for readers, because a worker may be stopped, taken for lost
and continue to read after another worker has done its batch. So a block begins with a mark, and each filling first
writes a new mark. A worker compares the mark after it has made its copy. If it is the mark that came with the call, the
block was not written meanwhile. Otherwise the copy may be torn and is not used.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from typing import NamedTuple

from flowtrain_dask.cluster.codec import memory_for

__all__ = ["Block", "BlockPlace", "possible", "read"]

_NAME = "flowtrain"
_MARK = 64
"""The bytes of a mark. The content follows the mark."""
_PIECES = 1000
"""How many pieces are written with one call of the system, which takes 1024 at most (``IOV_MAX`` of Linux)."""


class BlockPlace(NamedTuple):
    """The place where a worker finds the content of a block.

    Attributes:
        process: The id of the process that has the file open.
        descriptor: The file descriptor in that process.
        mark: The mark of this content.
        size: The bytes of the content, without the mark.
    """

    process: int
    descriptor: int
    mark: bytes
    size: int


def possible() -> bool:
    """Return whether this system has files that exist in memory only and that another process can open."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class Block:
    """Memory that holds one batch after another.

    Args:
        kept: How many bytes of memory are kept between two batches.

    Raises:
        OSError: The process has too many open files.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._descriptor = -1  # `close` runs even if the file cannot be made
        self._descriptor = os.memfd_create(_NAME)

    def fill(self, pieces: Sequence[bytes | memoryview]) -> BlockPlace:
        """Replace the content by the given pieces, one after another, and return the place of the content.

        Raises:
            OSError: The system has no memory left.
        """
        mark = secrets.token_bytes(_MARK)
        os.pwrite(self._descriptor, mark, 0)  # first, so that no reader takes a mixed content for the previous one
        rest, at = [memoryview(piece) for piece in pieces if len(piece)], _MARK
        while rest:
            written = os.pwritev(self._descriptor, rest[:_PIECES], at)  # releases the interpreter's lock
            at += written
            done = 0  # the system may write a part only: drop the pieces that are written whole, cut the next one
            while done < len(rest) and written >= len(rest[done]):
                written -= len(rest[done])
                done += 1
            rest = rest[done:]
            if written:
                rest[0] = rest[0][written:]
        return BlockPlace(os.getpid(), self._descriptor, mark, at - _MARK)

    def shrink(self) -> None:
        """Give back the memory of a batch that was larger than the memory that is kept."""
        if os.fstat(self._descriptor).st_size > self._kept:
            os.ftruncate(self._descriptor, self._kept)

    def close(self) -> None:
        """Give back all memory."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def read(place: BlockPlace) -> memoryview | None:
    """Return a copy of the content of a block, in memory from `memory_for`.

    ``None`` means that the block cannot be found from this process, or that it was filled again during the copy.
    """
    path = f"/proc/{place.process}/fd/{place.descriptor}"
    try:
        # On another machine or in another container these numbers can belong to any file, which must not be opened.
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
