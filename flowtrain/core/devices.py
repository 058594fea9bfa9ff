"""Devices: which one to use, and how data gets there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flowtrain.errors import CoreError

__all__ = ["find_device", "place", "rebuild"]


def place(data: Any, device: torch.device) -> Any:
    """Return the data on the device: tensors in containers (see `rebuild`), and objects with ``.to(device)``."""
    return rebuild(data, lambda tensor: tensor.to(device, non_blocking=True), lambda item: item.to(device))


def rebuild(data: Any, change: Callable[[torch.Tensor], Any], move: Callable[[Any], Any]) -> Any:
    """Return the data with every tensor in it changed; the containers around them are made anew, of the same types.

    Args:
        data: A tensor, or tuples, lists, dicts, named tuples and dataclasses that hold some; other values stay.
        change: What to do with a tensor.
        move: What to do with an object that has a ``to`` of its own. It goes first: a ``PackedSequence`` is a tuple,
            and knows which of its parts stay where they are.
    """
    if isinstance(data, torch.Tensor):
        return change(data)
    if callable(getattr(data, "to", None)) and not isinstance(data, (torch.nn.Module, type)):
        return move(data)
    if isinstance(data, tuple):
        moved = [rebuild(item, change, move) for item in data]
        return type(data)(*moved) if hasattr(data, "_fields") else tuple(moved)
    if isinstance(data, list):
        return [rebuild(item, change, move) for item in data]
    if isinstance(data, dict):
        made = {key: rebuild(item, change, move) for key, item in data.items()}
        return made if type(data) is dict else _fill(data, made)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _rebuild_dataclass(data, change, move)
    return data


def _fill(data: dict[Any, Any], made: dict[Any, Any]) -> Any:
    """Return a dict of the same type as `data`, such as a model's output class, with other values."""
    made_alike = data.copy()
    for key, item in made.items():
        made_alike[key] = item
    return made_alike


def _rebuild_dataclass(data: Any, change: Callable[[torch.Tensor], Any], move: Callable[[Any], Any]) -> Any:
    """Return a copy with other fields. Not by its constructor, which may take other arguments or compute anew."""
    made = copy.copy(data)
    for field in dataclasses.fields(data):
        if hasattr(data, field.name):
            object.__setattr__(made, field.name, rebuild(getattr(data, field.name), change, move))  # frozen or not
    return made


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
