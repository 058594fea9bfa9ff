"""Precision: which type the forward pass computes in, and the scale of the loss that fp16 needs.

With ``"fp16"`` small gradients would round to zero, so the loss is multiplied by a scale, and the gradients are divided
by it before the update. Where that gives infinite gradients the update is skipped and the scale becomes smaller
(https://docs.pytorch.org/docs/stable/amp.html). How many updates were skipped is counted on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch.optim import Optimizer

from flowtrain.core.optimizers import scale_gradients

__all__ = ["DTYPES", "Precision", "Scaling", "autocast", "in_precision"]

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

DTYPES: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in, by precision; ``None`` for no autocast."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass of this precision runs."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def in_precision(function: Callable[..., Any], device: torch.device, precision: Precision) -> Callable[..., Any]:
    """Return the function, run under autocast if the precision asks for it; otherwise the function itself."""
    if DTYPES[precision] is None:
        return function

    def run(*args: Any) -> Any:
        """Call the function under autocast."""
        with autocast(device, precision):
            return function(*args)

    return run


class Scaling:
    """The scale of the loss, and the updates that were skipped because of it.

    Args:
        device: Where the gradients are.
        init_scale: The first scale.
    """

    def __init__(self, device: torch.device, init_scale: float) -> None:
        self._device = device
        self._init_scale = init_scale
        self._scaler = self._make()
        self._skipped: int | torch.Tensor = 0

    def _make(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self._device.type, init_scale=self._init_scale)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to run the backward pass from."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the scale, and count the update if they are not finite."""
        self._scaler.unscale_(optimizer)
        found = self._scaler._found_inf_per_device(optimizer)  # pyright: ignore[reportPrivateUsage]  # nothing else has it
        for infinite in found.values():
            self._skipped = self._skipped + infinite.detach()  # a sum on the device: nothing waits for it

    def step(self, optimizer: Optimizer) -> None:
        """Step, unless a gradient is not finite. Waits for the device where the optimizer is not a fused one."""
        self._scaler.step(optimizer)

    def update(self, waiting: Iterable[Optimizer]) -> None:
        """Adapt the scale after the steps; `waiting` have gradients with the scale from before in them."""
        waiting = list(waiting)
        before = self._scaler.get_scale() if waiting else 1.0
        self._scaler.update()
        for optimizer in waiting:
            scale_gradients(optimizer, self._scaler.get_scale() / before)

    def reset(self) -> None:
        """Forget what was unscaled for an update that never came; the scale stays."""
        before, self._scaler = self._scaler.state_dict(), self._make()
        self._scaler.load_state_dict(before)

    @property
    def skipped(self) -> int:
        """How many updates were skipped. Waits for the device."""
        return int(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, and what it depends on."""
        return {**self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._skipped = state.get("skipped", 0)
        self._scaler.load_state_dict({name: value for name, value in state.items() if name != "skipped"})
