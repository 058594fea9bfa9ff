"""Reused memory for copies, because getting fresh memory takes longer than copying into it.

The pool gives out tensors and keeps their memory. Each tensor, and any view or numpy array of it, holds a reference to
its memory, so the number of references tells whether the memory is in use. A callback may keep a tensor for ever: its
memory is not reused as long as a reference exists.

Memory is found by the dtypes, shapes and strides of the tensors in it. When the limit is reached, the memory that was
not used for the longest time is freed first. Beyond the limit, tensors get ordinary memory.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from flowtrain.errors.arguments import whole_number

__all__ = ["ALIGNMENT", "Pool", "aligned", "dense_strides"]

ALIGNMENT = 64
"""The alignment of torch's own memory in bytes. The last bits of a matrix product may depend on it."""

_SMALL = 1024
"""Bytes. Below this size ordinary memory is as fast."""

_LOOKS = 8
"""How many kinds of memory are examined when some must be freed."""

_Shape: TypeAlias = "tuple[torch.dtype, torch.Size, tuple[int, ...] | None]"
_Key: TypeAlias = "tuple[bool, tuple[_Shape, ...]]"


class _Memory:
    """A piece of memory.

    Args:
        nbytes: Its size in bytes.
        pinned: Whether it is pinned.

    Attributes:
        buffer: The object that owns the memory. Every tensor in the memory refers to it.
        offset: The offset in bytes at which the memory begins in `buffer`.
    """

    __slots__ = ("_idle", "buffer", "offset")

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.buffer, self.offset = _pinned(nbytes) if pinned else aligned(nbytes)
        self._idle = sys.getrefcount(self.buffer)  # measured, since versions of Python count references differently

    def is_unused(self) -> bool:
        """Return whether no tensor uses the memory."""
        return sys.getrefcount(self.buffer) <= self._idle


class _Kind:
    """The pieces of memory for tensors of the same dtypes, shapes and strides, ordered by their last use."""

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
        """Return memory that is not in use, or ``None``. Only two pieces are examined, as a callback may keep many."""
        for _ in range(min(2, len(self.memories))):
            self.memories.rotate(-1)
            if self.memories[-1].is_unused():
                return self.memories[-1]
        return None

    def flats(self, memory: _Memory) -> list[torch.Tensor]:
        """Return the whole memory as one flat tensor for each dtype."""
        return [
            torch.frombuffer(memory.buffer, dtype=dtype, count=self.nbytes // dtype.itemsize, offset=memory.offset)
            for dtype in self._dtypes
        ]

    def tensors(self, flats: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors of this kind as views of the flat tensors."""
        return [flats[which].as_strided(shape, strides, start) for which, shape, strides, start in self._parts]


class Pool:
    """Gives out tensors for copies, in memory that is reused.

    Args:
        limit_bytes: The most bytes of memory that the pool keeps, in use or not.

    Raises:
        UsageError: The limit is no whole number of bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = whole_number("Pool(): limit_bytes", limit_bytes, least=0)
        self._kinds: OrderedDict[_Key, _Kind] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the pool keeps."""
        return self._nbytes

    def like(self, source: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
        """Return a tensor like one tensor; see `like_all`."""
        return self.like_all([source], pinned=pinned)[0]

    def like_all(self, sources: Sequence[torch.Tensor], *, pinned: bool = False) -> list[torch.Tensor]:
        """Return uninitialised CPU tensors with the dtypes, shapes and strides of `sources`.

        If a source has gaps or overlaps, its tensor has the strides of a contiguous one (`dense_strides`). All tensors
        lie in one piece of memory, which is in use as long as one of them is.

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
        if nbytes < _SMALL and not (pinned and nbytes):  # a copy that nobody waits for needs pinned memory of any size
            return [_ordinary(*shape, pinned=False) for shape in shapes]
        key = (pinned, shapes)
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = self._kinds[key] = _Kind(shapes)
            else:
                self._kinds.move_to_end(key)
            found = kind.find_unused() or self._add(kind, pinned)
            if found is None:  # the limit is reached
                return [_ordinary(*shape, pinned=pinned) for shape in shapes]
            flats = kind.flats(found)  # from here on the memory is in use
        return kind.tensors(flats)

    def clear(self) -> None:
        """Free all memory that is kept. Tensors that were given out keep theirs."""
        with self._lock:
            self._kinds.clear()
            self._nbytes = 0

    def _add(self, kind: _Kind, pinned: bool) -> _Memory | None:
        """Return new memory of a kind, or ``None`` if there is no room for it."""
        if not self._room(kind.nbytes):
            return None
        found = _Memory(kind.nbytes, pinned)
        kind.memories.append(found)
        self._nbytes += kind.nbytes
        return found

    def _room(self, nbytes: int) -> bool:
        """Free memory that was not used for the longest time; return whether there is room for so many bytes."""
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
            kind.memories.pop()  # `find_unused` has put it last
            self._nbytes -= kind.nbytes
        return self._nbytes + nbytes <= self.limit_bytes


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the strides for a copy of a tensor; ``None`` for those of a contiguous tensor.

    A copy keeps the strides of the tensor, because a sum may differ in its last bits with other strides. Exceptions are
    strides with more gaps than elements, and strides by which elements overlap.
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
    """Return new memory with room for so many bytes, and the offset at which it is aligned."""
    memory = bytearray(nbytes + ALIGNMENT)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -address % ALIGNMENT


def _pinned(nbytes: int) -> tuple[Any, int]:
    owner = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    memory: Any = (ctypes.c_char * nbytes).from_address(owner.data_ptr())
    memory.owner = owner  # keeps the pinned memory allocated
    return memory, 0
