"""Pickling for other processes: code of ``__main__`` by value, tensors as their bytes.

Strided tensors are taken apart here and nowhere else: into the bytes of their storage with dtype, shape and strides. No
reduction of torch's or dask's takes part, so nothing is put into shared memory and every dtype comes back bit for bit.
A tensor that is in two places comes back as one; tensors that show parts of one storage do as well, unless they show
little of it. Other tensors (sparse, quantised, without storage, of a subclass) go through ``torch.save``.

`ValuePickler` is for events and their snapshots. `dumps` and `loads` are for callbacks and their state. Objects that
the other process has already are sent as a position in a list of such objects.
"""

from __future__ import annotations

import copyreg
import ctypes
import importlib
import io
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no types
import torch
from torch import nn

from flowtrain.state.parameters import NamedTensors
from flowtrain_dask.snapshots.series import CutMap, CutPhases, Tail

__all__ = ["ValuePickler", "dumps", "loads"]


def dumps(value: object, shared: Sequence[object] = ()) -> bytes:
    """Return a value as bytes. They contain the code of ``__main__``, and the names of code in modules.

    Args:
        value: The value to pickle.
        shared: Objects that are not pickled: the bytes hold their position in this list.
    """
    file = io.BytesIO()
    _StatePickler(file, shared).dump(value)
    return file.getvalue()


def loads(blob: bytes, shared: Sequence[object] = ()) -> Any:
    """Return the value from the bytes of `dumps`.

    Args:
        blob: The bytes.
        shared: The objects of this process in the order of the list that `dumps` was given.
    """
    return _StateUnpickler(io.BytesIO(blob), shared).load()


class ValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # as above
    """Cloudpickle with reductions for tensors.

    Attributes:
        waste: A storage is sent whole if it is at most this many times larger than the tensor.
    """

    waste: float = 4

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None,
        tails: Mapping[int, Tail] | None = None,
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._tails = tails or {}
        self._storages: dict[tuple[int, int], tuple[torch.UntypedStorage, _Bytes]] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made again, or leave it to cloudpickle.

        A module such as ``torch.backends`` is sent by its name, since cloudpickle, which finds it in any method that
        uses ``torch.backends``, cannot pickle it.
        """
        kind = type(obj)
        if kind is CutMap:
            return obj.reduced(self._tails)
        if kind is CutPhases:
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
        if type(tensor) is nn.Parameter:
            return NotImplemented  # torch makes it of a tensor, which comes here next
        # Each of these views is made of its base, which is pickled next, and shows the memory of its base there too.
        if type(tensor) is torch.Tensor and tensor.requires_grad:
            reduced: Any = _requiring_grad, (tensor.detach(),)
        elif not _is_strided(tensor):
            return _saved(tensor)
        elif tensor.is_conj():
            reduced = _conjugate, (tensor.conj(),)
        elif tensor.is_neg():
            reduced = _negative, (_negative(tensor),)
        else:
            reduced = self._reduce_strided(tensor.cpu())
        own = vars(tensor)
        return (*reduced, own, None, None, _set_attributes) if own else reduced

    def _reduce_strided(self, plain: torch.Tensor) -> Any:
        shape, dtype = tuple(plain.shape), plain.dtype
        storage, offset = plain.untyped_storage(), plain.storage_offset()
        start, size = storage.data_ptr(), storage.nbytes()
        wasteful = size > self.waste * plain.nbytes + 1024
        if wasteful and (start, size) not in self._storages:  # then only the bytes from its first to its last element
            elements = 1 + sum([(length - 1) * stride for length, stride in zip(shape, plain.stride(), strict=True)])
            start, size, offset = plain.data_ptr(), elements * dtype.itemsize, 0
            if size > self.waste * plain.nbytes + 1024:
                plain = plain.clone(memory_format=torch.contiguous_format)
                storage = plain.untyped_storage()
                start, size = storage.data_ptr(), storage.nbytes()
        return _strided, (self._bytes(storage, start, size), dtype, offset, shape, plain.stride())

    def _bytes(self, storage: torch.UntypedStorage, start: int, size: int) -> _Bytes:
        known = self._storages.get((start, size))
        if known is None:  # the storage is kept alive, so that no other storage gets its address
            known = self._storages[start, size] = (storage, _Bytes(start, size))
        return known[1]

    def _expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send a storage whole if these tensors fill most of it, so that all of them share its bytes."""
        used: dict[tuple[int, int], int] = {}
        storages: dict[tuple[int, int], torch.UntypedStorage] = {}
        for tensor in tensors:
            if _is_strided(tensor) and tensor.is_cpu:
                storage = tensor.untyped_storage()
                key = storage.data_ptr(), storage.nbytes()
                storages[key] = storage
                used[key] = used.get(key, 0) + tensor.nbytes
        for key, nbytes in used.items():
            if key[1] <= self.waste * nbytes + 1024:
                self._bytes(storages[key], *key)


class _StatePickler(ValuePickler):
    # Tensors of a callback that share memory must share it again after the way back, because they are written in place.
    waste = math.inf

    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        self._places = {id(one): place for place, one in enumerate(shared)}
        if shared:  # pickle calls this for every object, which is slow
            self.persistent_id = self._place_of

    def _place_of(self, obj: object) -> int | None:
        return self._places.get(id(obj))

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        # A callback's tensor on a device comes back there. The one in an event comes to the CPU, as snapshots do.
        return super()._reduce_tensor(tensor) if tensor.is_cpu or type(tensor) is nn.Parameter else _saved(tensor)


class _StateUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: int) -> object:
        """Return the object at a position of the list."""
        return self._shared[pid]


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


def _saved(tensor: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save(tensor, file, pickle_module=cloudpickle)
    return _load, (file.getvalue(),)


def _is_strided(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is its elements, which are the bytes of a storage, and its attributes."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
        and tensor.numel() > 0
    )


_memory_view: Any = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_view.restype = ctypes.py_object
_memory_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE: a buffer that is sent as read-only arrives so, and torch warns of it


class _Bytes:
    """The memory of a storage; one object for all tensors that show it, so that the pickle has it once."""

    __slots__ = ("address", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _storage, (pickle.PickleBuffer(_memory_view(self.address, self.size, _WRITABLE)),)


# --- functions that a pickle calls on the other side


def _storage(buffer: Any) -> torch.UntypedStorage:
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _strided(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, shape, stride)


def _requiring_grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.requires_grad_()


def _conjugate(base: torch.Tensor) -> torch.Tensor:
    return base.conj()


def _negative(base: torch.Tensor) -> torch.Tensor:
    view: torch.Tensor = torch.ops.aten._neg_view(base)  # torch has no other name for this view
    return view


def _set_attributes(tensor: torch.Tensor, own: dict[str, Any]) -> None:
    vars(tensor).update(own)


_TEXT, _MODULE = "TypedStorage is deprecated", r"torch\._utils"
_FILTER = ("ignore", re.compile(_TEXT, re.IGNORECASE), UserWarning, re.compile(_MODULE), 0)


def _load(saved: bytes) -> torch.Tensor:
    # Torch warns of a class of its own when it first loads a quantised tensor. The filter stays: `catch_warnings` would
    # put back the filters of the whole process, while other lanes load in their threads and users set filters.
    if _FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", _TEXT, UserWarning, _MODULE)
    tensor: torch.Tensor = torch.load(io.BytesIO(saved), weights_only=False)  # `_reduce_tensor` has saved it
    return tensor
