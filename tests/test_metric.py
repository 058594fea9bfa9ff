"""A metric: its name, its values, and what a torchmetrics object has come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flowtrain import UsageError, ValidationPhase
from flowtrain.metric import Metric, held, hold, values_of
from flowtrain.metrics import accuracy, top_k_accuracy


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
        (torch.ones(2), r"The metric MeanError returned a tensor of shape \(2,\); a metric is one number"),
        ("much", r"The metric MeanError returned 'much'; a metric is one number"),
        ({"A": 1.0}, r"The metric MeanError returned values named A; a metric is one number"),
    ],
)
def test_a_value_is_one_number(value: Any, text: str) -> None:
    assert values_of(Metric(mean_error), 2) == {"MeanError": 2}
    with pytest.raises(UsageError, match=text):
        values_of(Metric(mean_error), value)


def test_a_torchmetrics_object_goes_on_where_another_was() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    first, second = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()
    first.persistent(mode=True)
    second.persistent(mode=True)
    first.update(1.0)
    first.update(2.0)
    hold(second, *held(first))
    second.update(6.0)
    assert second.compute() == 3.0
    assert second.update_count == 3
    assert held(object()) == ({}, [])
