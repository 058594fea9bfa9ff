"""A metric whose values a test gives."""

from __future__ import annotations

from flowtrain import Phase, ValidationPhase
from flowtrain.callbacks import Metric, Metrics


def scored(*scores: float, phase: type[Phase] = ValidationPhase) -> Metrics:
    """Return metrics with one metric, "Score", that has these values, one for each batch of a phase."""
    left = iter(scores)
    return Metrics(Metric(lambda outputs, targets: next(left), name="Score", phase=phase))
