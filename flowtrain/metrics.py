"""Metrics of a batch: functions of ``(outputs, targets)`` that return a tensor with one element.

For more than these, pass torchmetrics objects to `flowtrain.callbacks.Metrics`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["accuracy", "mean_absolute_error", "mean_squared_error", "top_k_accuracy"]


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the share of samples whose largest output is at the target class.

    Args:
        outputs: Scores or probabilities, of shape ``(batch, classes, ...)``.
        targets: Class numbers of shape ``(batch, ...)``, or probabilities of the shape of `outputs`.

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    if targets.shape == outputs.shape:
        targets = targets.argmax(1)
    return (outputs.argmax(1) == targets).float().mean()


def top_k_accuracy(k: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a metric named ``top_k_accuracy``: the share of samples with the target among the `k` largest outputs.

    The outputs have shape ``(batch, classes)``, the targets ``(batch,)``.

    Raises:
        ValueError: `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"top_k_accuracy(k={k}): k is at least 1.")

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
        return (best == targets.unsqueeze(1)).any(1).float().mean()

    metric.__name__ = f"top_{k}_accuracy"
    return metric


def mean_absolute_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``|outputs - targets|``; both have the same shape."""
    return (outputs - targets).abs().mean()


def mean_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``(outputs - targets)**2``; both have the same shape."""
    return (outputs - targets).square().mean()
