"""Memory that is used again and again: fresh memory costs more than the copy that goes into it.

The pool lends memory as tensors. It keeps the memory itself, and a tensor that was made from it, any view or numpy
array of that tensor included, holds a reference to it. So the number of references says whether it is in use, and
nobody can see a tensor change because somebody else released it: a callback may keep what it read for ever.

Memory is found again by the dtypes, shapes and strides of the tensors in it. What was not used for the longest time
goes first when the limit is reached; beyond the limit tensors are ordinary ones.

A pool that shares has its large memory in parcels: a worker on this machine reads what was copied there where it is.
That memory is in use as long as a worker reads it, too.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch

from flowtrain.errors import whole_number
from flowtrain_dask.snapshots.parcels import START, Parcel, forks, possible

__all__ = ["ALIGNMENT", "LARGE", "Pool", "aligned", "dense_strides"]

ALIGNMENT = 64
"""As torch aligns its own memory: what a matrix product gives in the last bit may depend on it."""

_SMALL = 1024
"""Bytes below which ordinary memory is as quick."""

LARGE = 1 << 20
"""Bytes from which on a pool that shares lends a parcel: each is an open file."""

_PARCELS = 64
"""The most parcels of one pool."""

_LOOKS = 8
"""How many kinds of memory are looked at for some to give up, each time."""

_Shape: TypeAlias = "tuple[torch.dtype, torch.Size, tuple[int, ...] | None]"
_Key: TypeAlias = "tuple[bool, tuple[_Shape, ...]]"


class _Memory:
    """A piece of memory.

    Args:
        nbytes: Its size.
        make: Where it is from.

    Attributes:
        buffer: What has it. Who uses the memory refers to this.
        offset: Where it begins in that.
        parcel: The parcel that it is the content of, if it is one.

    Raises:
        OSError: There is no parcel to be had.
    """

    __slots__ = ("_idle", "_nbytes", "buffer", "offset", "parcel")

    def __init__(self, nbytes: int, make: Literal["ordinary", "pinned", "parcel"]) -> None:
        self._nbytes = nbytes
        self.parcel: Parcel | None = None
        if make == "parcel":
            self._begin_parcel()
        else:
            self.buffer, self.offset = _pinned(nbytes) if make == "pinned" else aligned(nbytes)
        self._idle = sys.getrefcount(self.buffer)  # measured: what counts as a reference differs between Pythons

    def is_unused(self) -> bool:
        """Return whether nobody in this process uses it."""
        return sys.getrefcount(self.buffer) <= self._idle

    def begin_anew(self) -> bool:
        """Make it ready to be lent, if nobody uses it; return whether it is."""
        if not self.is_unused():
            return False
        try:
            if self.parcel is not None and self.parcel.forks != forks():
                self._begin_parcel()  # a child may use what is in the other one: that stays to it
            elif self.parcel is not None:
                self.parcel.renew(self._nbytes)
        except OSError:  # a worker reads it, or there is no other
            return False
        return True

    def _begin_parcel(self) -> None:
        parcel = Parcel(self._nbytes)
        parcel.renew(self._nbytes)
        self.buffer, self.offset, self.parcel = parcel.memory, START, parcel


class _Kind:
    """The memory for tensors of certain shapes, the one that was lent longest ago first."""

    __slots__ = ("_dtypes", "_parts", "memories", "nbytes")

    def __init__(self, shapes: tuple[_Shape, ...]) -> None:
        self.memories: deque[_Memory] = deque()
        self.nbytes = 0
        self._dtypes = list(dict.fromkeys(dtype for dtype, _, _ in shapes))
        self._parts: list[tuple[int, torch.Size, tuple[int, ...], int]] = []
        for dtype, shape, strides in shapes:
            if strides is None:
                strides = torch.empty(shape, device="meta").stride()
            elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            self._parts.append((self._dtypes.index(dtype), shape, strides, self.nbytes // dtype.itemsize))
            self.nbytes += elements * dtype.itemsize
            self.nbytes += -self.nbytes % ALIGNMENT

    def find(self, fits: Callable[[_Memory], bool]) -> _Memory | None:
        """Return memory that fits, if one of the first two does: more may be kept for ever by a callback."""
        for _ in range(min(2, len(self.memories))):
            self.memories.rotate(-1)
            if fits(self.memories[-1]):
                return self.memories[-1]
        return None

    def flats(self, memory: _Memory) -> list[torch.Tensor]:
        """Return all of the memory as each dtype."""
        return [
            torch.frombuffer(memory.buffer, dtype=dtype, count=self.nbytes // dtype.itemsize, offset=memory.offset)
            for dtype in self._dtypes
        ]

    def tensors(self, flats: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors in some memory."""
        return [flats[which].as_strided(shape, strides, start) for which, shape, strides, start in self._parts]


class Pool:
    """Lends tensors for copies.

    Args:
        limit_bytes: How much memory it keeps, in bytes, lent or not.
        share: Whether large memory is in parcels, where the system has such.

    Raises:
        UsageError: The limit is no number of bytes.
    """

    def __init__(self, limit_bytes: int, *, share: bool = False) -> None:
        self.limit_bytes = whole_number("Pool(): limit_bytes", limit_bytes, least=0)
        self._kinds: OrderedDict[_Key, _Kind] = OrderedDict()
        self._nbytes = 0
        self._share = share and possible()
        self._parcels = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes that it keeps."""
        return self._nbytes

    def like(self, source: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
        """Return one tensor as `like_all` does."""
        return self.like_all([source], pinned=pinned)[0]

    def like_all(self, sources: Sequence[torch.Tensor], *, pinned: bool = False) -> list[torch.Tensor]:
        """Return tensors in this process's memory, not filled, with the dtypes, shapes and strides of `sources`.

        Where a source has gaps or overlaps, the strides are those of a contiguous tensor (`dense_strides`). All of
        them lie in one piece of memory, which is in use as long as one of them is.

        Args:
            sources: Strided tensors, not quantised.
            pinned: Whether the memory is pinned, for copies from a CUDA device.
        """
        shapes = tuple(
            [
                (source.dtype, source.shape, None if source.is_contiguous() else dense_strides(source))
                for source in sources
            ]
        )
        nbytes = sum([source.nbytes for source in sources])
        if nbytes < _SMALL and not (pinned and nbytes):
            return [_ordinary(*shape, pinned=False) for shape in shapes]
        key = (pinned, shapes)
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = _Kind(shapes)
            else:
                self._kinds.move_to_end(key)
            found = kind.find(_Memory.begin_anew) or self._add(kind, pinned)
            if found is None:
                return [_ordinary(*shape, pinned=pinned) for shape in shapes]
            flats = kind.flats(found)  # from here on the memory is in use
        return kind.tensors(flats)

    def clear(self) -> None:
        """Keep nothing any more. What is lent stays as it is."""
        with self._lock:
            self._kinds.clear()
            self._nbytes = self._parcels = 0

    def _add(self, kind: _Kind, pinned: bool) -> _Memory | None:
        """Get new memory of a kind, if there is room."""
        if not self._room(kind.nbytes):
            return None
        shares = self._share and not pinned and kind.nbytes >= LARGE and self._parcels < _PARCELS
        try:
            found = _Memory(kind.nbytes, "parcel" if shares else "pinned" if pinned else "ordinary")
            self._parcels += shares
        except OSError:  # too many open files
            found = _Memory(kind.nbytes, "ordinary")
        kind.memories.append(found)
        self._nbytes += kind.nbytes
        return found

    def _room(self, nbytes: int) -> bool:
        """Make room within the limit, of what was not used for the longest time; tell whether there is."""
        for _ in range(_LOOKS):
            if self._nbytes + nbytes <= self.limit_bytes or not self._kinds:
                break
            key, kind = next(iter(self._kinds.items()))
            if not kind.memories:
                del self._kinds[key]
                continue
            if kind.find(_Memory.is_unused) is None:
                self._kinds.move_to_end(key)
                continue
            self._parcels -= kind.memories.pop().parcel is not None  # the one that was found
            self._nbytes -= kind.nbytes
        return self._nbytes + nbytes <= self.limit_bytes


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the strides that a copy keeps, ``None`` for those of a contiguous tensor.

    A sum may differ in its last bits with other strides, so a copy keeps them: all but those with more gaps than
    elements, and those by which elements overlap.
    """
    shape, strides = tensor.shape, tensor.stride()
    extent = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride < extent:
                return None
            extent = stride * (size - 1) + extent
    return strides if extent <= 2 * tensor.numel() else None


def _ordinary(dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...] | None, *, pinned: bool) -> torch.Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu", pin_memory=pinned)


def aligned(nbytes: int) -> tuple[Any, int]:
    """Return new memory with room for some bytes, and the offset at which it is aligned."""
    memory = bytearray(nbytes + ALIGNMENT)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -address % ALIGNMENT


def _pinned(nbytes: int) -> tuple[Any, int]:
    owner = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    memory: Any = (ctypes.c_char * nbytes).from_address(owner.data_ptr())
    memory.owner = owner  # as long as the memory is known, it is there
    return memory, 0
