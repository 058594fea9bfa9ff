"""Memory that is used again and again: fresh memory costs more than the copy that goes into it.

The pool lends memory as tensors. It keeps the memory itself, and a tensor that was made from it, any view or numpy
array of that tensor included, holds a reference to it. So the number of references says whether it is in use, and
nobody can see a tensor change because somebody else released it: a callback may keep what it read for ever.

Memory is found again by the dtypes, shapes and strides of the tensors in it. What was not used for the longest time
goes first when the limit is reached; beyond the limit tensors are ordinary ones.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from flowtrain.errors import whole_number

__all__ = ["ALIGNMENT", "Pool", "aligned", "dense_strides"]

ALIGNMENT = 64
"""As torch aligns its own memory: what a matrix product gives in the last bit may depend on it."""

_SMALL = 1024
"""Bytes below which ordinary memory is as quick."""

_LOOKS = 8
"""How many kinds of memory are looked at for some to give up, each time."""

_Shape: TypeAlias = "tuple[torch.dtype, torch.Size, tuple[int, ...] | None]"
_Key: TypeAlias = "tuple[bool, tuple[_Shape, ...]]"


class _Memory:
    """A piece of memory.

    Args:
        nbytes: Its size.
        pinned: Whether it is pinned.

    Attributes:
        buffer: The object that has the memory. Everybody who uses the memory refers to this.
        offset: Where the memory begins in that.
    """

    __slots__ = ("_idle", "buffer", "offset")

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.buffer, self.offset = _pinned(nbytes) if pinned else aligned(nbytes)
        self._idle = sys.getrefcount(self.buffer)  # measured: what counts as a reference differs between Pythons

    def is_unused(self) -> bool:
        """Return whether nobody uses it."""
        return sys.getrefcount(self.buffer) <= self._idle


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

    def find_unused(self) -> _Memory | None:
        """Return memory that nobody uses, if one of the first two is: more may be kept for ever by a callback."""
        for _ in range(min(2, len(self.memories))):
            self.memories.rotate(-1)
            if self.memories[-1].is_unused():
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

    Raises:
        UsageError: The limit is no number of bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = whole_number("Pool(): limit_bytes", limit_bytes, least=0)
        self._kinds: OrderedDict[_Key, _Kind] = OrderedDict()
        self._nbytes = 0
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
            pinned: Whether the memory is pinned, for copies from an accelerator.
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
            found = kind.find_unused() or self._add(kind, pinned)
            if found is None:
                return [_ordinary(*shape, pinned=pinned) for shape in shapes]
            flats = kind.flats(found)  # from here on the memory is in use
        return kind.tensors(flats)

    def clear(self) -> None:
        """Keep nothing any more. What is lent stays as it is."""
        with self._lock:
            self._kinds.clear()
            self._nbytes = 0

    def _add(self, kind: _Kind, pinned: bool) -> _Memory | None:
        """Get new memory of a kind, if there is room."""
        if not self._room(kind.nbytes):
            return None
        found = _Memory(kind.nbytes, pinned)
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
            if kind.find_unused() is None:
                self._kinds.move_to_end(key)
                continue
            kind.memories.pop()  # the one that was found
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
