"""Schedules: what value a hyperparameter has at each update.

`schedule` says what a schedule is; `curves` has those that depend on the number of the update alone, `combining` joins
several, and `plateau` has the one that is fed by a metric. `flowtrain.callbacks.Scheduler` sets what they give.
"""

from __future__ import annotations

from flowtrain.callbacks.schedules.combining import per_epoch, sequence, warmup
from flowtrain.callbacks.schedules.curves import constant, cosine, exponential, from_torch, one_cycle, polynomial, step
from flowtrain.callbacks.schedules.plateau import reduce_on_plateau
from flowtrain.callbacks.schedules.schedule import Schedule

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "from_torch",
    "one_cycle",
    "per_epoch",
    "polynomial",
    "reduce_on_plateau",
    "sequence",
    "step",
    "warmup",
]
