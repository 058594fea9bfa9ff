"""The result of a learner as values by path, by which two runs are compared.

A value is taken apart down to numbers, tensors and texts, each with a path such as
``cbstate.history[TrainingPhase()][0]`` or ``callbacks.Recorder.name``. These are compared bit for bit: ``nan`` equals
itself, and ``0.0`` differs from ``-0.0``. No object is compared by identity, because two runs have no object in common.

Two functions are equal if they have the same name. The learner and its views, threads, locks and files are not taken
apart: two of them are equal if they have the same type.
"""

from __future__ import annotations

import random
import struct
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from operator import itemgetter
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.view import LearnerView
from flowtrain.data.nested import attributes, parts, place_text
from flowtrain.data.tensor_bytes import tensor_bytes
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import Callbacks
from flowtrain.learner import Learner
from flowtrain.state.batch import BatchState
from flowtrain.state.container import Container
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.namespace import State
from flowtrain.state.series import Series

__all__ = ["Leaf", "learner_leaves", "outcome_leaves", "rng_leaves", "show_difference", "values_in"]

_WHOLE = (Learner, LearnerView, LearnerState, Callbacks, ModuleType)
"""Types of objects that are not taken apart."""

_ELSEWHERE = {"_io", "_thread", "_weakref", "asyncio", "concurrent", "io", "logging", "queue", "rich", "threading"}
"""Modules whose objects are not taken apart: they hold clocks, threads and files, but no results of callbacks."""


@dataclass(frozen=True)
class Leaf:
    """A value that is not taken apart any further.

    Attributes:
        bits: An object that is equal for two values with the same bits.
        shown: The value as a text for messages.
        tensor: A copy of the value if it is a tensor; otherwise ``None``.
    """

    bits: object
    shown: str
    tensor: torch.Tensor | None = field(default=None, compare=False)


def learner_leaves(learner: Learner) -> Iterator[tuple[str, Leaf]]:
    """Yield the values of models, loss function, optimizers, batch, ``cbstate`` and callbacks."""
    state = learner.state
    yield from _named("model", state.model)
    if isinstance(state.lossfn, torch.nn.Module):
        yield from values_in(state.lossfn, "lossfn")
    names = {id(param): name for name, param in state.params.items()}
    for path, optimizer in _by_name("optimizer", state.optimizer):
        if optimizer is not None:
            yield from _optimizer(path, optimizer, names)
    for name, value in sorted(vars(state.batch).items()):
        yield from values_in(value, f"batch.{name}")
    for name in state.cbstate:
        yield from values_in(state.cbstate.__dict__[name], f"cbstate.{name}")
    for callback in learner.callbacks:
        for name, value in sorted(attributes(callback).items()):
            yield from values_in(value, f"callbacks.{callback.name}.{name}")


def outcome_leaves(name: str, error: BaseException | None) -> Iterator[tuple[str, Leaf]]:
    """Yield the text of an exception, its notes, and the same of the exceptions that are attached to it."""
    yield name, _plain("nothing" if error is None else f"{type(error).__name__}: {error}")
    for number, note in enumerate(getattr(error, "__notes__", ())):
        yield f"{name}.__notes__[{number}]", _plain(note)
    for number, other in enumerate(getattr(error, "others", ())):
        yield from outcome_leaves(f"{name}.others[{number}]", other)


def rng_leaves() -> Iterator[tuple[str, Leaf]]:
    """Yield the states of the random number generators of torch and Python, and of numpy if it is imported."""
    yield from values_in(torch.get_rng_state(), "torch.get_rng_state()")
    yield "random.getstate()", _plain(hash(random.getstate()))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield from values_in(numpy.random.get_state()[1:3], "numpy.random.get_state()")


def values_in(value: Any, path: str) -> Iterator[tuple[str, Leaf]]:
    """Yield the path and the leaf of each part of a value, and of its containers.

    Args:
        value: Any value.
        path: The path of the value.

    >>> [(path, leaf.shown) for path, leaf in values_in({"a": [1, 2.5]}, "x")]
    [('x', "keys 'a'"), ("x['a']", '2 items'), ("x['a'][0]", '1'), ("x['a'][1]", '2.5')]
    """
    yield from _leaves(value, path, {})


def _leaves(value: Any, path: str, above: dict[int, str]) -> Iterator[tuple[str, Leaf]]:
    leaf = _leaf(value)
    if leaf is not None:
        yield path, leaf
        return
    if id(value) in above:  # a container that contains itself
        yield path, _plain(f"the same as {above[id(value)]}")
        return
    above[id(value)] = path
    head, items = _parts(value)
    yield path, _plain(head)
    for below, item in items:
        yield from _leaves(item, path + below, above)
    del above[id(value)]


