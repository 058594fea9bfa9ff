"""Values as a snapshot shows them, without the copy: tensors have no graph and record no gradients.

The handlers of a deferrable callback see copies where they run elsewhere, and copies are detached. Where they run in
place, what they read goes through `detached`, so ``learner.batch.outputs.numpy()`` works in both places or in neither.
What holds no tensor with a graph is returned as it is, and a detached tensor shares its memory with the one in use.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flowtrain.state.readonly import PLAIN

__all__ = ["detached"]

_DEPTH = 8
"""How deep containers are followed: one may hold itself."""
_OBJECTS = (UserDict, UserList, types.SimpleNamespace)
_SAME = PLAIN - {torch.Tensor, torch.nn.Parameter}
"""Types of values without a graph, by exact type, which is quick: loggers read such values at every batch."""


def detached(value: Any, depth: int = _DEPTH) -> Any:
    """Return a value with its tensors detached; the value itself, if no tensor in it records gradients.

    Args:
        value: What is in the learner's state, and no read-only twin of it. Modules stay as they are.
        depth: How deep to follow containers and dataclasses.
    """
    kind = type(value)
    if kind in _SAME:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if depth == 0:
        return value
    own = getattr(kind, "__detached__", None)
    if own is not None:
        return own(value, lambda item: detached(item, depth - 1))
    if isinstance(value, tuple):
        items = [detached(item, depth - 1) for item in value]
        if all(one is other for one, other in zip(value, items, strict=True)):
            return value
        make: Callable[[Any], Any] = getattr(kind, "_make", kind)
        return make(items)
    if isinstance(value, dict):
        return _with(value, dict.items(value), dict.__setitem__, depth)
    for sequence in (list, deque):
        if isinstance(value, sequence):
            return _with(value, enumerate(value), sequence.__setitem__, depth)
    if (dataclasses.is_dataclass(value) and not isinstance(value, type)) or isinstance(value, _OBJECTS):
        return _with(value, (), setattr, depth)
    return value


def _with(value: Any, items: Any, place: Callable[[Any, Any, Any], None], depth: int) -> Any:
    """Return a copy of a container or an object with what is in it, and its attributes, detached; or it itself."""
    changed = list(_changed(items, depth))
    attributes = dict(_changed(list(getattr(value, "__dict__", {}).items()), depth))
    if not changed and not attributes:
        return value
    made = copy.copy(value)
    for key, item in changed:
        place(made, key, item)
    if attributes:
        vars(made).update(attributes)  # past a frozen dataclass, which refuses
    return made


def _changed(items: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    for key, item in items:
        if type(item) not in _SAME:
            new = detached(item, depth - 1)
            if new is not item:
                yield key, new
