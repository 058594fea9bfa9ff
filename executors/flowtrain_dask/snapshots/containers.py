"""Copies of Python's own containers and objects, and of numpy's arrays.

A container is rebuilt with copies of its items; where no item needs a copy an immutable one is itself the copy. Of
subclasses and dataclasses the attributes are copied too, but for arrays; no constructor runs.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import types
import uuid
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterator
from typing import Any, cast

import torch

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain_dask.snapshots.copying import SHARED, Copier, Copying, Refused

__all__ = ["find_rebuilder"]

_IMMUTABLE = (
    int, float, complex, str, bytes, bool, type, enum.Enum, range, slice, type(...), type(NotImplemented),
    fractions.Fraction, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    pathlib.PurePath, uuid.UUID, re.Pattern, Event, Phase,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.GenericAlias,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


_NUMBERS = (int, float, complex, str, bytes)
"""What is immutable, but for the attributes that a subclass may have."""


def find_rebuilder(kind: type, value: Any) -> Copier | None:
    """Return how a type of Python or numpy, a subclass of one, or a dataclass is copied; ``None`` for others."""
    if issubclass(kind, enum.Enum):
        return _itself
    if issubclass(kind, _NUMBERS):
        return _copy_number
    if issubclass(kind, _IMMUTABLE) and not (dataclasses.is_dataclass(kind) and not issubclass(kind, Event)):
        return _itself
    for base, copier in _CONTAINERS.items():
        if issubclass(kind, base):
            return copier
    if dataclasses.is_dataclass(kind) or issubclass(kind, (types.SimpleNamespace, UserDict, UserList)):
        return _copy_object
    # By name, so that numpy is not imported for who does not use it; others have its interface and are no arrays.
    if any(base.__module__ == "numpy" and base.__name__ in ("ndarray", "generic") for base in kind.__mro__):
        return _copy_array
    return None


def _itself(value: Any, copying: Copying) -> Any:
    return value


def _copy_number(value: Any, copying: Copying) -> Any:
    if all(type(item) in SHARED for item in _attributes(value).values()):
        return value
    base: Any = next(base for base in _NUMBERS if isinstance(value, base))
    try:
        copy = base.__new__(type(value), *base.__getnewargs__(value))
    except TypeError as error:  # numpy's own floats are floats
        raise Refused(value, f"it has attributes, and cannot be made again: {error}") from error
    copying.remember(value, copy)
    return _with_attributes(value, copy, copying)


def _items(value: Any, copying: Copying) -> list[Any]:
    return [copying.copy_at(item, place) for place, item in enumerate(value)]


def _copy_list(value: list[Any], copying: Copying) -> Any:
    kind = type(value)
    copy: list[Any] = list.__new__(kind)
    copying.remember(value, copy)
    list.extend(copy, _items(value, copying))
    return _with_attributes(value, copy, copying)


def _copy_tuple(value: tuple[Any, ...], copying: Copying) -> Any:
    items = _items(value, copying)
    if (known := copying.recalled(value)) is not None:  # something in it holds it
        return known
    if _is_same(value, items):
        return value
    kind = type(value)
    if kind is tuple:
        return tuple(items)
    if hasattr(kind, "n_fields"):  # a C struct sequence, such as torch.max gives; it takes one argument
        return cast("Any", kind)(items)
    copy = tuple.__new__(kind, items)
    copying.remember(value, copy)
    return _with_attributes(value, copy, copying)


def _copy_dict(value: dict[Any, Any], copying: Copying) -> Any:
    kind = type(value)
    base: Any = next((each for each in (OrderedDict, defaultdict) if issubclass(kind, each)), dict)
    copy: Any = base.__new__(kind)
    copying.remember(value, copy)
    if isinstance(value, defaultdict):
        copy.default_factory = value.default_factory
    place = base.__setitem__
    for key, item in list(base.items(value)):
        place(copy, copying.copy_at(key, f".keys() {key!r}"), copying.copy_at(item, key))
    return _with_attributes(value, copy, copying) if kind not in (dict, defaultdict) else copy


def _copy_set(value: set[Any], copying: Copying) -> Any:
    kind = type(value)
    copy: Any = set.__new__(kind)
    copying.remember(value, copy)
    set.update(copy, _items(value, copying))
    return _with_attributes(value, copy, copying)


def _copy_frozenset(value: frozenset[Any], copying: Copying) -> Any:
    items = _items(value, copying)
    if _is_same(value, items):
        return value
    kind: Any = type(value)
    copy = frozenset.__new__(kind, items)
    copying.remember(value, copy)
    return _with_attributes(value, copy, copying)


def _is_same(value: tuple[Any, ...] | frozenset[Any], items: list[Any]) -> bool:
    """Return whether something immutable is its own copy, given the copies of its items."""
    return all(one is other for one, other in zip(value, items, strict=True)) and not _attributes(value)


def _copy_deque(value: deque[Any], copying: Copying) -> Any:
    kind = type(value)
    copy: deque[Any] = deque.__new__(kind)
    deque.__init__(copy, (), value.maxlen)  # which a subclass may have another way to say
    copying.remember(value, copy)
    deque.extend(copy, _items(value, copying))
    return _with_attributes(value, copy, copying)


def _copy_proxy(value: types.MappingProxyType[Any, Any], copying: Copying) -> Any:
    shown: Any = value.copy()  # of the type that it shows: one with defaults, say
    if not isinstance(shown, dict):
        shown = dict(value.items())
    copy = types.MappingProxyType(shown)
    copying.remember(value, copy)
    for key, item in value.items():
        shown[key] = copying.copy_at(item, key)
    return copy


def _copy_bytearray(value: bytearray, copying: Copying) -> Any:
    copying.nbytes += len(value)
    kind = type(value)
    copy = bytearray.__new__(kind)
    bytearray.__init__(copy, value)
    copying.remember(value, copy)
    return _with_attributes(value, copy, copying)


def _copy_partial(value: functools.partial[Any], copying: Copying) -> Any:
    args = [copying.copy_at(arg, f".args[{place}]") for place, arg in enumerate(value.args)]
    keywords = {name: copying.copy_at(arg, f".keywords[{name!r}]") for name, arg in value.keywords.items()}
    kind: Any = type(value)
    copy = functools.partial.__new__(kind, copying.copy_at(value.func, ".func"), *args, **keywords)
    copying.remember(value, copy)
    return _with_attributes(value, copy, copying)


def _copy_object(value: Any, copying: Copying) -> Any:
    kind: Any = type(value)
    try:
        copy = object.__new__(kind)
    except TypeError:  # of a type that is made in C
        copy = kind.__new__(kind)
    copying.remember(value, copy)
    return _with_attributes(value, copy, copying)


def _with_attributes(value: Any, copy: Any, copying: Copying) -> Any:
    """Copy the attributes of an object, those in slots too."""
    own = getattr(value, "__dict__", None)
    if own:
        # Past `__setattr__`: a frozen dataclass has one that refuses, others do more than to assign.
        copy.__dict__.update({name: copying.copy_at(item, f".{name}") for name, item in own.items()})
    for name, item in _in_slots(value):
        object.__setattr__(copy, name, copying.copy_at(item, f".{name}"))
    return copy


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    return {**getattr(value, "__dict__", {}), **dict(_in_slots(value))}


def _in_slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        slots: Any = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _copy_array(value: Any, copying: Copying) -> Any:
    if value.dtype.hasobject:
        raise Refused(value, "an array of objects cannot be copied as numbers can", "Read a list in its place")
    if not hasattr(value, "__setitem__"):
        return value  # a scalar
    copying.nbytes += int(value.nbytes)
    return value if copying.dry else value.copy(order="K") if value.shape else value.copy()


_CONTAINERS: dict[type, Copier] = {
    tuple: _copy_tuple,
    dict: _copy_dict,
    list: _copy_list,
    set: _copy_set,
    frozenset: _copy_frozenset,
    deque: _copy_deque,
    types.MappingProxyType: _copy_proxy,
    bytearray: _copy_bytearray,
    functools.partial: _copy_partial,
}
