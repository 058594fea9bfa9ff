"""Schedules made of other schedules: with a warm-up before, several in sequence, or with epochs instead of updates.

`swa_lr` follows a schedule and then goes over to a constant value, for `flowtrain.callbacks.SWA`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from flowtrain.callbacks.schedules.schedule import (
    Schedule,
    ScheduleLike,
    as_schedule,
    check_milestones,
    check_number,
)
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number

__all__ = ["per_epoch", "sequence", "swa_lr", "warmup"]


def warmup(then: ScheduleLike, updates: int, *, start: float = 0.01) -> Schedule:
    """Return a schedule that rises linearly to the first value of another schedule, and then follows that schedule.

    ``then(1) * (start + (1 - start) * t / updates)`` for the first `updates`, then ``then(n - updates)``. Goyal and
    others, "Accurate, Large Minibatch SGD", https://arxiv.org/abs/1706.02677, section 2.2; the same as torch's
    ``SequentialLR`` of ``LinearLR`` and the other schedule.

    Args:
        then: A schedule, or a number for a constant value. A schedule without a length is stretched over the updates
            of the fit after the warm-up.
        updates: The number of updates of the warm-up.
        start: The first value, as a share of ``then(1)``.

    Raises:
        UsageError: `then` is no schedule or counts epochs, `updates` is no whole number from 1, or `start` is no
            finite number.

    >>> [warmup(1.0, 4, start=0.0)(n) for n in range(1, 7)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    rest = _part("warmup", then)
    updates = whole_number("warmup(): updates", updates)
    check_number("warmup", "start", start)

    def formula(n: int, total: int) -> float:
        """Return the value of the warm-up, or after it the value of the other schedule."""
        # The warm-up ends at the first value of the other schedule, so the curve has no jump where that one begins.
        if n <= updates:
            return rest.value(1, total - updates) * (start + (1 - start) * (n - 1) / updates)
        return rest.value(n - updates, total - updates)

    # Only a schedule that is still without a length makes the whole depend on the length of the fit.
    return Schedule(f"warmup({rest}, {updates})", formula, stretched=rest.is_open)


def sequence(schedules: Iterable[ScheduleLike], at: Iterable[int]) -> Schedule:
    """Return a schedule that follows several schedules in sequence, each of which counts updates from its own start.

    The same as torch's ``SequentialLR``. A schedule without a length is stretched over its part; the last one over the
    rest of the fit.

    Args:
        schedules: The schedules, or numbers for constant values.
        at: The numbers of updates after which the next schedule begins, ascending; one fewer than there are schedules.

    Raises:
        UsageError: `schedules` is no list, an item of it is no schedule or counts epochs, or `at` is not ascending or
            has another length.

    >>> from flowtrain.callbacks.schedules import polynomial
    >>> [sequence([1.0, polynomial(0.5, length=2)], at=[2])(n) for n in range(1, 6)]
    [1.0, 1.0, 0.5, 0.25, 0.0]
    """
    if not is_a(schedules, Iterable) or is_a(schedules, str):
        raise UsageError(f"sequence({schedules!r}, ...) takes a list of schedules: sequence([a, b, c], at=[100, 200]).")
    parts = [_part("sequence", each) for each in schedules]
    done = check_milestones("sequence", "at", at)
    if len(parts) != len(done) + 1:
        raise UsageError(
            f"sequence() got {len(parts)} schedules and {len(done)} numbers in at={done}: after each schedule but the "
            f"last there is one, as sequence([a, b, c], at=[100, 200])."
        )
    begins = [0, *done]

    def formula(n: int, total: int) -> float:
        """Return the value of the schedule whose part update n is in."""
        turn = bisect_right(done, n - 1)  # before update n there are n - 1 complete updates
        # The total is known only when the fit is, so the end of the last part cannot be computed with the others.
        ends = [*done, total]
        # A part with its own length ignores the second argument; any other is stretched over the part.
        return parts[turn].value(n - begins[turn], ends[turn] - begins[turn])

    # The other parts end at numbers that the user gave, so only the last one can need the length of the fit.
    return Schedule(f"sequence({parts}, at={done})", formula, stretched=parts[-1].is_open)


def swa_lr(
    before: ScheduleLike, value: float, *, start: int, length: int = 10, shape: Literal["cos", "linear"] = "cos"
) -> Schedule:
    """Return a schedule that follows another one for `start` updates, and then goes over to a constant value.

    With ``a = before(start)``, the value at update ``start + k`` is ``a + (value - a) * s(min(k / length, 1))``, where
    s is ``(1 - cos(pi * t)) / 2``, or t itself if `shape` is linear. The same as torch's ``SWALR``, which is made for
    the averages of `flowtrain.callbacks.SWA`; within `per_epoch` all numbers are epochs.

    Args:
        before: A schedule, or a number for a constant value. Without a length it is stretched over `start` updates.
        value: The value in the end.
        start: The number of updates of `before`.
        length: The number of updates after which `value` is reached; 0 reaches it at once.
        shape: The curve between the two: ``"cos"`` or ``"linear"``.

    Raises:
        UsageError: `before` is no schedule or counts epochs, `value` is no finite number, `start` is no whole number
            from 1, `length` none from 0, or `shape` is another text.

    >>> [round(swa_lr(1.0, 0.5, start=2, length=2)(n), 3) for n in range(1, 6)]
    [1.0, 1.0, 0.75, 0.5, 0.5]
    """
    first = _part("swa_lr", before)
    check_number("swa_lr", "value", value)
    start = whole_number("swa_lr(): start", start)
    length = whole_number("swa_lr(): length", length, least=0)
    if shape not in ("cos", "linear"):
        raise UsageError(f"swa_lr(shape={shape!r}): shape is 'cos' or 'linear'.")

    def formula(n: int, total: int) -> float:
        """Return the value of the first schedule, or after it the value on the way to the constant one."""
        # A length of 0 would divide by zero; with 1 the constant value is reached at the first update after `start`,
        # too.
        share = min((n - start) / max(length, 1), 1.0)
        if share <= 0:
            return first.value(n, start)
        passed = share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        return value * passed + first.value(start, start) * (1 - passed)

    return Schedule(f"swa_lr({first}, {value}, start={start}, length={length})", formula)


def per_epoch(schedule: ScheduleLike) -> Schedule:
    """Return a schedule that is called with the number of the epoch, from 1, instead of the number of the update.

    Its length is in epochs, and without a length it is stretched over the epochs of the fit. The epochs of each
    training phase are counted separately; an epoch that an error ended does not count.

    Raises:
        UsageError: `schedule` is no schedule, or counts epochs already.

    >>> from flowtrain.callbacks.schedules import step
    >>> per_epoch(step(0.1, every=30))
    per_epoch(step(0.1, 30, 0.1))
    """
    inner = _part("per_epoch", schedule)
    # The formula stays as it is: `Scheduler` counts epochs instead of updates for a schedule with this unit.
    return replace(inner, text=f"per_epoch({inner})", unit="epoch")


def _part(what: str, given: ScheduleLike) -> Schedule:
    """Return an inner schedule, which must count updates.

    Raises:
        UsageError: `given` is no schedule, or counts epochs.
    """
    part = as_schedule(given)
    if part.unit == "epoch":
        raise UsageError(
            f"{what}() got {part}, which counts epochs, and counts updates itself. Put per_epoch around the whole: "
            f"per_epoch({what}(...))."
        )
    return part
