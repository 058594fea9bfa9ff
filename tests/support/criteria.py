"""Stopping criteria fed with values by hand."""

from __future__ import annotations

from collections.abc import Sequence

from flowtrain.callbacks.stopping.criterion import Criterion, Mode


def stops_at(criterion: Criterion, values: Sequence[float], mode: Mode = "min") -> int | None:
    """The number of the first value, from 1, at which a criterion stops."""
    criterion.begin(mode)
    answers = (criterion.update(value) for value in values)
    return next((number for number, why in enumerate(answers, start=1) if why is not None), None)
