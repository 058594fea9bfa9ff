"""Events and snapshots as bytes, for another process, and back.

A blob is a pickle (protocol 5, by cloudpickle) and the buffers that it refers to, each copied once on either side::

    b"FTB1"  number of buffers  size of each  pickle  buffer  buffer ...     (each part aligned)

Tensors are written here and nowhere else: as their bytes with dtype, shape and strides. No reduction of torch's or
dask's takes part, so nothing is put into shared memory and every dtype comes back bit for bit. A tensor that is in two
places comes back as one; tensors that show parts of one storage do as well, unless they show little of it.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import pickle
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no types
import torch
from torch import nn

from flowtrain.phasemap import Counts, CountsMap, PhaseMap
from flowtrain.phases import Phase
from flowtrain.state import Named, State
from flowtrain_dask.pool import ALIGNMENT, aligned
from flowtrain_dask.states import NamedGradients, NamedTensors
from flowtrain_dask.tensors import compressed_indices

__all__ = ["Encoded", "ValuePickler", "decode", "encode"]

_MAGIC = b"FTB1"

class Encoded:
    """An object as bytes: a head, and the buffers, which are where the object has them.

    Args:
        obj: The object; it must not change as long as the buffers are used.

    Attributes:
        head: What comes before the buffers.
        buffers: The buffers, each followed by what aligns the next one.
        nbytes: The bytes of all.

    Raises:
        TypeError: Something in it can be sent to no other process.
    """

    def __init__(self, obj: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        self._pickler = ValuePickler(file, buffers.append)  # it keeps alive what the buffers show
        self._pickler.dump(obj)
        pickled, parts = file.getbuffer(), [buffer.raw() for buffer in buffers]
        head = _MAGIC + struct.pack(
            f"<{len(parts) + 2}Q", len(parts), pickled.nbytes, *(part.nbytes for part in parts)
        )
        self.head = b"".join(_aligned(head, pickled))
        self.buffers = _aligned(*parts)
        self.nbytes = len(self.head) + sum(len(each) for each in self.buffers)

    def __bytes__(self) -> bytes:
        return b"".join((self.head, *self.buffers))


def encode(obj: object) -> bytes:
    """Return an object as bytes, see `Encoded`.

    Raises:
        TypeError: Something in it can be sent to no other process.
    """
    return bytes(Encoded(obj))


def decode(blob: bytes | bytearray | memoryview, buffers: memoryview | None = None) -> Any:
    """Return the object of a blob, in memory of its own.

    Args:
        blob: What `encode` returned, or `Encoded.head`.
        buffers: With a head, `Encoded.buffers` in one: the object keeps that as its memory, so it can be written to, is
            aligned, and nobody else has it.

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
    (count,) = struct.unpack_from("<Q", view, 4)
    sizes = struct.unpack_from(f"<{count + 1}Q", view, 12)
    start = _after(12 + 8 * (count + 1))
    first = view[start : start + sizes[0]]
    rest = view[start + _after(sizes[0]) :] if buffers is None else buffers
    return pickle.loads(first, buffers=_parts(rest, sizes[1:]))


def _copy_of(source: memoryview) -> memoryview:
    memory, start = aligned(source.nbytes)  # bytes cannot be written into, and may begin anywhere
    view = memoryview(memory)[start : start + source.nbytes]
    view[:] = source
    return view


