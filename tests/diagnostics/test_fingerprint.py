"""Fingerprints: what changed between two moments, by path."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import TrainingPhase
from flowtrain.callback.access import Path
from flowtrain.diagnostics.strict import changes, fingerprint, fingerprints
from flowtrain.state.by_phase import CONTAINERS
from flowtrain.state.learner_state import LearnerState, State
from flowtrain.testing import tiny_learner


@pytest.fixture
def state() -> LearnerState:
    """A learner's state after one batch, with something of every kind in ``cbstate``."""
    learner = tiny_learner(optimizer=torch.optim.Adam)
    learner.step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1)))
    cbstate = learner.state.cbstate
    cbstate.tensor = torch.zeros(3)
    cbstate.numbers = [1, [2, {"deep": torch.ones(1)}]]
    cbstate.array = np.zeros(3)
    cbstate.names = {"a", "b"}
    cbstate.nan = float("nan")
    cbstate.space = State("cbstate.space")
    cbstate.space.inner = 1
    cbstate.hyperparams = CONTAINERS["hyperparams"]("cbstate.hyperparams")
    cbstate.thing = torch.nn.Linear(1, 1)
    return learner.state


def _deep(state: LearnerState) -> None:
    state.cbstate.numbers[1][1]["deep"].add_(1)


CHANGES: list[tuple[Callable[[LearnerState], Any], Path]] = [
    (lambda state: state.model.coeff.data.add_(1), ("model", "coeff")),
    (lambda state: state.model.coeff.detach().numpy().__iadd__(1), ("model", "coeff")),
    (lambda state: state.params["coeff"].grad.mul_(2), ("batch", "grads")),
    (lambda state: state.optimizer.param_groups[0].update(lr=7.0), ("optimizer", "hyperparams")),
    (lambda state: next(iter(state.optimizer.state.values()))["exp_avg"].add_(1), ("optimizer", "state")),
    (lambda state: state.batch.inputs.zero_(), ("batch", "inputs")),
    (lambda state: setattr(state.batch, "more", 1), ("batch", "more")),
    (lambda state: setattr(state.batch, "loss", state.batch.loss.clone()), ("batch", "loss")),
    (lambda state: state.cbstate.tensor.add_(0), ("cbstate", "tensor")),
    (_deep, ("cbstate", "numbers")),
    (lambda state: state.cbstate.array.__setitem__(0, 1), ("cbstate", "array")),
    (lambda state: state.cbstate.names.add("c"), ("cbstate", "names")),
    (lambda state: setattr(state.cbstate.space, "inner", 2), ("cbstate", "space", "inner")),
    (lambda state: state.cbstate.hyperparams.push("LearningRate", 0.1, 1), ("cbstate", "hyperparams", "LearningRate")),
    (lambda state: state.cbstate.metrics_step[TrainingPhase].push("Mine", 1, 1), ("cbstate", "metrics_step", "Mine")),
    (lambda state: state.cbstate.thing.weight.data.zero_(), ("cbstate", "thing")),
    (lambda state: delattr(state.cbstate, "tensor"), ("cbstate", "tensor")),
    (lambda state: torch.rand(1), ("resource", "rng")),
    (lambda state: random.random(), ("resource", "rng")),
    (lambda state: np.random.rand(), ("resource", "rng")),
]


@pytest.mark.parametrize(("change", "path"), CHANGES)
def test_a_change_is_found_at_its_path_and_nowhere_else(
    state: LearnerState, change: Callable[[LearnerState], Any], path: Path
) -> None:
    before = fingerprints(state)
    assert changes(before, fingerprints(state)) == []
    change(state)
    assert changes(before, fingerprints(state)) == [path]


def test_looking_is_no_change(state: LearnerState) -> None:
    before = fingerprints(state)
    _ = state.cbstate.history[TrainingPhase], state.cbstate.metrics_epoch[TrainingPhase]  # makes what is looked up
    _ = state.model(torch.ones(1, 1)), state.batch.inputs.sum(), list(state.cbstate.names), state.params["coeff"].grad
    assert changes(before, fingerprints(state)) == []


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(0),
        torch.tensor(1 + 2j),
        torch.ones(4, 4)[:, ::2],
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        frozenset({1, 2}),
        object(),
    ],
)
def test_every_kind_of_value_has_one(value: object) -> None:
    assert fingerprint(value) == fingerprint(value)


def test_inference_tensors_have_no_version_but_content() -> None:
    with torch.inference_mode():
        value = torch.ones(2)
        before = fingerprint(value)
        value.add_(1)
        assert fingerprint(value) != before
