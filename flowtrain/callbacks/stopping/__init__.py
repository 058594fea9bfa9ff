"""Stopping criteria: whether training should end, judged from one value of each epoch.

`criterion` has the base class and the criteria that combine others, `prechelt` the criteria of Prechelt's paper, and
`criteria` the other ones, with a table of all. `flowtrain.callbacks.EarlyStopping` gives them the values.
"""

from __future__ import annotations

from flowtrain.callbacks.stopping.criteria import (
    InvalidValue,
    NumberLimit,
    NumberSinceBest,
    Patience,
    Threshold,
    TimeLimit,
)
from flowtrain.callbacks.stopping.criterion import Criterion, Disjunction, Never, Warmup
from flowtrain.callbacks.stopping.prechelt import GL, PQ, UP

__all__ = [
    "GL",
    "PQ",
    "UP",
    "Criterion",
    "Disjunction",
    "InvalidValue",
    "Never",
    "NumberLimit",
    "NumberSinceBest",
    "Patience",
    "Threshold",
    "TimeLimit",
    "Warmup",
]
