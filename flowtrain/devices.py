"""Devices: which one to use, and how data gets there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from flowtrain.errors import CoreError

__all__ = ["find_device", "place"]


def place(data: Any, device: torch.device) -> Any:
    """Return the data on the device: tensors in tuples, lists, dicts and objects with ``.to(device)``."""
    if isinstance(data, torch.Tensor):
        return data.to(device, non_blocking=True)
    to = getattr(data, "to", None)
    if callable(to) and not isinstance(data, torch.nn.Module):
        return to(device)  # its own way goes first: a PackedSequence is a tuple, and knows what stays
    if isinstance(data, tuple):
        moved = [place(item, device) for item in data]
        return type(data)(*moved) if hasattr(data, "_fields") else tuple(moved)
    if isinstance(data, list):
        return [place(item, device) for item in data]
    if isinstance(data, dict):
        made = {key: place(item, device) for key, item in data.items()}
        return made if type(data) is dict else _rebuild(data, made)
    return data


def _rebuild(data: dict[Any, Any], made: dict[Any, Any]) -> Any:
    """Return a dict of the same type as `data`, such as a model's output class, with other values."""
    copy = data.copy()
    for key, item in made.items():
        copy[key] = item
    return copy


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
