"""Precision: the type that the forward pass computes in, and the updates that are skipped for values not finite.

With ``"fp16"`` small gradients would round to zero, so the loss is multiplied by a scale, and the gradients are divided
by the scale before the update (`Scaling`). Where the scaled gradients are infinite the update is skipped, and the scale
becomes smaller (https://docs.pytorch.org/docs/stable/amp.html). Skipped updates are counted on the device, so that
nothing waits for it.

`NaNGuard` skips updates after a loss that is NaN. `StopOnNaNLoss` reads losses of a device some batches late, so the
updates between the NaN and its discovery are queued on the device already. Optimizers that take ``found_inf`` (torch's
fused ones) skip an update if that tensor is one, on the device and without the host. So the guard shares one such
tensor with them, which a NaN loss sets and only the end of the epoch clears: the parameters stay as they were before
the NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from flowtrain.core.optimizers import scale_gradients, takes_found_inf
from flowtrain.errors import CoreError
from flowtrain.state.shards import own_part

__all__ = ["DTYPES", "NaNGuard", "Precision", "Scaling", "all_finite", "autocast", "check_precision", "in_precision"]

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

DTYPES: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that autocast computes in, by precision; ``None`` for no autocast."""


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a forward pass of this precision runs."""
    dtype = DTYPES[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def check_precision(device: torch.device, precision: Precision) -> None:
    """Check that a device can compute in a precision: autocast itself warns where it cannot, and computes in float32.

    Raises:
        CoreError: The device cannot compute in that type.
    """
    found = _refusal(device, precision)
    if found is not None:
        able = [repr(each) for each in DTYPES if _refusal(device, each) is None]
        raise CoreError(
            f"precision={precision!r} cannot be used on {device}: {found} Use one of these there: {', '.join(able)}."
        ) from found


def _refusal(device: torch.device, precision: Any) -> Exception | None:
    """Return the exception by which autocast refuses a precision on a device; ``None`` if the device has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            autocast(device, precision)
        except (RuntimeError, UserWarning) as refusal:
            return refusal
    return None


def in_precision(function: Callable[..., Any], device: torch.device, precision: Precision) -> Callable[..., Any]:
    """Return a function that runs under autocast if the precision asks for it; otherwise the function itself."""
    if DTYPES[precision] is None:
        return function

    def run(*args: Any, **named: Any) -> Any:
        """Call the function under autocast."""
        with autocast(device, precision):
            return function(*args, **named)

    return run


class Scaling:
    """The scale of the loss, and the number of updates that were skipped because of it.

    Args:
        device: The device of the gradients.
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
        """Return the loss, multiplied by the scale, for the backward pass."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the scale, and count the update if they are not finite."""
        self._scaler.unscale_(optimizer)
        found = self._scaler._found_inf_per_device(optimizer)  # pyright: ignore[reportPrivateUsage]  # nothing else has it
        for infinite in found.values():
            self._skipped = self._skipped + infinite.detach()  # a sum on the device: nothing waits for it

    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters, unless a gradient is not finite.

        Waits for the device if the optimizer is not fused.
        """
        self._scaler.step(optimizer)

    def update(self, waiting: Iterable[Optimizer]) -> None:
        """Adapt the scale after the updates of a batch.

        Args:
            waiting: The optimizers whose groups are open. Their gradients contain the old scale, and are multiplied so
                that they contain the new one, which waits for the device.
        """
        waiting = list(waiting)
        before = self._scaler.get_scale() if waiting else 1.0
        self._scaler.update()
        for optimizer in waiting:
            scale_gradients(optimizer, self._scaler.get_scale() / before)

    def reset(self) -> None:
        """Forget that gradients were unscaled, because they were discarded before the update; the scale stays."""
        # A scaler refuses to unscale twice before an update, and only a new one forgets that it has.
        before, self._scaler = self._scaler.state_dict(), self._make()
        self._scaler.load_state_dict(before)

    @property
    def skipped(self) -> int:
        """The number of updates that were skipped. Waits for the device."""
        return int(self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler, and the number of skipped updates."""
        return {**self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._skipped = state.get("skipped", 0)
        self._scaler.load_state_dict({name: value for name, value in state.items() if name != "skipped"})


class NaNGuard:
    """Skips the updates after a loss that is NaN.

    Args:
        optimizers: The optimizers; those that take ``found_inf`` are guarded, the others update as ever.
        device: The device of the losses.

    Attributes:
        nan_seen: A tensor of shape ``()`` on the device: 1 if a loss was NaN, otherwise 0.
    """

    def __init__(self, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        self._guarded = [optimizer for optimizer in optimizers if takes_found_inf(optimizer)]
        self.nan_seen = torch.zeros((), device=device)
        for optimizer in self._guarded:
            optimizer.found_inf = self.nan_seen  # type: ignore[attr-defined]  # the attribute that their step looks for

    def see(self, loss: torch.Tensor) -> None:
        """Take note of the loss of a batch, before its update. Does not wait for the device."""
        value = loss.detach().reshape(())
        self.nan_seen.logical_or_(value != value)  # only NaN differs from itself

    def clear(self) -> None:
        """Let updates pass again."""
        self.nan_seen.zero_()

    def release(self) -> None:
        """Guard no optimizer any more."""
        for optimizer in self._guarded:
            del optimizer.found_inf  # type: ignore[attr-defined]  # set when the guard was made
        self._guarded = []


def all_finite(modules: Iterable[torch.nn.Module]) -> bool:
    """Tell whether every parameter that is trained, or its part on this rank, is finite. Waits for the device, once.

    Buffers may hold infinities, as attention masks do, and so may frozen parameters.
    """
    finite = [
        # Types of one byte, such as float8, have no `isfinite`.
        (part.float() if part.element_size() == 1 else part).isfinite().all()
        for module in modules
        for param in module.parameters()
        if param.requires_grad and not is_lazy(param)
        for part in [own_part(param.detach())]
    ]
    return not finite or bool(torch.stack([one.to(finite[0].device) for one in finite]).all())
