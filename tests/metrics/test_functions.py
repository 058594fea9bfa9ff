"""The metric functions: compared with torchmetrics and plain sums, and the shapes that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics.functional as reference

from flowtrain import UsageError
from flowtrain.metrics import accuracy, mean_absolute_error, mean_squared_error, top_k_accuracy
from tests.support.untyped import untyped

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scores(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def classes(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(31, 5), (7, 5, 4), (3, 5, 4, 2)])
def test_accuracy_is_that_of_torchmetrics(shape: tuple[int, ...]) -> None:
    outputs, targets = scores(*shape), classes(5, shape[0], *shape[2:])
    expected = reference.accuracy(outputs, targets, "multiclass", num_classes=5, average="micro")
    assert accuracy(outputs, targets).item() == pytest.approx(expected.item())


def test_accuracy_takes_probabilities_as_targets() -> None:
    outputs, targets = scores(9, 4), classes(4, 9)
    assert accuracy(outputs, torch.nn.functional.one_hot(targets, 4).float()) == accuracy(outputs, targets)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_top_k_accuracy_is_that_of_torchmetrics(k: int) -> None:
    outputs, targets = scores(40, 5), classes(5, 40)
    metric = top_k_accuracy(k)
    most = min(k, 5)
    expected = reference.accuracy(outputs, targets, "multiclass", num_classes=5, average="micro", top_k=most)
    assert metric(outputs, targets).item() == pytest.approx(expected.item())
    assert metric.__name__ == f"top_{k}_accuracy"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(mean_absolute_error, reference.mean_absolute_error), (mean_squared_error, reference.mean_squared_error)],
)
def test_errors_are_those_of_torchmetrics(ours: Function, theirs: Function) -> None:
    outputs, targets = scores(6, 3), scores(6, 3) ** 2
    assert ours(outputs, targets).item() == pytest.approx(theirs(outputs, targets).item())


@pytest.mark.parametrize(
    ("metric", "outputs", "targets", "message"),
    [
        (accuracy, (8, 1), (8, 1), r"accuracy needs outputs of shape \(batch, classes, ...\), got \(8, 1\). For one"),
        (accuracy, (8,), (8,), r"got \(8,\)"),
        (accuracy, (8, 3), (8, 1), r"the largest outputs of \(8,\) with targets of \(8, 1\). Change .* \.squeeze\(1\)"),
        (top_k_accuracy(2), (8, 3), (8, 1), r"top_2_accuracy compares .* \(8,\) with targets of \(8, 1\)"),
        (top_k_accuracy(2), (8, 3, 2), (8, 2), r"top_2_accuracy needs outputs of shape \(batch, classes\), got"),
        (mean_absolute_error, (8,), (8, 1), r"mean_absolute_error compares .* outputs of \(8,\) with .* \(8, 1\)"),
        (mean_squared_error, (8, 1), (8,), r"mean_squared_error compares .* outputs of \(8, 1\) with .* \(8,\)"),
    ],
)
def test_shapes_that_would_only_broadcast_are_refused(
    metric: Function, outputs: tuple[int, ...], targets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        metric(torch.zeros(outputs), torch.zeros(targets))


@pytest.mark.parametrize(
    ("kind", "absolute", "squared"),
    [
        (torch.float16, 400.0, 160_000.0),
        (torch.bfloat16, 400.0, 160_000.0),
        (torch.uint8, 200.0, 40_000.0),
        (torch.int64, 400.0, 160_000.0),
        (torch.complex64, 500.0, 250_000.0),
        (torch.bool, 1.0, 1.0),
    ],
)
def test_errors_of_any_type_are_numbers_of_single_precision(kind: torch.dtype, absolute: float, squared: float) -> None:
    """Half precision ends at 65,504, bytes at 255, and the square of a complex number is none of its size."""
    small = torch.zeros(2, dtype=kind)
    large = small + 300 + 400j if kind is torch.complex64 else torch.full((2,), absolute).to(kind)
    for outputs, targets in ((small, large), (large, small)):
        for metric, value in ((mean_absolute_error, absolute), (mean_squared_error, squared)):
            found = metric(outputs, targets)
            assert (found.dtype, found.item()) == (torch.float32, value)


@pytest.mark.parametrize("k", [0, -1, 1.5, None])
def test_top_k_needs_a_whole_number(k: int) -> None:
    with pytest.raises(UsageError, match=rf"top_k_accuracy\(\): k is a whole number, at least 1, got {k!r}\."):
        top_k_accuracy(k)


@pytest.mark.parametrize(
    ("metric", "outputs", "text"),
    [
        (
            accuracy,
            {"logits": torch.zeros(2, 2)},
            "accuracy compares tensors, and the outputs are dict with keys 'logits'. Take the part that is meant: "
            "Metrics(Metric(lambda outputs, targets: accuracy(outputs['logits'], targets), name='accuracy')).",
        ),
        (
            accuracy,
            {"scores": torch.zeros(2, 2)},
            "accuracy compares tensors, and the outputs are dict with keys 'scores'. Take the part that is meant: "
            "Metrics(Metric(lambda outputs, targets: accuracy(outputs['scores'], targets), name='accuracy')).",
        ),
        (mean_squared_error, (torch.zeros(2),), "mean_squared_error compares tensors, and the outputs are tuple of 1:"),
        (top_k_accuracy(2), SimpleNamespace(logits=0), "top_2_accuracy compares tensors, and the outputs are Simple"),
    ],
)
def test_outputs_that_are_no_tensor(metric: Any, outputs: Any, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        metric(outputs, torch.zeros(2))
    assert str(raised.value).startswith(text)


def test_targets_that_are_no_tensor() -> None:
    with pytest.raises(UsageError) as raised:
        accuracy(torch.zeros(2, 2), untyped({"classes": torch.zeros(2)}))
    assert str(raised.value) == (
        "accuracy compares tensors, and the targets are dict with keys 'classes'. Take the part that is meant: "
        "Metrics(Metric(lambda outputs, targets: accuracy(outputs, targets['classes']), name='accuracy'))."
    )
