"""What is new in series, and as what it is logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowtrain.logging import Histogram, Value
from flowtrain.logging.values import loggable, newest
from flowtrain.state.series import SeriesMap

STEP, EPOCH = ("Step", "TrainingPhase"), ("Epoch", "TrainingPhase")


def test_only_series_that_have_grown_and_only_their_newest_entry() -> None:
    series, seen = SeriesMap("cbstate.metrics_step"), dict[str, int]()
    series.push("Loss", 0.5, 1)
    series.push("Loss", 0.25, 2)
    series.push("Accuracy", 1.0, 2)
    series.series("Empty")
    assert list(newest(series, STEP, seen)) == [("Loss", 2, 0.25), ("Accuracy", 2, 1.0)]
    assert list(newest(series, STEP, seen)) == []
    series.push("Accuracy", 0.5, 3)
    assert list(newest(series, STEP, seen)) == [("Accuracy", 3, 0.5)]
    assert [name for name, *_ in newest(series, EPOCH, seen)] == ["Loss", "Accuracy"]  # groups are apart
    assert seen == {"Step/TrainingPhase/Loss": 2, "Step/TrainingPhase/Accuracy": 2,
                    "Epoch/TrainingPhase/Loss": 2, "Epoch/TrainingPhase/Accuracy": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "kind"), [(0.5, Value), (torch.tensor(1.0), Value), (torch.ones(1, 1), Value), (torch.ones(2), Histogram)]
)
def test_a_tensor_of_several_elements_is_a_distribution(value: Any, kind: type) -> None:
    assert type(loggable(value)) is kind
