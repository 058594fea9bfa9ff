"""Models and loss functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Tempered(nn.Module):
    """A loss function with a trainable parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs * self.temperature, targets)


class Scale(torch.nn.Module):
    """Multiplies the part of the inputs that `pick` selects by a parameter, which is 1."""

    def __init__(self, pick: Callable[[Any], torch.Tensor] = lambda inputs: inputs) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.pick = pick

    def forward(self, inputs: Any) -> torch.Tensor:
        return self.pick(inputs) * self.scale


def mixed_model() -> torch.nn.Module:
    """Return a model with weights of several shapes, a frozen weight, and buffers of two types."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    model[2].bias.requires_grad_(False)
    return model
