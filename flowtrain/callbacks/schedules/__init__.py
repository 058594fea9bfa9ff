"""Schedules: the value of a hyperparameter at each update.

`schedule` defines what a schedule is; `curves` has the schedules that depend only on the number of the update,
`combining` joins several schedules, and `plateau` has the schedule that depends on a metric.
`flowtrain.callbacks.Scheduler` sets their values.
"""

from __future__ import annotations

from flowtrain.callbacks.schedules.combining import per_epoch, sequence, swa_lr, warmup
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
    "swa_lr",
    "warmup",
]
