"""A metric: its name, its values, and how the result of a torchmetrics object becomes values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import UsageError, ValidationPhase
from flowtrain.metrics import accuracy, top_k_accuracy
from flowtrain.metrics.metric import Metric, check_weight, values_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torchmetrics warns about what it finds installed
    import torchmetrics
    from torchmetrics import classification as tm


def mean_error(outputs: Any, targets: Any) -> Any:
    return (outputs - targets).mean()


unnamed: Callable[[Any, Any], Any] = lambda outputs, targets: 0  # noqa: E731  # its name is what is tested


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (accuracy, "Accuracy"),
        (mean_error, "MeanError"),
        (partial(mean_error), "MeanError"),
        (top_k_accuracy(3), "Top3Accuracy"),
    ],
)
def test_names(f: Any, name: str) -> None:
    assert (Metric(f).name, Metric(f).names, repr(Metric(f))) == (name, [name], f"Metric({name})")
    assert Metric(f, name="Other", phase=ValidationPhase).names == ["Other"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("accuracy",), r"Write Metrics\(accuracy\), the function itself; flowtrain\.metrics has some"),
        ((None,), r"^None is no metric: a metric is a function of \(outputs, targets\)\. Write Metrics\(accuracy\)"),
        (({"A": mean_error},), r"is no metric: .* Write Metrics\(Metric\(f, name='A'\), Metric\(g, name='B'\)\)"),
        ((dict,), r"<class 'dict'> is no metric: .* Write dict\(\), an instance"),
        ((unnamed,), r"needs a name without dots\. Write Metric\(f, name='MyMetric'\)"),
        ((mean_error, "a.b"), r"needs a name without dots"),
        ((mean_error, None, 3), r"Metric\(phase=3\) is no phase type\. Write Metric\(f, phase=ValidationPhase\)"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Metric(*arguments)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2), r"^The metric MeanError returned a tensor of shape \(2,\); a metric is one number\. Reduce"),
        (torch.ones(2, 2), r"of shape \(2, 2\); a metric is one number\. Reduce it, .* or return a mapping from names"),
        (np.ones((2, 3)), r"of shape \(2, 3\); a metric is one number"),
        ("much", r"The metric MeanError returned 'much'; a metric is one number"),
        ([1.0, 2.0], r"returned \[1\.0, 2\.0\]; .* For the numbers of classes give their names: Metric\(f, labels=\["),
        ({"A": {"B": "much"}}, r"The metric MeanError\.A\.B returned 'much'"),
        (
            torch.tensor(1j),
            r"^The metric MeanError returned a Tensor of shape \(\), complex64; .* its \.abs\(\)",
        ),
        (
            {"A": torch.tensor(1j)},
            r"The metric MeanError\.A returned a Tensor of shape \(\), complex64; a metric",
        ),
        (10**400, r"The metric MeanError returned 10{150}.*; a metric is one number"),
    ],
)
def test_a_value_is_one_number_or_several_with_names(value: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        values_of(Metric(mean_error), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, {"M": 2}),
        (np.float32(0.5), {"M": 0.5}),
        (np.array([[0.5]]), {"M": 0.5}),
        (True, {"M": True}),
        (2**63, {"M": 2**63}),
        (torch.tensor(1.5, dtype=torch.bfloat16), {"M": 1.5}),
        (torch.ones(1, 1), {"M": 1.0}),
        ({"low": 1.0, "high": torch.tensor(2.0)}, {"M.low": 1.0, "M.high": 2.0}),
        ({"a": {"b": 1}, 3: 4}, {"M.a.b": 1, "M.3": 4}),
        ({}, {}),
    ],
)
def test_values(value: Any, expected: dict[str, Any]) -> None:
    assert values_of(Metric(mean_error, name="M"), value) == expected


@pytest.mark.parametrize("value", [torch.tensor([1.0, 2.0]), [1.0, 2.0], np.array([1.0, 2.0]), {"a": [1.0, 2.0]}])
def test_labels_name_the_numbers_of_classes(value: Any) -> None:
    metric = Metric(mean_error, name="M", labels=["cat", "dog"])
    prefix = "M.a" if isinstance(value, dict) else "M"
    assert values_of(metric, value) == {f"{prefix}.cat": 1.0, f"{prefix}.dog": 2.0}
    with pytest.raises(UsageError, match=r"^The metric M has 3 values, and 2 labels: cat, dog\. Give one"):
        values_of(metric, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight": 3}, r"^Metric\(MeanError, weight=3\): weight is a function of \(outputs, targets\) that returns"),
        ({"on_step": False}, r"^Metric\(MeanError, on_step=False\): a function has a value for each batch"),
        ({"labels": ["a", 3]}, r"^Metric\(MeanError, labels=\['a', 3\]\): labels are the names of the classes"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Metric(mean_error, **options)


@pytest.mark.parametrize("weight", [None, -1, math.nan, math.inf, "3", torch.ones(2), torch.tensor(-1.0)])
def test_a_weight_is_a_number(weight: Any) -> None:
    with pytest.raises(UsageError, match=r"^It returned .*; what a batch counts in the mean of an epoch is a number"):
        check_weight(weight, "It")


class Curve(torchmetrics.Metric):
    """A torchmetrics object whose annotation says that it returns several values."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.seen: torch.Tensor = self.seen + 1

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.seen, self.seen


@pytest.mark.parametrize(
    ("f", "text"),
    [
        (tm.MulticlassConfusionMatrix(3), r"^The metric MulticlassConfusionMatrix has a value of shape \(3, 3\);"),
        (tm.MultilabelConfusionMatrix(4), r"has a value of shape \(4, 2, 2\)"),
        (
            torchmetrics.MetricCollection([tm.MulticlassAccuracy(3), tm.MulticlassConfusionMatrix(3)]),
            r"^The metric MulticlassConfusionMatrix has a value of shape \(3, 3\); a metric is one number, or one",
        ),
        (tm.MulticlassROC(3), r"^The metric MulticlassROC is a tuple, such as a curve; a metric is one number"),
        (tm.BinaryPrecisionRecallCurve(), "subclass: class Mine.BinaryPrecisionRecallCurve. with a compute"),
        (torchmetrics.MetricCollection({"a": tm.MulticlassROC(3)}), "^The metric a is a tuple, such as a curve"),
        (Curve(), "^The metric Curve is a tuple.* To log it whole use LogVisualization"),
        (tm.MulticlassAccuracy(3000, average=None), r"has 3000 values, each of which would be a series"),
    ],
)
def test_what_is_no_number_is_refused_when_it_can_be_known(f: Any, text: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=text):
        Metric(f)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_derives_from_a_matrix_and_is_none() -> None:
    """The Jaccard index returns one value, although its class derives from the confusion matrix."""
    assert Metric(tm.MulticlassJaccardIndex(3)).names == ["MulticlassJaccardIndex"]
    assert Metric(tm.MulticlassAccuracy(3000, average=None), labels=[str(i) for i in range(3000)])
