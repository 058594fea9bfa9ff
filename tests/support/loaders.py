"""Loaders that fail, and data with invalid values."""

from __future__ import annotations

from collections.abc import Iterator

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


def batches_with(value: float, at: int, n_batches: int) -> Batches:
    """Return tiny batches; in one of them, counted from 1, every target has the given value."""
    batches = tiny_batches(n_batches=n_batches)
    inputs, targets = batches[at - 1]
    batches[at - 1] = (inputs, torch.full_like(targets, value))
    return batches
