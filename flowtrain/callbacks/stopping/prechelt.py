"""The criteria of Prechelt: the value against the best one, against the progress of training, against those before it.

Source: L. Prechelt, "Early Stopping - But When?", in Neural Networks: Tricks of the Trade, 1998
(https://doi.org/10.1007/3-540-49430-8_3). There ``E`` is the error on the validation set; here it is any value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from flowtrain.callbacks.stopping.criterion import Criterion, check_positive
from flowtrain.errors import whole_number

__all__ = ["GL", "PQ", "UP"]


class GL(Criterion):
    """Stop when the generalization loss exceeds `alpha`: the value is worse than the best one by so many percent.

    ``GL(t) = 100 * (E(t) - E_opt) / |E_opt|``, with ``E(t)`` the value of epoch t and ``E_opt`` the best up to then.
    It stops when ``GL(t) > alpha``. Next to a best value of 0 everything worse is infinitely so, and NaN is next to any
    best value. As long as there was no number nothing is compared: a patience, or `InvalidValue`, stops on a value that
    is NaN from the first epoch on.

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
        self.alpha = check_positive("GL", "alpha", alpha)
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        self.best = best = _least(loss, self.best)
        gl = _generalization_loss(loss, best)
        if best is None or not gl > self.alpha:
            return None
        return f"the value {self.shown(loss)} is {gl:.6g} percent worse than the best, {self.shown(best)}"

    def __repr__(self) -> str:
        return f"GL({self.alpha:g})"


class PQ(Criterion):
    """Stop when the generalization loss is large against the progress that training still makes, or makes none.

    ``PQ(t) = GL(t) / P(t)`` with ``P(t) = 1000 * (mean - min) / |min|``, mean and minimum taken over the last `k`
    values of training, and ``GL`` as in `GL`. It stops when ``PQ(t) > alpha``, or when ``P(t) <= tol``; never before
    there are `k` values of training. Where some of these are NaN nothing is judged, where all are there is no
    progress.

    Source: Prechelt, ``PQ_alpha``; from EarlyStopping.jl `tol`, and a look after each epoch in place of each strip.

    Args:
        alpha: The threshold, in percent of `GL` for each per mille of progress.
        k: How many values of training the progress is measured over, at least 2.
        tol: Progress up to this is none.

    Raises:
        UsageError: A value is outside of its range.
    """

    initial: ClassVar[Mapping[str, Any]] = {"best": None, "training": []}
    needs_training = True
    best: float | None
    training: list[float]

    def __init__(self, alpha: float = 0.75, k: int = 5, tol: float = 2.0**-52) -> None:
        self.alpha = check_positive("PQ", "alpha", alpha)
        self.k = whole_number("PQ(): k", k, least=2)
        self.tol = check_positive("PQ", "tol", tol)
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        self.best = best = _least(loss, self.best)
        self.training = [*self.training, *training][-self.k :]
        if len(self.training) < self.k:
            return None
        numbers = [each for each in self.training if not math.isnan(each)]
        least = min(numbers, default=math.nan)
        progress = 10 * _generalization_loss(math.fsum(numbers) / self.k, least) if numbers else 0.0
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


class UP(Criterion):
    """Stop when the value has become worse `s` times in a row, however little.

    It stops when ``E(t) > E(t-1) > ... > E(t-s)``. NaN counts as worse than the value before, whatever that is, and a
    number after it as better.

    Source: Prechelt, ``UP_s``, with one epoch in place of a strip of k; EarlyStopping.jl calls it ``Patience``.

    Args:
        s: How many times in a row.

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
        before, self.before = self.before, loss
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
    """Return by how many percent a loss is above the best one: infinitely where it is NaN."""
    if best is None:
        return math.nan
    if math.isnan(loss):
        return math.inf
    if best == 0:
        return math.inf if loss > 0 else 0.0
    return 100 * (loss - best) / abs(best)


def _least(loss: float, best: float | None) -> float | None:
    """Return the smaller one; NaN is no best value, and ``None`` where there is no other."""
    numbers = [each for each in (best, loss) if each is not None and not math.isnan(each)]
    return min(numbers, default=None)
