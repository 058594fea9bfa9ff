"""The gradients of a sharded model that a rank has added by itself, and has not sent yet.

While an accumulation group is open, `fully_shard` keeps the gradients of this rank beside the parameters: each has the
shape of the whole parameter, and ``param.grad`` is ``None`` until all ranks send their gradients. Torch has no public
way to them, so this module is the only one that reads and sets these attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from flowtrain.core.world import World

__all__ = ["UnsentGradients"]


class UnsentGradients:
    """The gradients of one sharded model that are still on this rank.

    Args:
        world: The ranks.
        units: The submodules that `fully_shard` was called with.
    """

    def __init__(self, world: World, units: Sequence[Any]) -> None:
        self._world, self._units = world, units

    def discard(self) -> None:
        """Discard the gradients, as the gradients of a group that is cancelled."""
        for param in self._params():
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None

    def by_parameter(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return the gradients, each of the shape of the whole parameter, by the sharded parameter."""
        found = {param.sharded_param: _gradient(param) for param in self._params()}
        return {param: gradient for param, gradient in found.items() if gradient is not None}

    def put(self, param: torch.nn.Parameter, gradient: torch.Tensor | None) -> bool:
        """Set the gradient of a sharded parameter to a copy of this one; tell whether the parameter is sharded."""
        for known in self._params():
            if known.sharded_param is param:
                known.unsharded_accumulated_grad = None if gradient is None else gradient.to(param.device, copy=True)
                return True
        return False

    def average(self) -> None:
        """Add the means of the gradients over all ranks to ``param.grad``, for a group that ended without sending."""
        from torch.distributed.tensor import distribute_tensor

        for param in self._params():
            grad = _gradient(param)
            there = self._world.sum([int(grad is not None)])[0]
            if not there:
                continue
            shards = param.sharded_param
            mean = torch.zeros(shards.shape) if grad is None else grad
            mean = mean.to(shards.device, shards.dtype).div_(self._world.size)
            self._world.guarded(dist.all_reduce, mean)
            added = distribute_tensor(mean, shards.device_mesh, shards.placements)
            shards.grad = added if shards.grad is None else shards.grad + added
        self.discard()

    def _params(self) -> list[Any]:
        """Return torch's objects for the parameters of all units."""
        groups: list[Any] = []
        for unit in self._units:
            state = unit._get_fsdp_state()
            groups += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        return [param for group in groups if group is not None for param in group.fsdp_params]


def _gradient(param: Any) -> torch.Tensor | None:
    """Return the gradient of one of torch's objects for a parameter that this rank has added by itself."""
    own: Any = getattr(param, "_unsharded_param", None)
    found: torch.Tensor | None = param.unsharded_accumulated_grad
    return own.grad if found is None and own is not None else found
