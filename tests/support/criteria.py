"""Feeds values to stopping criteria by hand."""

from __future__ import annotations

from collections.abc import Sequence

from flowtrain.callbacks.monitoring import Mode
from flowtrain.callbacks.stopping.criterion import Criterion


def stops_at(criterion: Criterion, values: Sequence[float], mode: Mode = "min") -> int | None:
    """Return the number, from 1, of the first value at which a criterion stops."""
    criterion.begin(mode)
    answers = (criterion.update(value) for value in values)
    return next((number for number, why in enumerate(answers, start=1) if why is not None), None)
