"""Reduce on plateau: a value that is lowered when a metric has stopped improving.

The value is no function of the number of the update. It is a function of the earlier metrics, which are summed up in a
`Plateau`: `ReduceOnPlateau.after` computes the next `Plateau` from the last one and the metric of an epoch.
`flowtrain.callbacks.Scheduler` keeps the `Plateau`, and saves it in checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from flowtrain.callback.phases import Phase, ValidationPhase
from flowtrain.callbacks.monitoring import Mode, check_monitor, direction
from flowtrain.callbacks.schedules.schedule import check_number
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import whole_number

__all__ = ["Plateau", "ReduceOnPlateau", "reduce_on_plateau"]


class Plateau(NamedTuple):
    """The state of a `ReduceOnPlateau` after some epochs.

    Attributes:
        value: The present value.
        best: The best metric so far; ``None`` before the first epoch.
        bad: The number of epochs since the best one, or since the value was lowered.
        cooldown: The number of coming epochs that do not count as bad.
    """

    value: float
    best: float | None = None
    bad: int = 0
    cooldown: int = 0


@dataclass(frozen=True)
class ReduceOnPlateau:
    """A schedule that depends on a metric. `reduce_on_plateau` makes one, and its arguments are the attributes."""

    value: float
    monitor: str
    phase: type[Phase]
    mode: Mode | None
    factor: float
    patience: int
    threshold: float
    relative: bool
    cooldown: int
    minimum: float

    def begin(self) -> Plateau:
        """Return the state before the first epoch."""
        return Plateau(self.value)

    def after(self, plateau: Plateau, metric: float) -> Plateau:
        """Return the state after one more epoch.

        Args:
            plateau: The state before the epoch.
            metric: The metric of the epoch.

        Raises:
            UsageError: Neither `mode` nor the metric says whether small or large values are good.
        """
        value, best, bad, cooldown = plateau
        # `Scheduler` has asked the callbacks for the mode already; without a learner only that of "Loss" is known.
        mode = direction(f"reduce_on_plateau({self.value}", self.monitor, self.mode, ())
        # The best value is not infinite from the beginning, since only the mode says which infinity every metric is
        # better than.
        best = best if best is not None else math.inf if mode == "min" else -math.inf
        best, bad = (metric, 0) if self._is_better(metric, best, mode) else (best, bad + 1)
        # The epochs of the cooldown come after the comparison: a better metric in them still becomes the best one, as
        # in torch.
        if cooldown > 0:
            bad, cooldown = 0, cooldown - 1
        if bad > self.patience:
            lowered = max(value * self.factor, self.minimum)
            value = lowered if value - lowered > 1e-8 else value  # torch leaves out smaller steps as well
            bad, cooldown = 0, self.cooldown
        return Plateau(value, best, bad, cooldown)

    def _is_better(self, metric: float, best: float, mode: Mode) -> bool:
        share, amount = (self.threshold, 0.0) if self.relative else (0.0, self.threshold)
        if mode == "min":
            return metric < best * (1 - share) - amount
        return metric > best * (1 + share) + amount

    def __repr__(self) -> str:
        return f"reduce_on_plateau({self.value}, monitor={self.monitor!r})"


def reduce_on_plateau(
    value: float,
    *,
    monitor: str = "Loss",
    phase: type[Phase] = ValidationPhase,
    mode: Mode | None = None,
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    relative: bool = True,
    cooldown: int = 0,
    minimum: float = 0.0,
) -> ReduceOnPlateau:
    """Return a schedule that is multiplied with `factor` if a metric has not improved for more than `patience` epochs.

    A metric m is better than the best one b if ``m < b * (1 - threshold)``, or without `relative` if
    ``m < b - threshold``; with ``mode="max"`` if ``m > b * (1 + threshold)`` or ``m > b + threshold``. The same as
    torch's ``ReduceLROnPlateau``. It reads ``cbstate.metrics_epoch``, so it needs `Metrics`. Only the first evaluation
    after an update counts as an epoch: a second one, as by ``learner.validate()``, has the same parameters. An
    evaluation without a complete batch does not count either.

    Args:
        value: The first value.
        monitor: The name of the metric.
        phase: The phase that the metric is of. If ``data`` has no phase of exactly this type, the only phase of a
            subclass is watched.
        mode: ``"min"`` if small values of the metric are good, ``"max"`` if large values are. Needed only for metrics
            that do not say it themselves; the loss, the metrics of `flowtrain.metrics`, torchmetrics objects and
            ``Metric(f, mode=...)`` do.
        factor: The factor that lowers the value, below 1.
        patience: The number of epochs without a better metric after which the value is not lowered yet.
        threshold: The amount by which a metric must be better, at least 0.
        relative: Whether the threshold is a share of the best metric.
        cooldown: The number of epochs after the value was lowered that do not count as bad.
        minimum: The least value.

    Raises:
        UsageError: An argument is out of its range.

    >>> schedule = reduce_on_plateau(1.0, patience=1, factor=0.5)
    >>> plateau = schedule.begin()
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     plateau = schedule.after(plateau, loss)
    >>> plateau
    Plateau(value=0.5, best=2.0, bad=0, cooldown=0)
    """
    for name, number in (("value", value), ("threshold", threshold), ("factor", factor), ("minimum", minimum)):
        check_number("reduce_on_plateau", name, number)
    if not 0 < factor < 1:
        raise UsageError(f"reduce_on_plateau(factor={factor}): factor is above 0 and below 1, such as 0.1.")
    patience = whole_number("reduce_on_plateau(): patience", patience, least=0)
    cooldown = whole_number("reduce_on_plateau(): cooldown", cooldown, least=0)
    if threshold < 0:  # every epoch would be better than the one before
        raise UsageError(f"reduce_on_plateau(threshold={threshold!r}): threshold is at least 0, such as 1e-4.")
    check_monitor("reduce_on_plateau", monitor, phase, mode)
    return ReduceOnPlateau(value, monitor, phase, mode, factor, patience, threshold, relative, cooldown, minimum)
