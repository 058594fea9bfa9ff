"""The guard of the parameters where the host learns of a NaN late.

`StopOnNaNLoss` reads losses of a device some batches late, so the updates in between have been given out when it finds
a NaN. Optimizers that take ``found_inf`` (torch's fused ones) skip an update where that tensor is one, on the device
and without a word from the host. So the guard keeps one such tensor, which every NaN loss sets and nothing but the end
of the epoch clears: the parameters stay those before the first NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from flowtrain.core.optimizers import takes_found_inf

__all__ = ["Guard", "all_finite"]


class Guard:
    """Lets no update pass after a NaN loss.

    Args:
        optimizers: Those of them that take ``found_inf`` are guarded.
        device: Where the losses are.
    """

    def __init__(self, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        self._guarded = [optimizer for optimizer in optimizers if takes_found_inf(optimizer)]
        self._found = torch.zeros((), device=device)
        for optimizer in self._guarded:
            optimizer.found_inf = self._found  # type: ignore[attr-defined]  # what their step looks for

    def see(self, loss: torch.Tensor) -> None:
        """Take in the loss of a batch, before its update."""
        value = loss.detach().reshape(())
        self._found.logical_or_(value != value)

    def clear(self) -> None:
        """Let updates pass again."""
        self._found.zero_()

    def release(self) -> None:
        """Guard nothing any more."""
        for optimizer in self._guarded:
            del optimizer.found_inf  # type: ignore[attr-defined]
        self._guarded = []


def all_finite(modules: Iterable[torch.nn.Module]) -> bool:
    """Tell whether every parameter that is trained is finite. Waits for the device, once.

    Buffers may hold infinities, as attention masks do, and so may parameters that are frozen.
    """
    found = [
        (param.detach().float() if param.element_size() == 1 else param.detach()).isfinite().all()  # float8 has no such
        for module in modules
        for param in module.parameters()
        if param.requires_grad and not is_lazy(param)
    ]
    return not found or bool(torch.stack([each.to(found[0].device) for each in found]).all())
