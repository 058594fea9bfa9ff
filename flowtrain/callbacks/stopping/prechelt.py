"""The criteria of Prechelt compare a value with the best value, the progress of training, or the values before it.

Source: L. Prechelt, "Early Stopping - But When?", in Neural Networks: Tricks of the Trade, 1998
(https://doi.org/10.1007/3-540-49430-8_3). In the paper ``E`` is the error on the validation set, here it is any value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flowtrain.callbacks.stopping.criterion import Criterion, check_positive
from flowtrain.errors.arguments import whole_number

__all__ = ["GL", "PQ", "UP"]


class GL(Criterion):
    """Stop when the generalization loss, by how many percent the value is worse than the best one, exceeds `alpha`.

    ``GL(t) = 100 * (E(t) - E_opt) / |E_opt|``, with ``E(t)`` the value of epoch t and ``E_opt`` the best one up to t.
    The criterion stops when ``GL(t) > alpha``. The generalization loss of NaN is infinite, and with a best value of 0
    that of every worse value. Values before the first number are not compared; if the value is NaN from the first epoch
    on, `Patience` or `InvalidValue` stops.

    Source: Prechelt, ``GL_alpha``, for errors, which are positive; with the absolute value as in EarlyStopping.jl.

    Args:
        alpha: The threshold, in percent.

    Raises:
        UsageError: `alpha` is not positive.

    >>> criterion = GL(alpha=10)
    >>> criterion.update(2.0), criterion.update(2.25)
    (None, 'GL(10): the value 2.25 is 12.5 percent worse than the best, 2')
    """

    initial: ClassVar[Mapping[str, Any]] = {"best": None}
    best: float | None

    def __init__(self, alpha: float = 2.0) -> None:
        self.alpha = check_positive("GL", "alpha", alpha, "2.0")
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Compare the value with the best one."""
        self.best = best = _least(loss, self.best)
        gl = _generalization_loss(loss, best)
        if best is None or not gl > self.alpha:
            return None
        return f"the value {self.shown(loss)} is {gl:.6g} percent worse than the best, {self.shown(best)}"

    def __repr__(self) -> str:
        return f"GL({self.alpha:g})"


class PQ(Criterion):
    """Stop when the generalization loss is large compared with the progress of training, or training makes none.

    ``PQ(t) = GL(t) / P(t)`` with ``P(t) = 1000 * (mean - min) / |min|``, where mean and minimum are those of the last
    `k` values of the training phase, and ``GL`` is as in `GL`. The criterion stops when ``PQ(t) > alpha``, or when
    ``P(t) <= tol``, but not before the training phase has `k` values. If some of these are NaN it does not judge; if
    all are NaN the progress is 0.

    Source: Prechelt, ``PQ_alpha``; `tol`, and judging after each epoch instead of each strip, are from
    EarlyStopping.jl.

    Args:
        alpha: The threshold, in percent of `GL` for each per mille of progress.
        k: The number of values of the training phase that the progress is computed from, at least 2.
        tol: The progress, in per mille, up to which training makes none.

    Raises:
        UsageError: An argument is out of its range.
    """

    initial: ClassVar[Mapping[str, Any]] = {"best": None, "training": []}
    needs_training = True
    best: float | None
    training: list[float]

    def __init__(self, alpha: float = 0.75, k: int = 5, tol: float = 2.0**-52) -> None:
        self.alpha = check_positive("PQ", "alpha", alpha, "0.75")
        self.k = whole_number("PQ(): k", k, least=2)
        self.tol = check_positive("PQ", "tol", tol, "2e-16")
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Compare the generalization loss with the progress of training."""
        self.best = best = _least(loss, self.best)
        self.training = [*self.training, *training][-self.k :]
        if len(self.training) < self.k:
            return None
        # NaN has no mean. Without any number there is no progress; with some, the progress is not known.
        numbers = [each for each in self.training if not math.isnan(each)]
        least = min(numbers, default=math.nan)
        # The sum rounds once, so k equal values give exactly their mean, and a progress of 0. The 10 makes per mille.
        progress = 10 * _generalization_loss(_sum(numbers) / self.k, least) if numbers else 0.0
        if len(numbers) not in (0, self.k):
            return None
        if progress <= self.tol:
            return f"training makes no progress: its last {self.k} values are {self.shown(least)}"
        gl = _generalization_loss(loss, best)
        if best is None or not gl / progress > self.alpha:
            return None
        return (
            f"the value {self.shown(loss)} is {gl:.6g} percent worse than the best, {self.shown(best)}, and training "
            f"makes {progress:.6g} per mille of progress in {self.k} values, so PQ is {gl / progress:.6g}"
        )

    def __repr__(self) -> str:
        return f"PQ({self.alpha:g}, k={self.k})"


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # a sum beyond the range of floats, or infinities of both signs
        return sum(numbers)


class UP(Criterion):
    """Stop when the value has become worse `s` times in a row, however little.

    The criterion stops when ``E(t) > E(t-1) > ... > E(t-s)``. NaN counts as worse than any value before it, even NaN,
    and a number after NaN counts as better.

    Source: Prechelt, ``UP_s``, with one epoch instead of a strip of k; EarlyStopping.jl calls it ``Patience``.

    Args:
        s: The number of times in a row.

    Raises:
        UsageError: `s` is no whole number, or below 1.

    >>> criterion = UP(2)
    >>> [criterion.update(value) for value in (3.0, 4.0, 5.0)]
    [None, None, 'UP(2): the value became worse 2 times in a row, from 3 to 5']
    """

    initial: ClassVar[Mapping[str, Any]] = {"before": None, "since": None, "count": 0}
    before: float | None
    since: float | None
    count: int

    def __init__(self, s: int = 5) -> None:
        self.s = whole_number("UP(): s", s)
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Count how often in a row the value has become worse."""
        before, self.before = self.before, loss
        # A comparison with NaN is false, so a number after NaN is not worse.
        if not math.isnan(loss) and (before is None or not loss > before):
            self.count, self.since = 0, loss
            return None
        self.count += 1
        if self.count < self.s:
            return None
        start = loss if self.since is None else self.since
        times = f"{self.count} time{'s' if self.count > 1 else ''}"
        return f"the value became worse {times} in a row, from {self.shown(start)} to {self.shown(loss)}"

    def __repr__(self) -> str:
        return f"UP({self.s})"


def _generalization_loss(loss: float, best: float | None) -> float:
    """Return by how many percent a loss is above the best one: infinity for NaN, and NaN without a best one."""
    if best is None:
        return math.nan
    if math.isnan(loss):
        return math.inf
    if best == 0:
        return math.inf if loss > 0 else 0.0
    return 100 * (loss - best) / abs(best)


def _least(loss: float, best: float | None) -> float | None:
    """Return the smaller number of the two; ``None`` if both are missing or NaN."""
    numbers = [each for each in (best, loss) if each is not None and not math.isnan(each)]
    return min(numbers, default=None)