def _leaf(value: Any) -> Leaf | None:
    """Return the leaf for a value that is not taken apart; ``None`` for any other value."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, (float, complex)):
        return Leaf((type(value), struct.pack("<2d", value.real, value.imag)), repr(value))
    if value is None or isinstance(value, (bool, int, str, bytes, Enum)):
        return Leaf((type(value), repr(value)), repr(value))
    if isinstance(value, (torch.dtype, torch.device, torch.layout)):
        return _plain(repr(value))
    if isinstance(value, PurePath):
        return _plain(str(value))
    if isinstance(value, torch.Generator):
        return _tensor(value.get_state())
    if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
        return _plain(f"{value.__module__}.{value.__qualname__}")
    if hasattr(value, "__array_interface__") and hasattr(value, "tobytes"):
        return Leaf((str(value.dtype), value.shape, value.tobytes()), repr(value))
    if _is_opaque(value):
        return _plain(f"a {type(value).__name__}")
    return None


def _is_opaque(value: object) -> bool:
    return (
        isinstance(value, _WHOLE)
        or (isinstance(value, Executor) and not isinstance(value, type))
        or type(value).__module__.partition(".")[0] in _ELSEWHERE
    )


def _parts(value: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return a text for the container itself, and its parts, each with the end of its path."""
    if isinstance(value, torch.nn.Module):
        return type(value).__name__, [(f".{name}", each) for name, each in _module(value)]
    if isinstance(value, random.Random):
        return "Random", [(".getstate()", hash(value.getstate()))]
    if isinstance(value, (State, BatchState)):
        return type(value).__name__, [(f".{name}", each) for name, each in sorted(value.__dict__.items())]
    if isinstance(value, Series):
        return f"{len(value)} values", [(f"[{number}]", each) for number, each in enumerate(value)]
    if isinstance(value, Mapping):
        # Sort by key, because independent callbacks may add their entries in any order.
        items: list[tuple[str, Any]] = [(_shown_key(key), item) for key, item in value.items()]
        items.sort(key=itemgetter(0))
        head = f"keys {', '.join(key for key, _ in items)}"
        own = [] if isinstance(value, (Container, Named)) else _steps(value)
        return head, [*((f"[{key}]", item) for key, item in items), *own]
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_shown_key(item) for item in value))}}}", _steps(value)
    if isinstance(value, (list, tuple, deque)):
        return f"{len(value)} items", [*((f"[{number}]", item) for number, item in enumerate(value)), *_steps(value)]
    if isinstance(value, partial):
        return "partial", [(place_text(where), item) for where, item in parts(value) or ()]
    if isinstance(value, Callback):  # a callback with a name belongs to the learner, and is compared there
        return f"callback {value.name or type(value).__name__}", [] if value.name else _steps(value)
    found = _steps(value)
    return (type(value).__name__ if found or _has_no_repr(value) else repr(value)), found


def _steps(value: object) -> list[tuple[str, Any]]:
    return [(f".{name}", each) for name, each in sorted(attributes(value).items())]


def _module(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    yield "training", module.training


def _named(path: str, value: Any) -> Iterator[tuple[str, Leaf]]:
    for below, each in _by_name(path, value):
        yield from values_in(each, below)


def _by_name(path: str, value: Any) -> list[tuple[str, Any]]:
    return [(f"{path}.{name}", each) for name, each in value.items()] if isinstance(value, Named) else [(path, value)]


def _optimizer(path: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Iterator[tuple[str, Leaf]]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield from values_in(groups, f"{path}.param_groups")
    state = {names.get(id(param), f"parameter {number}"): each
             for number, (param, each) in enumerate(optimizer.state.items())}  # fmt: skip
    yield from values_in(state, f"{path}.state")


def _tensor(value: torch.Tensor) -> Leaf:
    """Return the leaf of a tensor: its bytes, or its text if its layout has no plain bytes."""
    what = (str(value.dtype), tuple(value.shape), str(value.device), str(value.layout))
    if value.layout is not torch.strided or value.device.type == "meta" or value.is_quantized:
        return Leaf((*what, repr(value)), repr(value))
    return Leaf((*what, tensor_bytes(value)), _shown_tensor(value), value.detach().to("cpu", copy=True))


def _shown_tensor(value: torch.Tensor) -> str:
    if value.numel() == 1:
        return f"{value.item()!r} ({value.dtype}, shape {tuple(value.shape)})"
    return f"a tensor ({value.dtype}, shape {tuple(value.shape)})"


def _plain(value: object) -> Leaf:
    return Leaf(value, str(value))


def _shown_key(key: object) -> str:
    return f"a {type(key).__name__}" if _has_no_repr(key) else repr(key)


def _has_no_repr(value: object) -> bool:
    """Tell whether the text of a value contains its address, which differs between runs."""
    return type(value).__repr__ is object.__repr__


def show_difference(one: Leaf | None, other: Leaf | None) -> tuple[str, str]:
    """Return the texts of two different leaves for a message; for two tensors, their first different element."""
    if one is None or other is None:
        return ("not there" if one is None else one.shown), ("not there" if other is None else other.shown)
    a, b = one.tensor, other.tensor
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or a.numel() < 2:
        return one.shown, other.shown
    unequal = a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)
    first = int(unequal.nonzero()[0]) // a.element_size()
    index = [int(each) for each in torch.unravel_index(torch.tensor(first), a.shape)]
    mine, others = (each.reshape(-1)[first].item() for each in (a, b))
    return f"{mine!r} at {index}", f"{others!r} at {index}"
