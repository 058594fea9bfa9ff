"""Phases as users define them."""

from __future__ import annotations

from typing import Any

from flowtrain import Phase, TrainingPhase, ValidationPhase


class OtherTraining(TrainingPhase):
    """Train on other data."""


class OtherValidation(ValidationPhase):
    """Validate on other data."""


class Silent(Phase):
    """Has a step of its own, and says neither which events it fires nor which entries it provides."""

    def step(self, learner: Any, raw: Any) -> None: ...
