"""Phases as users define them."""

from __future__ import annotations

from typing import Any

import torch

from flowtrain import (
    AbstractTrainingPhase,
    Phase,
    StepContext,
    TrainingPhase,
    ValidationPhase,
)


class OtherTraining(TrainingPhase):
    """Train on other data."""


class OtherValidation(ValidationPhase):
    """Validate on other data."""


class Silent(Phase):
    """Has a step of its own, and says neither which events it fires nor which entries it provides."""

    def step(self, learner: Any, raw: Any) -> None: ...


class TwoModels(AbstractTrainingPhase):
    """Trains the models ``one`` and ``two`` by one loss, each with an optimizer of its own."""

    def step(self, learner: StepContext, raw: torch.Tensor) -> None:
        with learner.run_batch(self, inputs=raw) as batch:
            loss = learner.model.one(batch.inputs).mean() + learner.model.two(batch.inputs).mean()
            learner.backward(self, loss)
            learner.update(self, "one")
            learner.update(self, "two")


class OwnPhase(AbstractTrainingPhase):
    """A training step that uses the methods for custom phases."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
            with learner.forward():
                batch.loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
            learner.backward(self, batch.loss)
            learner.update(self)
