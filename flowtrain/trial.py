"""Trying things before training: the first batch of a loader, and a model that a forward pass does not change.

Whoever tries something enters `untouched`, takes a batch with `first_batch`, and runs a `borrowed` copy of the model.
Then the model, its buffers, the loader and the random numbers are what they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from flowtrain.devices import place
from flowtrain.scratch import same_random_numbers

__all__ = ["CannotLook", "borrowed", "first_batch", "on_device_of", "untouched"]

M = TypeVar("M")

untouched = same_random_numbers
"""The context of a trial: torch's, Python's and numpy's random numbers go on afterwards as if it had not been."""


class CannotLook(Exception):
    """To take a batch from this loader would change what training gets from it; the message says why."""


def first_batch(loader: Any) -> list[Any]:
    """Return a list of a copy of the first batch that a loader may give; an empty one where it gives none.

    Looked into are sequences and a `torch.utils.data.DataLoader` of a dataset with indices, in this process and
    with copies of its samplers.

    Raises:
        CannotLook: Any other loader; and one whose samplers cannot be copied.
    """
    if isinstance(loader, Sequence):  # handlers are shown a twin of a list
        return copy.deepcopy(list(islice(loader, 1)))
    if not isinstance(loader, DataLoader):
        raise CannotLook(f"a {type(loader).__name__} is asked for batches by training alone")
    if isinstance(loader.dataset, IterableDataset):
        raise CannotLook("an IterableDataset may lose what it gives")
    return copy.deepcopy(list(islice(_beside(loader), 1)))


def _beside(loader: DataLoader[Any]) -> Iterable[Any]:
    """Return a loader that gives what this one would, with samplers and generators of its own and no workers."""
    other = copy.copy(loader)
    names = ("batch_sampler", "generator", "sampler")
    try:
        # Together, since the samplers and the loader share a generator. The dataset stays: it may be large.
        parts = copy.deepcopy({name: vars(loader)[name] for name in names}, {id(loader.dataset): loader.dataset})
    except Exception as error:
        raise CannotLook(f"its samplers cannot be copied: {type(error).__name__}: {error}") from error
    vars(other).update(parts, num_workers=0, timeout=0, _iterator=None)  # its own __setattr__ refuses a sampler
    return other


def borrowed(module: M) -> M:
    """Return a copy of a module that shares its parameters; buffers and other attributes are copies.

    A forward pass changes nothing of the original then. What is no module is returned as it is.

    Raises:
        CannotLook: Something in it cannot be copied.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    shared = {id(param): param for param in module.parameters() if not is_lazy(param)}  # a lazy one would be made
    try:
        return copy.deepcopy(module, shared)
    except Exception as error:
        raise CannotLook(f"it cannot be copied: {type(error).__name__}: {error}") from error


def on_device_of(data: Any, modules: Sequence[torch.nn.Module]) -> Any:
    """Return data on the device of the first parameter or buffer."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return place(data, tensor.device)
    return data
