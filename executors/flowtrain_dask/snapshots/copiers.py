"""The types that can be copied, and how: later changes by training do not change a copy.

===============================================  ===============================================================
value                                            its copy
===============================================  ===============================================================
tensors (also sparse, quantised, complex)        detached, in memory of a `Pool`, with the strides they have
numbers, texts, types, functions, enums, ...     the value itself
list, tuple, dict, set, deque, dataclasses, ...  rebuilt by `flowtrain.data.nested`, if a part of it needs a copy
numpy arrays                                     copied; refused if they hold objects
series                                           `flowtrain_dask.snapshots.series`: in constant time
parameters and gradients by name                 copied together
other containers of flowtrain                    rebuilt by themselves, see `flowtrain.state.container`
``torch.nn.Module``                              a deep copy: every parameter and buffer is copied
any other type                                   by a function from `register_copier`; refused if there is none
===============================================  ===============================================================

`copying` is one pass of copying; `tensors` and `modules` copy the types of their names.
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
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from flowtrain.callback.access import Declaration
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.data.nested import PLAIN, Attribute, attributes, is_nested, rebuild, set_attributes
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.parameters import NamedTensors
from flowtrain.state.series import Series
from flowtrain_dask.snapshots.copying import Copier, Copying, Refused
from flowtrain_dask.snapshots.modules import copy_module
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.slots import compile_slots, slots_now
from flowtrain_dask.snapshots.tensors import copy_tensor, copy_tensors

__all__ = ["COPIERS", "Copiers", "check_copies", "find_rebuilder", "register_copier"]


class Copiers(dict[type, Copier]):
    """The copier of each exact type. That of a new type is found when the type is first looked up, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self._registered: dict[type, Copier] = {}

    def register(self, kind: type, copier: Copier) -> None:
        """Use a copier for a type and its subclasses from now on."""
        self._registered[kind] = copier
        for known in [each for each in self if issubclass(each, kind)]:
            del self[known]  # so that the copier of this type is looked up again

    def registered(self, kind: type) -> bool:
        """Tell whether a copier was registered for a type or one of its bases."""
        return any(base in self._registered for base in kind.__mro__)

    def __missing__(self, kind: type) -> Copier:
        registered = next((self._registered[base] for base in kind.__mro__ if base in self._registered), None)
        copier = self[kind] = registered or _find_own(kind) or find_rebuilder(kind) or _refuse
        return copier


COPIERS: Final = Copiers()
"""The copiers of this process. They are one for all executors, because `register_copier` is a function."""


def register_copier(kind: type, copy: Callable[[Any], Any]) -> None:
    """Register a function that copies a type of your own, and its subclasses, for deferred callbacks.

    Args:
        kind: The type.
        copy: Returns a copy of an object that later changes to the object do not affect, such as `copy.deepcopy`. If
            callbacks run in other processes, the copy must pickle.

    Raises:
        UsageError: `kind` is no type, or `copy` is no function.
    """
    if not is_a(kind, type):
        raise UsageError(f"register_copier({kind!r}, ...): the first argument is a type: register_copier(MyType, f).")
    if not callable(copy):
        raise UsageError(f"register_copier({kind.__name__}, {copy!r}): the second argument is a function of a value.")
    COPIERS.register(kind, lambda value, copying: value if copying.dry else copy(value))


def check_copies(declaration: Declaration, state: LearnerState) -> None:
    """Check that the state that a deferred handler declares to read can be copied, as far as it exists already.

    Args:
        declaration: The declaration of the handler.
        state: The state of the learner.

    Raises:
        AccessError: An object cannot be copied; the text says where it is and what to write.
    """
    for declared in compile_slots(declaration):
        for slot in slots_now(declared, state) if getattr(state, declared.path[0]) is not None else ():
            slot.take(state, Copying(COPIERS, Pool(0), dry=True))


def _find_own(kind: type) -> Copier | None:
    if kind is torch.Tensor or kind is nn.Parameter:
        return copy_tensor
    if issubclass(kind, torch.Tensor):
        return _refuse_subclass
    if issubclass(kind, nn.Module):
        return copy_module
    if issubclass(kind, Series):
        return _copy_series
    if issubclass(kind, NamedTensors):
        return _copy_named_tensors
    return _copy_own if hasattr(kind, "__frozen__") else None


def _copy_series(value: Series, copying: Copying) -> Series:
    copying.has_series = True
    return copying.cutter.series(value)


def _copy_named_tensors(value: NamedTensors, copying: Copying) -> NamedTensors:
    return type(value)(copy_tensors(value.tensors, copying), value.aliases)


def _copy_own(value: Any, copying: Copying) -> Any:
    return value.__frozen__(copying)


def _refuse(value: Any, copying: Copying) -> Any:
    raise Refused(value, "training may change it while the callback waits, and nothing says how it is copied")


def _refuse_subclass(value: torch.Tensor, copying: Copying) -> Any:
    raise Refused(value, "a subclass of Tensor may hold more than its elements, and nothing says how it is copied")


# --- values of Python and numpy

_IMMUTABLE = (
    int, float, complex, str, bytes, bool, type, enum.Enum, range, slice, type(...), type(NotImplemented),
    fractions.Fraction, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    pathlib.PurePath, uuid.UUID, re.Pattern, Event, Phase,
    types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.GenericAlias,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


_NUMBERS = (int, float, complex, str, bytes)
"""Types whose values are immutable, except for attributes that a subclass may add."""


def find_rebuilder(kind: type) -> Copier | None:
    """Return the copier of a type of Python or numpy, of a subclass of one, or of a dataclass; ``None`` for others."""
    if issubclass(kind, enum.Enum):
        return _itself
    if issubclass(kind, _NUMBERS):
        return _copy_number
    if issubclass(kind, _IMMUTABLE) and not (dataclasses.is_dataclass(kind) and not issubclass(kind, Event)):
        return _itself
    if is_nested(kind):
        return _copy_nested
    if issubclass(kind, bytearray):
        return _copy_bytearray
    # By name, so that numpy need not be imported. A test of the interface would accept types that are no arrays.
    if any(base.__module__ == "numpy" and base.__name__ in ("ndarray", "generic") for base in kind.__mro__):
        return _copy_array
    return None


def _itself(value: Any, copying: Copying) -> Any:
    return value


def _copy_nested(value: Any, copying: Copying) -> Any:
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
