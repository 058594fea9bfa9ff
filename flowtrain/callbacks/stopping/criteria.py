"""The stopping criteria of EarlyStopping.jl, without those of Prechelt; `flowtrain.callbacks.stopping` has a table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from numbers import Real
from typing import Any, ClassVar

from flowtrain.callbacks.monitoring import Mode
from flowtrain.callbacks.stopping.criterion import Criterion, check_positive
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number

__all__ = ["InvalidValue", "NumberLimit", "NumberSinceBest", "Patience", "Threshold", "TimeLimit"]


class Patience(Criterion):
    """Stop when there was no improvement for `n` epochs.

    An improvement is the first value that is a number, or a value that is better by more than `min_delta` than the last
    improvement. So a metric that is NaN from the first epoch on ends training after `n` epochs. Keras and Lightning
    call this patience (https://keras.io/api/callbacks/early_stopping); EarlyStopping.jl gives the name to `UP`.

    Args:
        n: The number of epochs.
        min_delta: The amount by which a value must be better, in the unit of the metric.

    Raises:
        UsageError: `n` is no whole number, or below 1, or `min_delta` is negative.

    >>> criterion = Patience(2, min_delta=0.5)
    >>> [criterion.update(value) for value in (3.0, 2.9, 2.6)]
    [None, None, 'Patience(2, min_delta=0.5): no improvement on 3 for 2 epochs']
    """

    initial: ClassVar[Mapping[str, Any]] = {"best": None, "count": 0}
    best: float | None
    count: int

    def __init__(self, n: int = 5, min_delta: float = 0.0) -> None:
        self.n = whole_number(f"{type(self).__name__}(): n", n)
        if is_a(min_delta, bool) or not is_a(min_delta, Real) or not 0 <= min_delta < math.inf:
            raise UsageError(f"Patience(min_delta={min_delta!r}): min_delta is a number, at least 0, such as 0.001.")
        self.min_delta = min_delta
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Count the epochs since the last improvement."""
        best = self.best
        if not math.isnan(loss) and (best is None or loss < best - self.min_delta):
            self.best, self.count = loss, 0
            return None
        self.count += 1
        if self.count < self.n:
            return None
        epochs = f"for {self.count} epoch{'s' if self.count > 1 else ''}"
        return f"the value is NaN {epochs}" if best is None else f"no improvement on {self.shown(best)} {epochs}"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        super().load_state_dict(state)
        if self.best is not None and math.isnan(self.best):  # early versions kept NaN as the best value
            self.best = None

    def __repr__(self) -> str:
        delta = f", min_delta={self.min_delta:g}" if self.min_delta else ""
        return f"{type(self).__name__}({self.n}{delta})"


class NumberSinceBest(Patience):
    """Stop when the best value is `n` epochs old. This is `Patience` with ``min_delta=0``.

    Source: ``NumberSinceBest`` of EarlyStopping.jl. A value that equals the best one is not a new best.

    Args:
        n: The number of epochs.

    Raises:
        UsageError: `n` is no whole number, or below 1.
    """

    def __init__(self, n: int = 6) -> None:
        super().__init__(n)


class NumberLimit(Criterion):
    """Stop after `n` values.

    Source: ``NumberLimit`` of EarlyStopping.jl.

    Args:
        n: The number of values.

    Raises:
        UsageError: `n` is no whole number, or below 1.
    """

    initial: ClassVar[Mapping[str, Any]] = {"count": 0}
    count: int

    def __init__(self, n: int = 100) -> None:
        self.n = whole_number("NumberLimit(): n", n)
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Count the values."""
        self.count += 1
        return f"{self.count} values were given" if self.count >= self.n else None

    def __repr__(self) -> str:
        return f"NumberLimit({self.n})"


class Threshold(Criterion):
    """Stop when the value of an epoch is better than `value`: below it, or above it if large values are good.

    Source: ``Threshold`` of EarlyStopping.jl.

    Args:
        value: The threshold.

    Raises:
        UsageError: `value` is no number.
    """

    def __init__(self, value: float = 0.0) -> None:
        if is_a(value, bool) or not is_a(value, Real) or math.isnan(value):
            raise UsageError(f"Threshold(value={value!r}): value is a number, such as 0.1.")
        self.value = value
        super().__init__()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Compare the value with the threshold."""
        threshold = self._sign * self.value
        return f"the value {self.shown(loss)} is better than {self.value:g}" if loss < threshold else None

    def __repr__(self) -> str:
        return f"Threshold({self.value:g})"


class TimeLimit(Criterion):
    """Stop when the fits have taken more than some time together; without a fit, the time since the first value.

    The clock is read when a value is given, so at the end of an epoch. The time between two fits does not count, nor
    the time between a checkpoint and the fit that resumes from it. `EarlyStopping` counts from 0 again in the fit after
    one that this criterion has ended.

    Source: ``TimeLimit`` of EarlyStopping.jl.

    Args:
        limit: Seconds, or a `datetime.timedelta`.
        clock: A function that returns the time in seconds.

    Raises:
        UsageError: `limit` is not positive.
    """

    initial: ClassVar[Mapping[str, Any]] = {"spent": 0.0}
    spent: float

    def __init__(self, limit: float | timedelta, *, clock: Callable[[], float] = time.monotonic) -> None:
        seconds = limit.total_seconds() if isinstance(limit, timedelta) else limit
        self.seconds = check_positive("TimeLimit", "limit", seconds, "3600, in seconds")
        self._clock = clock
        self._since: float | None = None
        super().__init__()

    def begin(self, mode: Mode = "min") -> None:
        """Start the clock of this fit."""
        super().begin(mode)
        self._since = self._clock()

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Add the time since the last value."""
        now = self._clock()
        self.spent += now - (now if self._since is None else self._since)
        self._since = now
        return f"{self.spent:.6g} seconds have gone by" if self.spent > self.seconds else None

    def reset(self) -> None:
        """Forget the time that has passed."""
        super().reset()
        self._since = None

    def __repr__(self) -> str:
        return f"TimeLimit({self.seconds:g})"


class InvalidValue(Criterion):
    """Stop when the value, or a value of the training phase, is NaN or infinite.

    Source: ``InvalidValue`` of EarlyStopping.jl.
    """

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Look for a value that is not finite."""
        bad = [self.shown(value) for value in (loss, *training) if not math.isfinite(value)]
        return f"there is a value of {bad[0]}" if bad else None

    def __repr__(self) -> str:
        return "InvalidValue()"
