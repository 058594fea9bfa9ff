"""How values are taken apart for another process, and made again there.

Tensors are taken apart here and nowhere else: into their bytes with dtype, shape and strides. No reduction of torch's
or dask's takes part, so nothing is put into shared memory and every dtype comes back bit for bit. A tensor that is in
two places comes back as one; tensors that show parts of one storage do as well, unless they show little of it.
"""

from __future__ import annotations

import copyreg
import ctypes
import importlib
import io
import pickle
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no types
import torch
from torch import nn

from flowtrain.state.parameters import NamedTensors
from flowtrain_dask.snapshots.series import CutMap, CutPhases
from flowtrain_dask.snapshots.tensors import compressed_indices

__all__ = ["ValuePickler"]


class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # as above
    """Cloudpickle with reductions for tensors.

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
        if kind is CutMap or kind is CutPhases:
            return obj.__reduce__()
        if isinstance(obj, torch.Tensor):
            return self._reduce_tensor(obj)
        if isinstance(obj, NamedTensors):
            self._expect(obj.tensors.values())
            return obj.__reduce__()
        if isinstance(obj, (torch.UntypedStorage, torch.TypedStorage)):
            raise TypeError("a torch storage is not sent to another process; send a tensor")
        if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        if not isinstance(obj, type) and getattr(kind, "__slots__", None) and getattr(obj, "__dict__", None):
            return _with_slots(obj)
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


def _with_slots(obj: Any) -> Any:
    """Return how an object is made again, with slots as slots.

    Cloudpickle makes a class anew without its slots, and the objects of that one keep them among their attributes. An
    object of the original class has no such attributes.
    """
    reduced = obj.__reduce_ex__(5)
    slots = set(copyreg._slotnames(type(obj)))  # type: ignore[attr-defined]  # not in the stubs
    if isinstance(reduced, str) or not slots & vars(obj).keys() or hasattr(obj, "__setstate__"):
        return NotImplemented
    attributes = {name: value for name, value in vars(obj).items() if name not in slots}
    kept = {name: value for name, value in vars(obj).items() if name in slots}
    return (*reduced[:2], (attributes or None, kept), *reduced[3:])


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


def _quantized_by_channel(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, axis: int) -> torch.Tensor:
    return _torch._make_per_channel_quantized_tensor(integers, scales, zeros, axis)  # type: ignore[no-any-return]  # see above
