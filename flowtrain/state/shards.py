"""Sharded tensors: each rank holds a part of a tensor, as a `DTensor` of torch, which has the shape of the whole.

A function that puts a tensor together is a collective: every rank must call it, for the same tensors in the same order.
`Pieces` is a sharded tensor in the files of a checkpoint, of which any rank can read any part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flowtrain.errors import CheckpointError

__all__ = ["Pieces", "is_sharded", "own_part", "own_pieces", "shard_like", "whole"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a `DTensor`, of which this process holds a part."""
    # Nearly all tensors are of these types, and to look for an attribute that is not there takes as long as a copy.
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "full_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a sharded tensor that this rank has, as a plain tensor; any other tensor as it is."""
    local: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def own_pieces(tensor: torch.Tensor) -> list[tuple[list[int], torch.Tensor]]:
    """Return copies on the CPU of the pieces of a sharded tensor that this rank has, each with its place in the whole.

    The pieces of all ranks make up the whole once: where several ranks have the same piece, the first one returns it.
    """
    shards: Any = tensor
    at = shards.device_mesh.get_coordinate()
    if at is None or any(place and each.is_replicate() for place, each in zip(at, shards.placements, strict=True)):
        return []
    local = own_part(tensor.detach()).to("cpu", copy=True)
    return [([*chunk.offsets], local) for chunk in shards.__create_chunk_list__()] if local.numel() else []


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor put together, for which every rank must call this; any other tensor as it is."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Pieces:
    """A tensor in the files of a checkpoint, in the pieces that ranks have written.

    Attributes:
        shape: The shape of the whole tensor.
        dtype: Its type of numbers.

    Args:
        shape: The shape of the whole tensor.
        dtype: Its type of numbers.
        pieces: The pieces, each with the place of its first element in the whole.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[tuple[Sequence[int], torch.Tensor]]
    ) -> None:
        self.shape, self.dtype, self._pieces = torch.Size(shape), dtype, pieces

    def whole(self) -> torch.Tensor:
        """Return the whole tensor."""
        return self.part([0] * len(self.shape), self.shape)

    def part(self, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Return a part of the tensor, for which only this part of the files is read.

        Args:
            start: The place of its first element.
            shape: Its shape.

        Raises:
            CheckpointError: The pieces do not make up that part.
        """
        found, filled = torch.empty([*shape], dtype=self.dtype), 0
        for place, piece in self._pieces:
            spans = [
                (max(first, begin), min(first + size, begin + length))
                for first, size, begin, length in zip(start, shape, place, piece.shape, strict=True)
            ]
            if all(low < high for low, high in spans):
                here = tuple(slice(low - first, high - first) for (low, high), first in zip(spans, start, strict=True))
                there = tuple(slice(low - begin, high - begin) for (low, high), begin in zip(spans, place, strict=True))
                found[here] = piece[there]
                filled += math.prod(high - low for low, high in spans)
        if filled != found.numel():
            raise CheckpointError(
                f"A tensor of shape {tuple(self.shape)} is not complete: its pieces have {filled} of the "
                f"{found.numel()} elements that were asked for. Pass another checkpoint."
            )
        return found


def shard_like(tensor: Any, like: Any) -> Any:
    """Return the part of this rank of a whole tensor, if `like` is sharded; otherwise the tensor as it is.

    Args:
        tensor: The tensor, which every rank has, of the shape of `like`; or its `Pieces`; or any other value, which is
            returned.
        like: The tensor that has the place.
    """
    shards: Any = like
    sharded = isinstance(like, torch.Tensor) and is_sharded(like)
    if isinstance(tensor, Pieces):
        if not sharded or tensor.shape != like.shape:
            return tensor.whole()
        from torch.distributed.tensor import DTensor

        [chunk] = shards.__create_chunk_list__()
        local = tensor.part(chunk.offsets, chunk.sizes).to(like.device)
        return DTensor.from_local(
            local, shards.device_mesh, shards.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    if not sharded or not isinstance(tensor, torch.Tensor) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), shards.device_mesh, shards.placements, src_data_rank=None)
