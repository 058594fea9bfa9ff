"""Planned updates: the number that a fit announces is the number of updates that it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    AbstractTrainingPhase,
    Callback,
    FitBegin,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.state.by_phase import PhaseMap
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.data import planned_updates


class OtherTraining(TrainingPhase):
    """Train on other data."""


class Announced(Callback):
    """Keep what `FitBegin` says."""

    fit: FitBegin | None = None

    @on(FitBegin)
    def keep(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        self.fit = event


class Streamed(torch.utils.data.IterableDataset[Any]):
    """Pairs, as many as there are."""

    def __iter__(self) -> Any:
        return iter([(torch.ones(1), torch.ones(1))] * 6)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 5), st.integers(0, 4)),
    accumulate=st.integers(1, 4),
    epochs=st.integers(1, 3),
    by_steps=st.none() | st.tuples(st.integers(1, 9), st.none() | st.integers(1, 4)),
)
def test_what_is_announced_is_what_happens(
    lengths: tuple[int, int], accumulate: int, epochs: int, by_steps: tuple[int, int | None] | None
) -> None:
    announced = Announced()
    data: dict[Any, Any] = {TrainingPhase: tiny_batches(n_batches=lengths[0], batch_size=1)}
    if lengths[1] and by_steps is None:
        data[OtherTraining] = tiny_batches(n_batches=lengths[1], batch_size=1)
    data[ValidationPhase] = tiny_batches(n_batches=2, batch_size=1)
    learner = tiny_learner(announced, data=data, core=TorchCore(device="cpu", accumulate=accumulate))
    if by_steps is None:
        learner.fit(epochs)
    else:
        learner.fit(steps=by_steps[0], validate_every=by_steps[1])
    assert announced.fit is not None
    history = learner.cbstate.history
    made = sum(history[phase].updates for phase in history if isinstance(phase, AbstractTrainingPhase))
    assert announced.fit.updates == made


@pytest.mark.parametrize(
    ("accumulate", "how", "expected"),
    [
        (1, {"epochs": 2}, None),
        (1, {"steps": 7}, 7),
        (2, {"steps": 7}, None),
        (2, {"steps": 7, "validate_every": 3}, 5),
    ],
    ids=str,
)
def test_a_loader_that_does_not_know_its_length(accumulate: int, how: dict[str, int], expected: int | None) -> None:
    data: PhaseMap[Any] = PhaseMap("data")
    data[TrainingPhase] = torch.utils.data.DataLoader(Streamed())
    asked: dict[str, Any] = {"epochs": None, "steps": None, "validate_every": None, **how}
    assert planned_updates(data, accumulate, **asked) == expected
