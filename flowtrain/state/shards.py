"""Sharded tensors: each rank holds a part of a tensor, as a `DTensor` of torch, which has the shape of the whole.

A function that puts a tensor together is a collective: every rank must call it, for the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["is_sharded", "own_part", "spread", "whole"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a `DTensor`, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a sharded tensor that this rank has, as a plain tensor; any other tensor as it is."""
    local: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor put together, for which every rank must call this; any other tensor as it is."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def spread(tensor: Any, like: Any) -> Any:
    """Return the part of this rank of a whole tensor, if `like` is sharded; otherwise the tensor as it is.

    Args:
        tensor: The tensor, which every rank has, of the shape of `like`; or any other value, which is returned.
        like: The tensor that has the place.
    """
    if not isinstance(like, torch.Tensor) or not is_sharded(like):
        return tensor
    if not isinstance(tensor, torch.Tensor) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shards: Any = like
    return distribute_tensor(tensor.to(like.device), shards.device_mesh, shards.placements, src_data_rank=None)