def _parts(view: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    start = 0
    for size in sizes:
        yield view[start : start + size]
        start += _after(size)


def _aligned(*parts: bytes | memoryview) -> list[bytes | memoryview]:
    """Return parts with what aligns the next one after each."""
    return [piece for part in parts for piece in (part, bytes(_after(len(part)) - len(part)))]


def _after(size: int) -> int:
    """Return where the next part begins after one of that size."""
    return size + -size % ALIGNMENT


class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # as above
    """Cloudpickle with reductions for tensors and for what of flowtrain's own it cannot do.

    Attributes:
        waste: How many times as large as what a tensor shows a storage may be to be sent as a whole.
    """

    waste: float = 4

    def __init__(self, file: io.BytesIO, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._storages: dict[tuple[int, int], tuple[torch.UntypedStorage, _Bytes]] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made again, or leave it to cloudpickle.

        A module of a type of its own, such as ``torch.backends``, is named; cloudpickle cannot pickle it. It meets that
        one in every method that has both ``torch`` and an attribute ``backends`` in it.
        """
        kind = type(obj)
        if isinstance(obj, torch.Tensor):
            return self._reduce_tensor(obj)
        if kind is NamedTensors or kind is NamedGradients:
            self._expect(obj.tensors.values())
            return obj.__reduce__()
        if kind is CountsMap:
            return _counts_map, (obj._path, list(obj.items()))
        if kind is PhaseMap:
            return _phase_map, (obj._path, obj.make, list(obj.items()))
        if kind is State:
            return _state, (obj._path, dict(vars(obj)))
        if kind is Named:
            return Named, (obj.__dict__["_what"], dict(obj))
        if isinstance(obj, (torch.UntypedStorage, torch.TypedStorage)):
            raise TypeError("a torch storage is not sent to another process; send a tensor")
        if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        return super().reducer_override(obj)

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        if _is_plain(tensor):
            return self._reduce_strided(tensor)
        kind = type(tensor)
        if kind is nn.Parameter:
            return _parameter, (tensor.detach(), tensor.requires_grad)
        if kind is not torch.Tensor:
            if hasattr(tensor, "__tensor_flatten__"):
                raise TypeError(f"a {kind.__name__} consists of other tensors and is not sent to another process")
            return _subclass, (kind, tensor.detach().as_subclass(torch.Tensor), dict(vars(tensor)))
        plain = tensor.detach()
        if tensor.requires_grad:
            return torch.Tensor.requires_grad_, (plain,)
        if tensor.is_nested or tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]  # not in the stubs
            raise TypeError(f"a {'nested' if tensor.is_nested else 'mkldnn'} tensor is not sent to another process")
        if tensor.is_quantized:
            return _reduce_quantized(plain)
        if tensor.layout is torch.sparse_coo:
            parts = plain._indices(), plain._values()
            return _coo, (*parts, tuple(plain.shape), plain.is_coalesced())
        if tensor.layout is not torch.strided:
            return _compressed, (*compressed_indices(plain), plain.values(), tuple(plain.shape), plain.layout)
        if tensor.is_meta:
            return _meta, (tuple(plain.shape), plain.stride(), plain.dtype)
        return self._reduce_strided(plain.cpu().resolve_conj().resolve_neg())

    def _reduce_strided(self, plain: torch.Tensor) -> Any:
        shape, dtype = tuple(plain.shape), plain.dtype
        if plain.numel() == 0:
            return _empty, (shape, plain.stride(), dtype)
        storage, offset = plain.untyped_storage(), plain.storage_offset()
        start, size = storage.data_ptr(), storage.nbytes()
        wasteful = size > self.waste * plain.nbytes + 1024
        if wasteful and (start, size) not in self._storages:  # then only what lies between its first and last element
            elements = 1 + sum([(length - 1) * stride for length, stride in zip(shape, plain.stride(), strict=True)])
            start, size, offset = plain.data_ptr(), elements * dtype.itemsize, 0
            if size > self.waste * plain.nbytes + 1024:
                plain = plain.clone(memory_format=torch.contiguous_format)
                storage = plain.untyped_storage()
                start, size = storage.data_ptr(), storage.nbytes()
        return _strided, (self._bytes(storage, start, size), dtype, offset, shape, plain.stride())

    def _bytes(self, storage: torch.UntypedStorage, start: int, size: int) -> _Bytes:
        known = self._storages.get((start, size))
        if known is None:  # kept alive: its address stays its own
            known = self._storages[start, size] = (storage, _Bytes(start, size))
        return known[1]

    def _expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send the piece of memory that tensors lie in as a whole, where they are most of what is in it."""
        used: dict[tuple[int, int], int] = {}
        storages: dict[tuple[int, int], torch.UntypedStorage] = {}
        for tensor in tensors:
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr(), storage.nbytes()
                storages[key] = storage
                used[key] = used.get(key, 0) + tensor.nbytes
        for key, nbytes in used.items():
            if key[1] <= self.waste * nbytes + 1024:
                self._bytes(storages[key], *key)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is what its dtype, shape and strides say of the bytes of its storage, and nothing more."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.requires_grad
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def _reduce_quantized(plain: torch.Tensor) -> Any:
    if plain.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return _quantized, (plain.int_repr(), plain.q_scale(), plain.q_zero_point())
    scales, zeros = plain.q_per_channel_scales(), plain.q_per_channel_zero_points()
    return _quantized_by_channel, (plain.int_repr(), scales, zeros, plain.q_per_channel_axis())


_memory_view: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.restype = ctypes.py_object
_memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE: what is sent as read-only comes back so


class _Bytes:
    """The memory of a storage; one object for all tensors that show it, so that the pickle has it once."""

    __slots__ = ("address", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _storage, (pickle.PickleBuffer(_memory_view(self.address, self.size, _WRITABLE)),)


# --- on the other side: what a pickle calls


def _storage(buffer: Any) -> torch.UntypedStorage:
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _strided(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, shape, stride)


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def _meta(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _parameter(plain: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(plain, requires_grad=requires_grad)


def _subclass(kind: type[torch.Tensor], plain: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    made = plain.as_subclass(kind)
    vars(made).update(attributes)
    return made


def _coo(indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...], coalesced: bool) -> torch.Tensor:
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=False)


def _compressed(
    compressed: torch.Tensor, plain: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...], layout: torch.layout
) -> torch.Tensor:
    return torch.sparse_compressed_tensor(compressed, plain, values, shape, layout=layout, check_invariants=False)


_torch: Any = torch  # torch has no public function that takes the integers as they are


def _quantized(integers: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    return _torch._make_per_tensor_quantized_tensor(integers, scale, zero)  # type: ignore[no-any-return]  # see above


def _quantized_by_channel(
    integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, axis: int
) -> torch.Tensor:
    return _torch._make_per_channel_quantized_tensor(integers, scales, zeros, axis)  # type: ignore[no-any-return]  # see above


def _counts_map(path: str, items: list[tuple[Phase, Counts]]) -> CountsMap:
    made = CountsMap(path)
    for phase, counts in items:
        made[phase] = counts
    return made


def _phase_map(path: str, make: Callable[[], Any] | None, items: list[tuple[Phase, Any]]) -> PhaseMap[Any]:
    made: PhaseMap[Any] = PhaseMap(path, make)
    for phase, item in items:
        made[phase] = item
    return made


def _state(path: str, entries: dict[str, Any]) -> State:
    made = State(path)
    for name, item in entries.items():
        setattr(made, name, item)
    return made
