"""What an object leads to, and so which logging backends a callback holds.

A callback may keep a backend in any attribute: directly, in containers, in an object of its own, in a function. Where
it is found is of no importance: a backend is named by its identity, and holding it declares its resource.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MappingProxyType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import LoggerBackend
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState, State

__all__ = ["LIVE", "backends_of", "backends_of_type", "is_learner", "names_in", "reachable"]

LIVE = (LearnerView, LearnerState, BatchState, State)
"""The types of a learner's state: what it leads to belongs to the learner, and not to whoever refers to it."""

_ATOMS: frozenset[type] = frozenset({str, bytes, int, float, bool, complex, type(None)})
_EXECUTOR = ("bind", "check", "compile", "flush")
_LEAVES: tuple[type, ...] = (*_ATOMS, bytearray, torch.Tensor, type, ModuleType, CodeType, LoggerBackend, *LIVE)


def reachable(*values: object) -> Iterator[object]:
    """Yield objects and all that they lead to, each once.

    Followed are the items of containers, attributes, slots, closures, defaults and arguments of functions, and global
    functions of the same module and global backends that a function names. No code of the objects is run.

    Args:
        values: Where to begin.
    """
    seen: dict[int, object] = {}  # it keeps the objects alive: an id is not used for another one meanwhile
    waiting = deque(values)
    while waiting:
        one = waiting.popleft()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        yield one
        if not _is(one, *_LEAVES) and not is_learner(one) and not _is_executor(one):
            waiting.extend(inner for inner in _inside(one) if type(inner) not in _ATOMS)


def backends_of(callback: Callback) -> tuple[LoggerBackend, ...]:
    """Return the logging backends that a callback holds, each once; those of its class are among them."""
    return _backends(callback, *_class_attributes(type(callback)))


def backends_of_type(kind: type[Callback]) -> tuple[LoggerBackend, ...]:
    """Return the logging backends that the class of a callback holds: in its attributes, or used by its methods."""
    return _backends(*_class_attributes(kind))


def is_learner(value: object) -> bool:
    """Tell whether something is a learner."""
    return _is(_attributes(value).get("state"), LearnerState)


def _is_executor(value: object) -> bool:
    """Tell whether something is an executor, which leads to all callbacks of its learner."""
    return all(hasattr(type(value), method) for method in _EXECUTOR)


def _backends(*values: object) -> tuple[LoggerBackend, ...]:
    return tuple(one for one in reachable(*values) if _is(one, LoggerBackend) and isinstance(one, LoggerBackend))


def _class_attributes(kind: type[Callback]) -> list[object]:
    return [value for base in kind.__mro__ if base not in (object, Callback) for value in list(vars(base).values())]


def _inside(one: Any) -> Iterator[object]:
    """Yield what an object refers to."""
    if _is(one, dict):
        for item in list(dict.items(one)):
            yield from item
    elif _is(one, list, tuple, set, frozenset, deque, MappingProxyType):
        yield from list(one.values() if type(one) is MappingProxyType else one)
    elif _is(one, FunctionType):
        yield from _used_by(one)
    elif _is(one, MethodType):
        yield from (one.__self__, one.__func__)
    elif _is(one, partial):
        yield from (one.func, one.args, one.keywords)
    elif _is(one, staticmethod, classmethod):
        yield one.__func__
    elif _is(one, property):
        yield from (one.fget, one.fset)
    yield from _attributes(one).values()
    for base in type(one).__mro__:
        slots = (slot for slot in vars(base).values() if type(slot) is MemberDescriptorType)
        for slot in slots if "__slots__" in vars(base) else ():
            try:
                yield slot.__get__(one)
            except AttributeError:  # a slot that nothing has been put into
                continue


def _is(one: object, *types: type) -> bool:
    """Tell of which type an object is; `isinstance` would ask the object for its ``__class__``, which may run code."""
    return issubclass(type(one), types)


def _attributes(one: object) -> dict[str, object]:
    try:
        found = object.__getattribute__(one, "__dict__")
    except AttributeError:  # its type has no attributes, or slots only
        return {}
    return dict(found) if type(found) is dict else {}


def _used_by(function: FunctionType) -> Iterator[object]:
    """Yield what a function keeps, and the global backends and functions of its module that its code names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from (function.__defaults__, function.__kwdefaults__)
    for name in names_in(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, LoggerBackend) or (
            isinstance(value, FunctionType) and value.__module__ == function.__module__
        ):
            yield value


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes that code names, that of inner functions too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)
