"""Events and snapshots as bytes, for another process, and back.

A blob is a pickle (protocol 5, by cloudpickle) and the buffers that it refers to::

    b"FTB2"  number of buffers, size of pickle  size, place of each  pickle  buffer  buffer ...     (each part aligned)

The place of a buffer is 0; or it is not among them, and lies at the beginning of the parcel with this number, from 1.
Buffers of `LARGE` bytes and more are used where they are, on either side. Smaller ones are copied where objects are
made again: who keeps one of these keeps that alone, and not the memory of a whole batch.

How tensors and other values are taken apart says `flowtrain_dask.cluster.reducing`.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from flowtrain_dask.cluster.reducing import ValuePickler
from flowtrain_dask.snapshots.parcels import Parcel, parcel_at
from flowtrain_dask.snapshots.pool import ALIGNMENT, LARGE, aligned

__all__ = ["Encoded", "decode", "encode"]

_MAGIC = b"FTB2"


class Encoded:
    """An object as bytes: a head, and the buffers, which are where the object has them.

    Args:
        obj: The object; it must not change as long as the buffers are used.
        share: Whether what is in a parcel already is left there.

    Attributes:
        head: What comes before the buffers.
        buffers: The buffers, each followed by what aligns the next one.
        parcels: Where the buffers are that are left in parcels, each at the beginning of one.
        nbytes: The bytes of the head and the buffers, without what is in parcels.

    Raises:
        TypeError: Something in it can be sent to no other process.
    """

    def __init__(self, obj: object, *, share: bool = False) -> None:
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        self._pickler = ValuePickler(file, buffers.append)  # it keeps alive what the buffers show
        self._pickler.dump(obj)
        pickled, parts = file.getbuffer(), [buffer.raw() for buffer in buffers]
        found = [_parcel_of(part) if share else None for part in parts]
        self.parcels = list(dict.fromkeys(parcel for parcel in found if parcel is not None))
        places = [0 if parcel is None else 1 + self.parcels.index(parcel) for parcel in found]
        sizes = [number for part, place in zip(parts, places, strict=True) for number in (part.nbytes, place)]
        head = _MAGIC + struct.pack(f"<{len(sizes) + 2}Q", len(parts), pickled.nbytes, *sizes)
        self.head = b"".join(_aligned(head, pickled))
        self.buffers = _aligned(*(part for part, place in zip(parts, places, strict=True) if not place))
        self.nbytes = len(self.head) + sum(len(each) for each in self.buffers)

    def __bytes__(self) -> bytes:
        return b"".join((self.head, *self.buffers))


def encode(obj: object) -> bytes:
    """Return an object as bytes, see `Encoded`.

    Raises:
        TypeError: Something in it can be sent to no other process.
    """
    return bytes(Encoded(obj))


def decode(
    blob: bytes | bytearray | memoryview, buffers: memoryview | None = None, parcels: Sequence[memoryview] = ()
) -> Any:
    """Return the object of a blob.

    Args:
        blob: What `encode` returned, or `Encoded.head`; it is copied.
        buffers: With a head, `Encoded.buffers` in one: what is large in the object keeps that as its memory. So it is
            aligned, and can be written to.
        parcels: The content of `Encoded.parcels`, likewise.

    Raises:
        ValueError: It is no blob of this codec.
    """
    source = memoryview(blob)
    if bytes(source[:4]) != _MAGIC or source.nbytes < 20:
        raise ValueError(
            f"this is no blob of flowtrain's codec: it begins with {bytes(source[:4])!r}, not with {_MAGIC!r}. "
            f"Both sides must have the same version of flowtrain."
        )
    view = _copy_of(source)
    count, pickled = struct.unpack_from("<2Q", view, 4)
    sizes = struct.unpack_from(f"<{2 * count}Q", view, 20)
    start = _after(20 + 16 * count)
    first = view[start : start + pickled]
    rest = view[start + _after(pickled) :] if buffers is None else buffers
    return pickle.loads(first, buffers=_parts(rest, parcels, sizes[::2], sizes[1::2]))


def _copy_of(source: memoryview) -> memoryview:
    memory, start = aligned(source.nbytes)  # bytes cannot be written into, and may begin anywhere
    view = memoryview(memory)[start : start + source.nbytes]
    view[:] = source
    return view


def _parcel_of(part: memoryview) -> Parcel | None:
    return None if part.readonly or not part.nbytes else parcel_at(ctypes.addressof(ctypes.c_char.from_buffer(part)))


def _parts(
    view: memoryview, parcels: Sequence[memoryview], sizes: Sequence[int], places: Sequence[int]
) -> Iterator[memoryview]:
    start = 0
    for size, place in zip(sizes, places, strict=True):
        part = parcels[place - 1][:size] if place else view[start : start + size]
        yield _copy_of(part) if size < LARGE else part
        start += 0 if place else _after(size)


def _aligned(*parts: bytes | memoryview) -> list[bytes | memoryview]:
    """Return parts with what aligns the next one after each."""
    return [piece for part in parts for piece in (part, bytes(_after(len(part)) - len(part)))]


def _after(size: int) -> int:
    """Return where the next part begins after one of that size."""
    return size + -size % ALIGNMENT
