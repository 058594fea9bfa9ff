"""Metrics of a batch: functions of ``(outputs, targets)`` that return a tensor with one element.

Each function refuses shapes that do not fit, because broadcasting would still give a number, but a wrong one. Each has
the attribute ``higher_is_better``, as torchmetrics objects have, for callbacks that look for the best epoch. For other
metrics, pass torchmetrics objects to `flowtrain.callbacks.Metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from flowtrain.errors import LossError, UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.errors.describing import describe

__all__ = ["accuracy", "mean_absolute_error", "mean_squared_error", "model_loss", "top_k_accuracy"]

F = TypeVar("F", bound=Callable[[torch.Tensor, torch.Tensor], torch.Tensor])


def _good(*, high: bool) -> Callable[[F], F]:
    """Return a decorator that sets ``higher_is_better`` of a metric."""

    def mark(metric: F) -> F:
        """Set the attribute."""
        vars(metric)["higher_is_better"] = high
        return metric

    return mark


@_good(high=True)
def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the share of samples whose largest output is at the target class.

    Args:
        outputs: Scores or probabilities, of shape ``(batch, classes, ...)``.
        targets: Class numbers of shape ``(batch, ...)``, or probabilities of the shape of `outputs`.

    Raises:
        UsageError: There are fewer than two classes, or the shapes do not fit.

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    _check_tensor("accuracy", outputs)
    _check_tensor("accuracy", targets, "targets")
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        raise UsageError(
            f"accuracy needs outputs of shape (batch, classes, ...), got {tuple(outputs.shape)}. For one score per "
            f"sample write a function, such as lambda outputs, targets: ((outputs > 0) == targets).float().mean()."
        )
    predicted = outputs.argmax(1)
    classes = targets.argmax(1) if targets.shape == outputs.shape else targets
    _check_shapes("accuracy", predicted, classes, "the largest outputs")
    return (predicted == classes).float().mean()


def top_k_accuracy(k: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a metric, the share of samples with the target among the `k` largest outputs, named ``top_<k>_accuracy``.

    The metric takes outputs of shape ``(batch, classes)`` and class numbers of shape ``(batch,)`` as targets.

    Raises:
        UsageError: `k` is no whole number, or below 1. In the metric: the shapes do not fit.

    >>> top_k_accuracy(2)(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([1, 2]))
    tensor(0.5000)
    """
    k = whole_number("top_k_accuracy(): k", k)

    @_good(high=True)
    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the share of rows whose target is among the k highest outputs.

        Raises:
            UsageError: The shapes do not fit.
        """
        _check_tensor(f"top_{k}_accuracy", outputs)
        if outputs.ndim != 2:
            raise UsageError(f"top_{k}_accuracy needs outputs of shape (batch, classes), got {tuple(outputs.shape)}.")
        _check_shapes(f"top_{k}_accuracy", outputs[:, 0], targets, "outputs without their classes")
        best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices  # with fewer than k classes all are among the k
        return (best == targets.unsqueeze(1)).any(1).float().mean()

    metric.__name__ = f"top_{k}_accuracy"
    return metric


@_good(high=False)
def mean_absolute_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``|outputs - targets|``, for values of one shape, in at least single precision.

    Raises:
        UsageError: The shapes are different.

    >>> mean_absolute_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(1.)
    """
    _check_shapes("mean_absolute_error", outputs, targets)
    return _difference(outputs, targets).abs().mean()


@_good(high=False)
def mean_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``|outputs - targets|**2``, for values of one shape, in at least single precision.

    Raises:
        UsageError: The shapes are different.

    >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    _check_shapes("mean_squared_error", outputs, targets)
    difference = _difference(outputs, targets)
    return (difference.abs() if difference.is_complex() else difference).square().mean()


@_good(high=False)
def model_loss(outputs: Any, targets: object = None) -> torch.Tensor:
    """Return the loss that the model has computed itself: ``outputs.loss``, or ``outputs["loss"]`` of a mapping.

    This is the loss function of a learner for such models, as those of Hugging Face are:
    ``Learner(model, model_loss, ...)``.

    Args:
        outputs: The outputs of the model.
        targets: Not used, since the model had them among its inputs.

    Raises:
        LossError: The outputs have no loss.

    >>> model_loss({"loss": torch.tensor(2.0), "logits": torch.zeros(8, 2)})
    tensor(2.)
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise LossError(
            f"model_loss takes the loss from the outputs of the model, and there is none in {describe(outputs)}. A "
            f"model of Hugging Face computes it if the batch has labels: let the dataset return them, or pass a loss "
            f"function of (outputs, targets), such as lambda outputs, targets: cross_entropy(outputs.logits, targets)."
        )
    return loss  # type: ignore[no-any-return]  # a step checks that the loss is a tensor


def _difference(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return ``outputs - targets`` in at least single precision.

    Squares of half precision overflow at 256, bytes have no negative numbers, and whole numbers have no mean.
    """
    kind = torch.promote_types(torch.promote_types(outputs.dtype, targets.dtype), torch.float32)
    return outputs.to(kind) - targets.to(kind)


def _check_tensor(name: str, outputs: torch.Tensor, what: str = "outputs") -> None:
    if not is_a(outputs, torch.Tensor):
        key = next(iter(outputs), "logits") if isinstance(outputs, Mapping) and "logits" not in outputs else "logits"
        part = f"{what}.logits" if hasattr(outputs, "logits") else f"{what}[{key!r}]"
        both = f"{part}, targets" if what == "outputs" else f"outputs, {part}"
        raise UsageError(
            f"{name} compares tensors, and the {what} are {describe(outputs)}. Take the part that is meant: "
            f"Metrics(Metric(lambda outputs, targets: {name}({both}), name={name!r}))."
        )


def _check_shapes(name: str, outputs: torch.Tensor, targets: torch.Tensor, what: str = "outputs") -> None:
    _check_tensor(name, outputs)
    _check_tensor(name, targets, "targets")
    if outputs.shape != targets.shape:
        raise UsageError(
            f"{name} compares values of one shape: {what} of {tuple(outputs.shape)} with targets of "
            f"{tuple(targets.shape)}. Change the model's last layer or the targets, as with .squeeze(1)."
        )
