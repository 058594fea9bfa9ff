"""Loaders that fail, data with invalid values, and the end of workers that stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from flowtrain.testing import tiny_batches

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Failing:
    """A loader that raises after its last batch."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from self.batches
        raise ZeroDivisionError


def end_workers(loaders: Iterable[Any]) -> None:
    """End the workers that loaders keep from one pass to the next.

    A learner and its loaders are freed by garbage collection. It may close the queue of a worker before it frees the
    loader, and then torch waits five seconds for that worker.
    """
    for loader in loaders:
        vars(loader)["_iterator"] = None


def batches_with(value: float, at: int, n_batches: int) -> Batches:
    """Return tiny batches; in one of them, counted from 1, every target has the given value."""
    batches = tiny_batches(n_batches=n_batches)
    inputs, targets = batches[at - 1]
    batches[at - 1] = (inputs, torch.full_like(targets, value))
    return batches
