"""Memory that is used again and again: fresh memory costs more than the copy that goes into it.

The pool lends memory as tensors. It keeps the memory itself, and a tensor that was made from it, any view or numpy
array of that tensor included, holds a reference to it. So the number of references says whether it is in use, and
nobody can see a tensor change because somebody else released it: a callback may keep what it read for ever.
Memory is found again by dtype, shape and strides. What was not used for the longest time goes first when the limit is
reached; beyond the limit tensors are ordinary ones.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import OrderedDict, deque
from typing import Any, TypeAlias

import torch

from flowtrain.errors import UsageError, is_a

__all__ = ["ALIGNMENT", "Pool", "aligned", "dense_strides"]

ALIGNMENT = 64
"""As torch aligns its own memory: what a matrix product gives in the last bit may depend on it."""

_SMALL = 1024
"""Bytes below which ordinary memory is as quick."""

_LOOKS = 8
"""How many kinds of memory are looked at for some to give up, each time."""

_Key: TypeAlias = "tuple[torch.dtype, torch.Size, tuple[int, ...] | None, bool]"


class _Kind:
    """The memory for one dtype, shape and strides, the one that was lent longest ago first."""

    __slots__ = ("elements", "memories", "nbytes")

    def __init__(self, elements: int, itemsize: int) -> None:
        self.elements = elements
        self.nbytes = elements * itemsize
        self.memories: deque[tuple[Any, int]] = deque()

    def idle(self) -> tuple[Any, int] | None:
        """Return memory that nobody uses, if one of the first two is: more may be kept for ever by a callback."""
        for _ in range(min(2, len(self.memories))):
            self.memories.rotate(-1)
            if _references(self.memories) <= _IDLE:
                return self.memories[-1]
        return None


class Pool:
    """Lends tensors for copies.

    Args:
        limit_bytes: How much memory it keeps, in bytes, lent or not.

    Raises:
        UsageError: The limit is no number of bytes.
    """

    def __init__(self, limit_bytes: int) -> None:
        if not is_a(limit_bytes, int) or limit_bytes < 0:
            raise UsageError(f"Pool({limit_bytes!r}): the limit is a number of bytes, 0 or more, as Pool(1 << 28).")
        self.limit_bytes = limit_bytes
        self._kinds: OrderedDict[_Key, _Kind] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes that it keeps."""
        return self._nbytes

    def like(self, source: torch.Tensor, *, pinned: bool = False) -> torch.Tensor:
        """Return a tensor in this process's memory, not filled, with the dtype, the shape and the strides of `source`.

        Where `source` has gaps or overlaps, the strides are those of a contiguous tensor (`dense_strides`).

        Args:
            source: A strided tensor, not quantised.
            pinned: Whether the memory is pinned, for copies from a CUDA device.
        """
        shape, dtype = source.shape, source.dtype
        strides = None if source.is_contiguous() else dense_strides(source)
        elements = source.numel() if strides is None else _extent(shape, strides)
        if elements * dtype.itemsize < _SMALL and not pinned:
            return _ordinary(shape, strides, dtype, pinned)
        with self._lock:
            found = self._find((dtype, shape, strides, pinned), elements)
            if found is None:
                return _ordinary(shape, strides, dtype, pinned)
            flat = torch.frombuffer(found[0], dtype=dtype, count=elements, offset=found[1])
            return flat.view(shape) if strides is None else flat.as_strided(shape, strides)

    def clear(self) -> None:
        """Keep nothing any more. What is lent stays as it is."""
        with self._lock:
            self._kinds.clear()
            self._nbytes = 0

    def _find(self, key: _Key, elements: int) -> tuple[Any, int] | None:
        kind = self._kinds.get(key)
        if kind is None:
            kind = _Kind(elements, key[0].itemsize)
        else:
            self._kinds.move_to_end(key)
        found = kind.idle()
        if found is None and elements and self._room(kind.nbytes):
            found = _pinned(kind.nbytes) if key[3] else aligned(kind.nbytes)
            self._kinds[key] = kind
            kind.memories.append(found)
            self._nbytes += kind.nbytes
        return found

    def _room(self, nbytes: int) -> bool:
        """Make room within the limit, of what was not used for the longest time; tell whether there is."""
        for _ in range(_LOOKS):
            if self._nbytes + nbytes <= self.limit_bytes or not self._kinds:
                break
            key, kind = next(iter(self._kinds.items()))
            if kind.idle() is None:
                self._kinds.move_to_end(key)
                continue
            kind.memories.pop()  # where `idle` has put it
            self._nbytes -= kind.nbytes
            if not kind.memories:
                del self._kinds[key]
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


def _extent(shape: torch.Size, strides: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _references(memories: deque[tuple[Any, int]]) -> int:
    return sys.getrefcount(memories[-1][0])


_IDLE = _references(deque([(bytearray(1), 0)]))  # measured: what counts as a reference differs between Pythons


def _ordinary(
    shape: torch.Size, strides: tuple[int, ...] | None, dtype: torch.dtype, pinned: bool
) -> torch.Tensor:
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
