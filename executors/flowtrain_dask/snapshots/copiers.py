"""The types that can be copied, and how: later changes by training do not change a copy.

===============================================  ===============================================================
value                                            its copy
===============================================  ===============================================================
tensors (also sparse, quantised, complex)        detached, in memory of a `Pool`, with the strides they have
numbers, texts, types, functions, enums, ...     the value itself
list, tuple, dict, set, deque, dataclasses, ...  rebuilt, subclasses and their attributes too; cycles are kept
numpy arrays                                     copied; refused if they hold objects
series                                           `flowtrain_dask.snapshots.series`: in constant time
parameters and gradients by name                 copied together
other containers of flowtrain                    rebuilt by themselves, see `flowtrain.state.container`
``torch.nn.Module``                              a deep copy: every parameter and buffer is copied
any other type                                   by a function from `register_copier`; refused if there is none
===============================================  ===============================================================

`copying` is one pass of copying; `tensors`, `containers` and `modules` copy the types of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flowtrain.callback.access import Declaration
from flowtrain.errors import UsageError, is_a
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.parameters import NamedTensors
from flowtrain.state.series import Series
from flowtrain_dask.snapshots.containers import find_rebuilder
from flowtrain_dask.snapshots.copying import COPIERS, FINDERS, Copier, Copying, Refused
from flowtrain_dask.snapshots.modules import copy_module
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.slots import compile_slots, slots_now
from flowtrain_dask.snapshots.tensors import copy_tensor, copy_tensors

__all__ = ["Copying", "Pool", "check", "register_copier"]

_registered: dict[type, Copier] = {}


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
    _registered[kind] = lambda value, copying: value if copying.dry else copy(value)
    for known in [each for each in COPIERS if issubclass(each, kind)]:
        del COPIERS[known]  # so that the copier of this type is looked up again


def check(declaration: Declaration, state: LearnerState) -> None:
    """Check that the state that a deferred handler declares to read can be copied, as far as it exists already.

    Args:
        declaration: The declaration of the handler.
        state: The state of the learner.

    Raises:
        AccessError: An object cannot be copied; the text says where it is and what to write.
    """
    for declared in compile_slots(declaration):
        for slot in slots_now(declared, state) if getattr(state, declared.path[0]) is not None else ():
            slot.take(state, Copying(Pool(0), dry=True))


def _find_registered(kind: type, value: Any) -> Copier | None:
    return next((_registered[base] for base in kind.__mro__ if base in _registered), None)


def _find_own(kind: type, value: Any) -> Copier | None:
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
    return _copy_container if hasattr(kind, "__frozen__") else None


def _copy_series(value: Series, copying: Copying) -> Series:
    copying.has_series = True
    return copying.cutter.series(value)


def _copy_named_tensors(value: NamedTensors, copying: Copying) -> NamedTensors:
    return type(value)(copy_tensors(value.tensors, copying), value.aliases)


def _copy_container(value: Any, copying: Copying) -> Any:
    return value.__frozen__(copying)


def _refuse_subclass(value: torch.Tensor, copying: Copying) -> Any:
    raise Refused(value, "a subclass of Tensor may hold more than its elements, and nothing says how it is copied")


FINDERS[:] = [_find_registered, _find_own, find_rebuilder]
