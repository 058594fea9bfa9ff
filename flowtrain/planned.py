"""Planned updates: how many updates a fit will come to, worked out before it begins.

A schedule that is stretched over training needs this number. It is one update for each accumulation group of batches;
the last group of an epoch may be shorter.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from flowtrain.data import length
from flowtrain.phasemap import PhaseMap
from flowtrain.phases import AbstractTrainingPhase

__all__ = ["planned_updates"]


def planned_updates(
    data: PhaseMap[Any], accumulate: int, epochs: int | None, steps: int | None, validate_every: int | None
) -> int | None:
    """Return how many updates a fit comes to if nothing is cancelled; ``None`` where a loader's length is not known.

    Args:
        data: The loaders by phase.
        accumulate: Batches in an accumulation group.
        epochs: As for `Learner.fit`.
        steps: As for `Learner.fit`.
        validate_every: As for `Learner.fit`.

    >>> from flowtrain.phases import TrainingPhase
    >>> loaders = PhaseMap("data")
    >>> loaders[TrainingPhase] = range(10)
    >>> planned_updates(loaders, 4, epochs=2, steps=None, validate_every=None)
    6
    """
    lengths = [length(loader) for phase, loader in data.items() if isinstance(phase, AbstractTrainingPhase)]
    if epochs is not None:
        known = [each for each in lengths if each is not None]
        return epochs * sum(ceil(each / accumulate) for each in known) if len(known) == len(lengths) else None
    if steps is None or accumulate == 1:
        return steps
    batches = validate_every or lengths[0]
    if not batches:
        return None
    return steps // batches * ceil(batches / accumulate) + ceil(steps % batches / accumulate)
