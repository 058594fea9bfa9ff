"""Devices: which one to use, and how data gets there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from flowtrain.callback.nested import INSIDE, mapped
from flowtrain.errors import CoreError

__all__ = ["find_device", "place", "rebuild"]


def place(data: Any, device: torch.device) -> Any:
    """Return the data on the device: tensors in containers (see `rebuild`), and objects with ``.to(device)``."""
    return rebuild(data, lambda tensor: tensor.to(device, non_blocking=True), lambda item: item.to(device))


def rebuild(data: Any, change: Callable[[torch.Tensor], Any], move: Callable[[Any], Any]) -> Any:
    """Return the data with every tensor in it changed; the containers around them are made anew, of the same types.

    Args:
        data: A tensor, or any of the containers of `flowtrain.callback.nested` that holds some; other values stay.
        change: What to do with a tensor.
        move: What to do with an object that has a ``to`` of its own. It goes first: a ``PackedSequence`` is a tuple,
            and knows which of its parts stay where they are.
    """

    def change_or_move(item: Any, part: object) -> Any:
        """Return what becomes of one object."""
        if isinstance(item, torch.Tensor):
            return change(item)
        can_move = callable(getattr(item, "to", None)) and not isinstance(item, (torch.nn.Module, type))
        return move(item) if can_move else INSIDE

    return change(data) if isinstance(data, torch.Tensor) else mapped(data, change_or_move)


def find_device(wanted: str | torch.device, models: Iterable[torch.nn.Module]) -> torch.device:
    """Return the device to train on.

    Args:
        wanted: A device, or ``"auto"``: where the models are, if that is not the CPU, otherwise the first accelerator,
            otherwise the CPU.
        models: The models.

    Raises:
        CoreError: The device cannot be used.
    """
    if wanted != "auto":
        try:
            device = torch.device(wanted)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError, ImportError) as error:
            raise CoreError(f"device={wanted!r} cannot be used: {error}") from error
        return device
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type not in ("cpu", "meta"):
                return tensor.device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator
