"""Events with their snapshots as bytes, for another process, and back: dask sees neither these nor the user's types.

A blob is a pickle (protocol 5, by cloudpickle) and the buffers that it refers to::

    b"FTB3"  number of buffers, size of pickle, size of each buffer  pickle  buffer  buffer ...     (each part aligned)

Buffers of a mebibyte and more are used where they are, on either side. Smaller ones are copied where objects are made
again: a callback that keeps one of these keeps that alone, and not the memory of a whole batch.

How tensors and other values are taken apart says `flowtrain_dask.cluster.pickling`.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flowtrain_dask.cluster.pickling import ValuePickler
from flowtrain_dask.lanes.work import Entry, opened
from flowtrain_dask.snapshots.pool import ALIGNMENT, aligned
from flowtrain_dask.snapshots.series import Tail, tails_of

__all__ = ["Encoded", "decode", "dump_entries", "encode", "load_entries", "memory_for"]

_MAGIC = b"FTB3"
_LARGE = 1 << 20


class Encoded:
    """An object as bytes, most of which stay where the object has them.

    Args:
        obj: The object; it must not change as long as the pieces are used.
        tails: The values that the series in it share, see `flowtrain_dask.snapshots.series.tails_of`.
        pickler: The class of the pickler.

    Attributes:
        pieces: The bytes, one piece after the other; the buffers among them are the memory of the object.
        nbytes: The bytes of all pieces.

    Raises:
        TypeError: Something in it can be sent to no other process.
    """

    def __init__(
        self, obj: object, tails: Mapping[int, Tail] | None = None, pickler: type[ValuePickler] = ValuePickler
    ) -> None:
        # Protocol 5 of pickle hands out large pieces of memory apart, so they are sent from where they lie.
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        self._pickler = pickler(file, buffers.append, tails)  # it keeps the memory of the buffers alive
        self._pickler.dump(obj)
        parts = [file.getbuffer(), *(buffer.raw() for buffer in buffers)]
        head = _MAGIC + struct.pack(f"<{len(parts) + 1}Q", len(buffers), *(part.nbytes for part in parts))
        self.pieces = _aligned(head, *parts)
        self.nbytes = sum(len(piece) for piece in self.pieces)

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)


def dump_entries(entries: Sequence[Entry], pickler: type[ValuePickler] = ValuePickler) -> Encoded:
    """Return the events of a batch as bytes; a copy that several of them share is in there once."""
    payloads = [opened(entry.payload) for entry in entries]
    # The rows are plain tuples, because named tuples take many times as long to pickle.
    # Context variables stay here: most of them hold what only this process can use.
    rows = [(*entry[:4], payload, *entry[5:10]) for entry, payload in zip(entries, payloads, strict=True)]
    return Encoded(rows, tails_of(payloads), pickler)


def load_entries(blob: bytes | memoryview) -> list[Entry]:
    """Return the events of `dump_entries`, see `decode`."""
    return [Entry(*row) for row in decode(blob)]


def encode(obj: object) -> bytes:
    """Return an object as bytes, see `Encoded`.

    Raises:
        TypeError: Something in it can be sent to no other process.
    """
    return bytes(Encoded(obj))


def decode(blob: bytes | memoryview, loads: Callable[..., Any] = pickle.loads) -> Any:
    """Return the object of a blob.

    Args:
        blob: The bytes, which are copied; or memory of `memory_for` that holds them, which the large parts of the
            object keep as theirs.
        loads: The function that unpickles.

    Raises:
        ValueError: It is no blob of this codec.
    """
    memory = blob if isinstance(blob, memoryview) else memory_for(len(blob))
    if memory is not blob:
        # The object gets aligned memory of its own, to which it may write.
        memory[:] = blob
    if bytes(memory[:4]) != _MAGIC or memory.nbytes < 20:
        raise ValueError(
            f"this is no blob of flowtrain's codec: it begins with {bytes(memory[:4])!r}, not with {_MAGIC!r}. "
            f"Both sides must have the same version of flowtrain."
        )
    count, pickled = struct.unpack_from("<2Q", memory, 4)
    sizes = struct.unpack_from(f"<{count}Q", memory, 20)
    start = _after(20 + 8 * count)
    return loads(memory[start : start + pickled], buffers=_buffers(memory, start + _after(pickled), sizes))


def memory_for(size: int) -> memoryview:
    """Return new memory of some bytes, aligned as torch aligns its own."""
    memory, start = aligned(size)
    return memoryview(memory)[start : start + size]


def _buffers(memory: memoryview, start: int, sizes: Sequence[int]) -> Iterator[memoryview]:
    for size in sizes:
        part = memory[start : start + size]
        start += _after(size)
        if size < _LARGE:
            # A small part is copied: a number that a callback keeps would otherwise keep the memory of the whole batch.
            part, shared = memory_for(size), part
            part[:] = shared
        yield part


def _aligned(*parts: bytes | memoryview) -> list[bytes | memoryview]:
    """Return each part with the padding that aligns the next one."""
    return [piece for part in parts for piece in (part, bytes(_after(len(part)) - len(part)))]


def _after(size: int) -> int:
    """Return where the next part begins after one of that size."""
    return size + -size % ALIGNMENT
