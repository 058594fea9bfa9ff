"""Stopping criteria: when training should end, judged from one value an epoch.

`criterion` has the base class and how several criteria make one, `prechelt` those of Prechelt's paper, and `criteria`
all of them, with a table. `flowtrain.callbacks.EarlyStopping` asks them.
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
