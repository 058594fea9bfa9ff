"""Hyperparameters: how each reads and writes a parameter group, and when two of them are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowtrain.state.hyperparameters import HyperParameter, LearningRate, Momentum, Setting, WeightDecay


@pytest.mark.parametrize(
    ("setting", "group", "before", "after"),
    [
        (LearningRate(), {"lr": 0.1}, 0.1, {"lr": 0.5}),
        (WeightDecay(), {"weight_decay": 0.0, "lr": 0.1}, 0.0, {"weight_decay": 0.5, "lr": 0.1}),
        (Momentum(), {"momentum": 0.9}, 0.9, {"momentum": 0.5}),
        (Momentum(), {"betas": (0.9, 0.999)}, 0.9, {"betas": (0.5, 0.999)}),
    ],
    ids=repr,
)
def test_reads_and_writes_a_group(
    setting: HyperParameter, group: dict[str, Any], before: float, after: dict[str, Any]
) -> None:
    assert setting.read(group) == before
    setting.write(group, 0.5)
    assert group == after


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    """Compiled and captured optimizers keep a reference to the tensor, so its value changes in place."""
    rate = torch.tensor(0.25)
    group = {"lr": rate}
    assert LearningRate().read(group) == 0.25
    LearningRate().write(group, 0.5)
    assert group["lr"] is rate
    assert rate.item() == 0.5


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (LearningRate(), LearningRate(group=1), True),
        (LearningRate(group=0), LearningRate(group=1), False),
        (LearningRate("gen"), LearningRate("disc"), False),
        (LearningRate("gen"), LearningRate("gen", 0), True),
        (LearningRate(), Momentum(), False),
        (LearningRate(), Setting(), False),
        (Setting(), Setting(), True),
    ],
    ids=repr,
)
def test_which_set_the_same(one: Setting, other: Setting, overlap: bool) -> None:
    assert one.overlaps(other) is overlap
    assert other.overlaps(one) is overlap


def test_names_and_equality() -> None:
    assert [each.name for each in (LearningRate(), LearningRate("gen"), LearningRate("gen", 2), Momentum(group=0))] == [
        "LearningRate", "LearningRate.gen", "LearningRate.gen.2", "Momentum.0",
    ]  # fmt: skip
    assert LearningRate("gen") == LearningRate("gen")
    assert len({LearningRate(), WeightDecay(), LearningRate()}) == 2
    assert repr(LearningRate("gen", 2)) == "LearningRate('gen', group=2)"
    assert LearningRate("gen").access().keys() == {"optimizer.gen.hyperparams"}


def test_a_setting_says_what_it_does_not_define() -> None:
    with pytest.raises(NotImplementedError, match=r"Setting does not define access\(\)\. Define it: it returns the"):
        Setting().access()
