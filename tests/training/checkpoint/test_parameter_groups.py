"""The parameter groups of optimizers are restored by the names of their parameters, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    CheckpointError,
)
from flowtrain.callbacks import Checkpointer
from flowtrain.testing.values import learner_leaves
from tests.support.changed import Do, add_group, head_alone, learner_of, put_head


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: torch.optim.SGD([{"params": [each]} for each in params]), r"it had groups of \[6\] parameters"),
        (
            lambda params: torch.optim.SGD(list(params)[::-1]),
            r"it had model\.back\.0\.weight where the learner's has model\.head\.bias\. Build the learner with that ",
        ),
    ],
)
def test_groups_of_another_build_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    learner_of(Checkpointer(tmp_path), optimizer=torch.optim.SGD).fit(1)
    learner = learner_of(optimizer=make)
    before = list(learner_leaves(learner))
    with pytest.raises(CheckpointError, match=message):
        learner.load(tmp_path)
    assert [path for path, _ in learner_leaves(learner)] == [path for path, _ in before]


def test_groups_that_training_made_may_be_built(tmp_path: Path) -> None:
    learner_of(Do(add_group), Checkpointer(tmp_path), optimizer=head_alone).fit(2)

    def both(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.SGD([{"params": params[4:]}, {"params": params[:4]}], lr=1.0)

    learner = learner_of(optimizer=both)
    learner.load(tmp_path)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.05, 0.01]


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (
            lambda learner: put_head(learner),
            r"^optimizer has, in group 0, a parameter of shape \(1, 4\) that no longer belongs to the model or the lo",
        ),
        (
            lambda learner: learner.optimizer.param_groups[0]["params"].pop(),
            r"^optimizer has state of model\.head\.bias, of shape \(1,\), which is in none of its groups\. In the ha",
        ),
    ],
)
def test_what_a_handler_leaves_in_an_optimizer(do: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        learner_of(Do(do), Checkpointer(tmp_path)).fit(2)
