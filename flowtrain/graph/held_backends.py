"""The logging backends that a callback holds, found by following its references.

A callback may hold a backend in any attribute: directly, in a container, in an object of its own, or in a function.
Holding a backend declares it as a resource, so that two callbacks never write to one backend at the same time. The
place where a backend is found does not matter, since a backend is identified by the object itself.

`reachable` follows references without running any code of the objects, such as properties or ``__getattr__``: that
code could have side effects, and it could be slow.
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
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import State

__all__ = ["LIVE", "backends_of", "backends_of_type", "is_learner", "names_in", "reachable"]

LIVE = (LearnerView, LearnerState, BatchState, State)
"""The types of a learner's state. Their contents belong to the learner, and not to a callback that refers to them."""

_ATOMS: frozenset[type] = frozenset({str, bytes, int, float, bool, complex, type(None)})
_EXECUTOR = ("bind", "check", "compile", "flush")  # methods by which an executor is recognised without its code
_LEAVES: tuple[type, ...] = (*_ATOMS, bytearray, torch.Tensor, type, ModuleType, CodeType, LoggerBackend, *LIVE)
"""Types of objects that `reachable` yields and whose references it does not follow."""


def reachable(*values: object) -> Iterator[object]:
    """Yield objects and all objects that they refer to, directly or not, each once.

    These references are followed: items of containers, attributes and slots of objects, closures, defaults and bound
    arguments of functions, and the backends and the functions of the same module that a function uses as globals. No
    code of the objects is run.

    Args:
        values: The objects to begin with.
    """
    seen: dict[int, object] = {}  # holds the objects, since Python may give the id of a dead object to another one
    waiting = deque(values)
    while waiting:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if not _is(value, *_LEAVES) and not is_learner(value) and not _is_executor(value):
            waiting.extend(inner for inner in _references(value) if type(inner) not in _ATOMS)


def backends_of(callback: Callback) -> tuple[LoggerBackend, ...]:
    """Return the logging backends that a callback or its class holds, each once."""
    return _backends(callback, *_class_attributes(type(callback)))


def backends_of_type(kind: type[Callback]) -> tuple[LoggerBackend, ...]:
    """Return the logging backends in the attributes of a callback type, or used by its methods, each once."""
    return _backends(*_class_attributes(kind))


def is_learner(value: object) -> bool:
    """Tell whether an object is a learner: `flowtrain.learner` is not imported here, since it imports this package."""
    return _is(_attributes(value).get("state"), LearnerState)


def _is_executor(value: object) -> bool:
    """Tell whether an object is an executor, which refers to all callbacks of its learner, and so to their backends."""
    return all(hasattr(type(value), method) for method in _EXECUTOR)


def _backends(*values: object) -> tuple[LoggerBackend, ...]:
    # `_is` asks first, so that `isinstance`, which the type checkers need, never meets another class.
    return tuple(held for held in reachable(*values) if _is(held, LoggerBackend) and isinstance(held, LoggerBackend))


def _class_attributes(kind: type[Callback]) -> list[object]:
    return [value for base in kind.__mro__ if base not in (object, Callback) for value in list(vars(base).values())]


def _references(value: Any) -> Iterator[object]:
    """Yield the objects that an object refers to directly."""
    if _is(value, dict):
        for item in list(dict.items(value)):
            yield from item
    elif _is(value, list, tuple, set, frozenset, deque, MappingProxyType):
        yield from list(value.values() if type(value) is MappingProxyType else value)
    elif _is(value, FunctionType):
        yield from _references_of_function(value)
    elif _is(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif _is(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif _is(value, staticmethod, classmethod):
        yield value.__func__
    elif _is(value, property):
        yield from (value.fget, value.fset)
    # A container or function of a user's own class may have attributes too.
    yield from _attributes(value).values()
    for base in type(value).__mro__:
        slots = (slot for slot in vars(base).values() if type(slot) is MemberDescriptorType)
        for slot in slots if "__slots__" in vars(base) else ():
            try:
                yield slot.__get__(value)
            except AttributeError:  # the slot was never assigned
                continue


def _is(value: object, *types: type) -> bool:
    """Tell whether an object has one of the types.

    `isinstance` would ask the object for its ``__class__``, which may run code of the user.
    """
    return issubclass(type(value), types)


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes of an object, without those in slots."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:  # the type has slots only, or is written in C
        return {}
    return dict(attributes) if type(attributes) is dict else {}


def _references_of_function(function: FunctionType) -> Iterator[object]:
    """Yield the values in a function's closure and defaults, and the backends and functions that it uses as globals.

    Of global functions only those of the same module are followed, as code that belongs to the callback.
    """
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the variable has not been assigned yet
            continue
    yield from (function.__defaults__, function.__kwdefaults__)
    for name in names_in(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, LoggerBackend) or (
            isinstance(value, FunctionType) and value.__module__ == function.__module__
        ):
            yield value


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in the code of a function and of the functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)
