# pyright: reportPrivateUsage=false
# It allows the functions by which two other modules make their objects again.
"""Pickling for files: events and their snapshots without code, so that a checkpoint runs none when it is read.

A pickle names functions and classes, and calls them when it is read. `PlainPickler` refuses every name but those of
`is_plain`, and `loads` refuses the same names in a file of others. A class of the user is plain if it holds values: an
event, a phase, an enumeration, a dataclass, a named tuple, a module, or a type with a copier. It is looked up among the
modules that the program has imported; reading a file imports nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import pathlib
import pickle
import sys
import types
import uuid
from collections.abc import Iterable
from typing import Any

import torch
import torch._utils
from torch import nn

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.state.readonly import itself
from flowtrain_dask.cluster import pickling
from flowtrain_dask.cluster.pickling import ValuePickler
from flowtrain_dask.snapshots import series
from flowtrain_dask.snapshots.copiers import COPIERS

__all__ = ["PlainPickler", "is_plain", "loads"]

_TYPES = frozenset({
    object, type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice,
    range, collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque,
    types.SimpleNamespace, functools.partial,
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal,
    fractions.Fraction, uuid.UUID, pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePath,
    pathlib.PurePosixPath, pathlib.PureWindowsPath, torch.Size, torch.device, torch.Tensor, nn.Parameter,
})  # fmt: skip

_FUNCTIONS = frozenset({
    pickling._storage, pickling._strided, pickling._requiring_grad, pickling._conjugate, pickling._negative,
    pickling._set_attributes, series._cut, series._tail, series._shown, torch._utils._rebuild_parameter, itself,
})  # fmt: skip
"""The functions by which `pickling` and `series` make their objects again. None of them calls what it is given."""

_OWN = ("flowtrain.state.", "flowtrain_dask.snapshots.", "flowtrain.callback.events", "flowtrain.callback.phases")
"""The modules of flowtrain whose classes are parts of snapshots."""

_OF_NUMPY = {"numpy": ("ndarray", "dtype"), "multiarray": ("_reconstruct", "scalar"), "numeric": ("_frombuffer",)}
_VALUES = (torch.dtype, torch.layout, torch.memory_format)


def is_plain(found: Any) -> bool:
    """Tell whether a function, a class or a constant only holds or makes values."""
    if isinstance(found, _VALUES):
        return True
    module, name = getattr(found, "__module__", None) or "", getattr(found, "__name__", "")
    if module.partition(".")[0] == "numpy" and name in _OF_NUMPY.get(module.rpartition(".")[2], ()):
        return True
    if not isinstance(found, type):
        return found is _load_plain or any(found is each for each in _FUNCTIONS)
    if found in _TYPES or module.startswith(_OWN) or module.startswith("numpy.dtypes"):
        return True
    if issubclass(found, (Event, Phase, enum.Enum, nn.Module)) or dataclasses.is_dataclass(found):
        return True
    return (issubclass(found, tuple) and hasattr(found, "_fields")) or COPIERS.registered(found)


class PlainPickler(ValuePickler):
    """A pickler that refuses functions and classes that are not plain.

    Raises:
        TypeError: The value has such a part; the text names it.
    """

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made again; a class or function by its name, never by its code."""
        if isinstance(obj, (type, types.FunctionType, types.BuiltinFunctionType)):
            if not is_plain(obj) or _named(obj.__module__, obj.__qualname__) is not obj:
                raise TypeError(f"{obj.__module__}.{obj.__qualname__} cannot be in a file without code")
            return NotImplemented
        return super().reducer_override(obj)

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        reduced = super()._reduce_tensor(tensor)
        if reduced is NotImplemented or reduced[0] is not pickling._load:
            return reduced
        if type(tensor) is not torch.Tensor:
            raise TypeError(f"a tensor of type {type(tensor).__name__} cannot be in a file without code")
        file = io.BytesIO()
        torch.save(tensor, file)
        return _load_plain, (file.getvalue(),)


def _load_plain(saved: bytes) -> torch.Tensor:
    """Return a tensor that is no strided one, or is empty, from the bytes of ``torch.save``."""
    tensor: torch.Tensor = torch.load(io.BytesIO(saved), weights_only=True)
    return tensor


def _named(module: str | None, name: str) -> Any:
    """Return the object of a name in an imported module, or ``None``."""
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the function or class of a name.

        Raises:
            UnpicklingError: It is not plain, or its module is not imported.
        """
        found = _named(module, name)
        if found is None or not is_plain(found):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no type of a value, or is not imported")
        return found


def loads(blob: bytes | memoryview, *, buffers: Iterable[Any] = ()) -> Any:
    """Return the value from a pickle of `PlainPickler`.

    Raises:
        UnpicklingError: It names a function or class that is not plain, or that the program has not imported.
    """
    return _PlainUnpickler(io.BytesIO(blob), buffers=buffers).load()
