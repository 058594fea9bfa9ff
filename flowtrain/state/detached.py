"""Values as a snapshot shows them, without the copy: tensors have no graph and record no gradients.

The handlers of a deferrable callback see copies where they run elsewhere, and copies are detached. Where they run in
place, the values that they read go through `detached`, so ``learner.batch.outputs.numpy()`` works in both places or in
neither. A value without a graph is returned as it is, and a detached tensor shares its memory with the one in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flowtrain.data.nested import INSIDE, mapped
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.container import Container
from flowtrain.state.readonly import UNPROTECTED

__all__ = ["detached"]

_SAME = UNPROTECTED - {torch.Tensor, torch.nn.Parameter, frozenset}
"""Types of plain values without a graph."""


def detached(value: Any) -> Any:
    """Return a value with its tensors detached; the value itself, if no tensor in it records gradients.

    Args:
        value: An entry of the learner's state, and no read-only twin of it. Modules stay as they are.
    """
    if type(value) in _SAME:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if _is_detached(value) or (isinstance(value, PhaseMap) and all(map(_is_detached, value.values()))):
        return value
    return mapped(value, _detach, keep=True)


def _is_detached(value: Any) -> bool:
    """Tell by its type that a value has no graph. That is quick: loggers read such values at every batch."""
    return type(value) in _SAME or getattr(type(value), "__detached__", None) is Container.__detached__


def _detach(item: Any, part: Callable[[Any], Any]) -> Any:
    if isinstance(item, torch.Tensor):
        return item.detach() if item.requires_grad else item
    own = getattr(type(item), "__detached__", None)
    return INSIDE if own is None else own(item, part)
