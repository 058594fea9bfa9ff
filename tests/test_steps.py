"""What the bundled steps are made of: runners, and what they say of data that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    LossError,
    Phase,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.steps import StepRunners, describe
from flowtrain.testing import tiny_learner

TYPES = [Phase, AbstractTrainingPhase, TrainingPhase, AbstractValidationPhase, ValidationPhase]
SUPERVISED: list[type[AbstractTrainingPhase | AbstractValidationPhase]] = [
    AbstractTrainingPhase,
    AbstractValidationPhase,
]


def test_there_is_a_runner_for_each_event_of_a_step() -> None:
    assert set(StepRunners.events) == set(StepRunners.__slots__)
    assert set(StepRunners.events.values()) <= set(AbstractTrainingPhase.events or ())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(2, dtype=torch.int64), "Tensor of shape (2,), int64"),
        (torch.nn.Parameter(torch.zeros(())), "Parameter of shape (), float32"),
        ((), "tuple of 0"),
        ([torch.zeros(1), [1]], "list of 2: Tensor of shape (1,), float32, list of 1: int 1"),
        ([1, 2, 3, 4], "list of 4: int 1, int 2, int 3, ..."),
        ({}, "dict with keys "),
        (dict.fromkeys(range(9), 0), "dict with keys 0, 1, 2, 3, 4, 5"),
        ("x" * 100, f"str '{'x' * 59}"),
    ],
)
def test_describe(value: Any, said: str) -> None:
    assert describe(value) == said


# --- the step


def quiet(lossfn: Any, **more: Any) -> Any:
    return tiny_learner(lossfn=lossfn, default_callbacks=False, **more)


def half(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return mse_loss(outputs, targets, reduction="none")


@pytest.mark.parametrize("kind", [TrainingPhase, ValidationPhase])
def test_a_loss_that_is_no_single_number(kind: type[Phase]) -> None:
    with pytest.raises(LossError) as caught:
        quiet(half).step(kind, (torch.ones(2, 1), torch.ones(2, 1)))
    assert str(caught.value) == (
        f"The loss function half returned Tensor of shape (2, 1), float32, which is no single number\n"
        f"In {kind.__name__} it was called with batch.outputs: Tensor of shape (2, 1), float32 and batch.targets: "
        f"Tensor of shape (2, 1), float32. The model and the loss must fit: change the model's last layer, the targets "
        f"that the dataset returns, or wrap the loss in a function of (outputs, targets) that returns a tensor with one "
        f"element."
    )


def test_a_loss_that_does_not_fit_the_model() -> None:
    with pytest.raises(LossError, match=r"The loss function cross_entropy raised RuntimeError: ") as caught:
        quiet(cross_entropy).step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int32)))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "batch.targets: Tensor of shape (2, 1), int32" in str(caught.value)


def test_a_model_that_fails_keeps_its_error() -> None:
    learner = quiet(mse_loss, model=torch.nn.Linear(3, 1))
    with pytest.raises(RuntimeError, match="shapes") as caught:
        learner.step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1)))
    assert caught.value.__notes__[0] == (
        "raised by the model in TrainingPhase, called with batch.inputs: Tensor of shape (2, 1), float32"
    )

