"""Copies of Python's containers and objects, and of numpy's arrays.

`flowtrain.callback.nested` knows the types of containers, and rebuilds a container from copies of its parts. An
immutable container whose parts need no copies is not copied either. This module copies the types that are not made of
parts: immutable ones, numbers and texts with attributes, `bytearray`, and arrays.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import re
import types
import uuid
from typing import Any

import torch

from flowtrain.callback.events import Event
from flowtrain.callback.nested import PLAIN, Attribute, attributes, is_nested, rebuild, set_attributes
from flowtrain.callback.phases import Phase
from flowtrain_dask.snapshots.copying import Copier, Copying, Refused

__all__ = ["find_rebuilder"]

_IMMUTABLE = (
    int, float, complex, str, bytes, bool, type, enum.Enum, range, slice, type(...), type(NotImplemented),
    fractions.Fraction, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    pathlib.PurePath, uuid.UUID, re.Pattern, Event, Phase,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.GenericAlias,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


_NUMBERS = (int, float, complex, str, bytes)
"""Types whose values are immutable, except for attributes that a subclass may add."""


def find_rebuilder(kind: type, value: Any) -> Copier | None:
    """Return the copier of a type of Python or numpy, of a subclass of one, or of a dataclass; ``None`` for others."""
    if issubclass(kind, enum.Enum):
        return _itself
    if issubclass(kind, _NUMBERS):
        return _copy_number
    if issubclass(kind, _IMMUTABLE) and not (dataclasses.is_dataclass(kind) and not issubclass(kind, Event)):
        return _itself
    if is_nested(kind):
        return _copy_container
    if issubclass(kind, bytearray):
        return _copy_bytearray
    # By name, so that numpy need not be imported. A test of the interface would accept types that are no arrays.
    if any(base.__module__ == "numpy" and base.__name__ in ("ndarray", "generic") for base in kind.__mro__):
        return _copy_array
    return None


def _itself(value: Any, copying: Copying) -> Any:
    return value


def _copy_container(value: Any, copying: Copying) -> Any:
    return rebuild(value, copying.copy_at, copying.memo, copying.copy_key)


def _copy_number(value: Any, copying: Copying) -> Any:
    if all(type(item) in PLAIN for item in attributes(value).values()):
        return value
    base: Any = next(base for base in _NUMBERS if isinstance(value, base))
    try:
        copy = base.__new__(type(value), *base.__getnewargs__(value))
    except TypeError as error:  # numpy's scalars are subclasses of `float` that `float` cannot make
        raise Refused(value, f"it has attributes, and cannot be made again: {error}") from error
    return _with_attributes(value, copy, copying)


def _copy_bytearray(value: bytearray, copying: Copying) -> Any:
    copying.nbytes += len(value)
    copy = bytearray.__new__(type(value))
    bytearray.__init__(copy, value)
    return _with_attributes(value, copy, copying)


def _with_attributes(value: Any, copy: Any, copying: Copying) -> Any:
    copying.remember(value, copy)
    own = {name: copying.copy_at(item, Attribute(name)) for name, item in attributes(value).items()}
    set_attributes(copy, own)
    return copy


def _copy_array(value: Any, copying: Copying) -> Any:
    if value.dtype.hasobject:
        raise Refused(value, "an array of objects cannot be copied as numbers can", "Read a list in its place")
    if not hasattr(value, "__setitem__"):
        return value  # a scalar of numpy, which is immutable
    copying.nbytes += int(value.nbytes)
    return value if copying.dry else value.copy(order="K") if value.shape else value.copy()
