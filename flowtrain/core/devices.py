"""Devices: the choice of the device, and the functions that move nested data there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from flowtrain.data.nested import INSIDE, mapped
from flowtrain.errors import CoreError
from flowtrain.state.accelerator import accelerator, accelerator_kind, select

__all__ = ["allow_tf32", "change_tensors", "find_device", "move_modules", "to_device"]


def to_device(data: Any, device: torch.device) -> Any:
    """Return the data on the device: tensors in containers (see `change_tensors`), and objects with ``.to(device)``."""
    return change_tensors(data, lambda tensor: tensor.to(device, non_blocking=True), lambda item: item.to(device))


def change_tensors(data: Any, change: Callable[[torch.Tensor], Any], move: Callable[[Any], Any]) -> Any:
    """Return the data with every tensor in it changed, in new containers of the same types.

    Args:
        data: A tensor, or a container of tensors of the types in `flowtrain.data.nested`; other values stay the
            same.
        change: A function that returns the tensor for the result.
        move: A function that moves an object with a ``to`` of its own. Such an object is not taken apart, even if it is
            a container: a ``PackedSequence`` is a tuple, and its ``to`` knows which of its parts stay on the CPU.
    """

    def change_or_move(item: Any, part: object) -> Any:
        """Return one object for the result, or `INSIDE` for a container and a leaf without a ``to``."""
        if isinstance(item, torch.Tensor):
            return change(item)
        can_move = callable(getattr(item, "to", None)) and not isinstance(item, (torch.nn.Module, type))
        return move(item) if can_move else INSIDE

    return change(data) if isinstance(data, torch.Tensor) else mapped(data, change_or_move)


def move_modules(modules: Iterable[Any], device: torch.device, *, channels_last: bool) -> None:
    """Move modules to a device, in place, and into the memory format in which convolutions are fast if that is wanted.

    Args:
        modules: The modules.
        device: The device.
        channels_last: Whether to change the memory format too.

    Raises:
        CoreError: A parameter or a buffer has no values.
    """
    for module in modules:
        named = (*module.named_parameters(), *module.named_buffers())
        empty = [name for name, tensor in named if tensor.device.type == "meta"]
        if empty:
            raise CoreError(
                f"{type(module).__name__} has tensors on the meta device, which have shapes and no values: "
                f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}. Make the model on a real device; or write "
                f"model.to_empty(device={str(device)!r}), and then initialise each of its tensors."
            )
        module.to(device)
        if channels_last:
            module.to(memory_format=torch.channels_last)


def allow_tf32(device: torch.device, wanted: bool | None) -> None:
    """Set whether float32 products may round their factors to TF32; ``None`` leaves the setting of torch as it is."""
    if wanted is not None and device.type == "cuda":  # no other accelerator has this type of number
        torch.set_float32_matmul_precision("high" if wanted else "highest")
        torch.backends.cudnn.allow_tf32 = wanted


def find_device(
    wanted: str | torch.device, models: Iterable[torch.nn.Module], number: int | None = None
) -> torch.device:
    """Return the device to train on.

    Args:
        wanted: A device, or ``"auto"``: the device of the models if that is not the CPU, otherwise the first
            accelerator, otherwise the CPU.
        models: The models.
        number: The number of this process on its machine, if several train together: each gets the accelerator of its
            number, which becomes the current device. ``None`` for one process.

    Raises:
        CoreError: The device cannot be used.
    """
    if number is not None and (found := accelerator()) is not None and wanted in ("auto", found.type):
        device = torch.device(found.type, number % torch.accelerator.device_count())  # a launcher may show one to each
        select(device)
        wanted = str(device)
    if wanted != "auto":
        try:
            device = torch.device(wanted)
            if device.type == accelerator_kind() and 0 < torch.accelerator.device_count() <= (device.index or 0):
                raise RuntimeError(f"there is no {device.type} device with this number")  # not every type refuses it
            if device.type == "meta":
                raise RuntimeError("its tensors have shapes and no values, so nothing can be trained there")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError, ImportError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")  # the rest may be pages long
            raise CoreError(
                f"device={wanted!r} cannot be used: {reason}. This process has: {', '.join(map(repr, _devices()))}. "
                f"Write one of these, or leave device= out. Another one needs its driver, and a build of torch for it "
                f"(https://pytorch.org/get-started/locally/; this is {torch.__version__})."
            ) from error
        return device
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type not in ("cpu", "meta"):
                return tensor.device
    return accelerator() or torch.device("cpu")


def _devices() -> list[str]:
    """Return the names of all devices that can be trained on."""
    found = accelerator()
    if found is None:
        return ["cpu"]
    return ["cpu", *(f"{found.type}:{number}" for number in range(torch.accelerator.device_count()))]
