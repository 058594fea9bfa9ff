"""The entries of ``cbstate`` that the learner makes: series by name and by phase, and the counters of training.

======================  =======================================  =====================================
entry                   what it is                               who writes it
======================  =======================================  =====================================
``history``             `PhaseMap` of `Counts`                   `Recorder`
``metrics_step``        `PhaseMap` of `SeriesMap`                `Metrics`, for each batch
``metrics_epoch``       `PhaseMap` of `SeriesMap`                `Metrics`, for each epoch
``tracehistory``        `PhaseMap` of `SeriesMap`                `Traces`
``smooth_loss``         `PhaseMap` of `Series`                   `SmoothLoss`
``hyperparams``         `SeriesMap`                              `Scheduler`
======================  =======================================  =====================================

The learner makes these containers (`CONTAINERS`) when somebody declares to write into them. They are never replaced,
only filled. A series only grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flowtrain.phasemap import CountsMap, PhaseMap
from flowtrain.series import Series, SeriesMap

__all__ = ["CONTAINERS", "holds_series"]


def holds_series(value: object) -> bool:
    """Tell whether a container holds series by name, directly or for each phase."""
    if isinstance(value, PhaseMap):
        made = value.make() if value.make is not None else next(iter(value.values()), None)
        return isinstance(made, SeriesMap)
    return isinstance(value, SeriesMap)


def _by_phase(path: str, late: bool = False) -> PhaseMap[SeriesMap]:
    return PhaseMap(path, lambda: SeriesMap(path, late))


def _smooth_loss(path: str, late: bool = False) -> PhaseMap[Series]:
    return PhaseMap(path, lambda: Series(path, late))


def _history(path: str, late: bool = False) -> CountsMap:
    return CountsMap(path)


CONTAINERS: Mapping[str, Callable[..., Any]] = {
    "history": _history,
    "hyperparams": SeriesMap,
    "metrics_epoch": _by_phase,
    "metrics_step": _by_phase,
    "smooth_loss": _smooth_loss,
    "tracehistory": _by_phase,
}
"""The entries of ``cbstate`` that the learner makes, each with what makes it from its path, and whether tensors on the
CPU are to be treated as those of a device (`flowtrain.lag`)."""
