"""Schedules as curves: the value of a hyperparameter depends only on the number of the update.

A schedule is any callable ``schedule(n) -> value``, where n is the number of the coming update, from 1. The functions
here make pure schedules: the value depends only on n, so a checkpoint holds no state of them.

==================  ==========================================================================
`constant`          one value
`cosine`            falls along half a cosine
`polynomial`        falls as a power of the share that is left; with ``power=1`` linearly
`exponential`       is multiplied with a factor at each update
`step`              is multiplied with a factor after given numbers of updates
`one_cycle`         rises to a peak, then falls far below its first value
`from_torch`        has the values of a scheduler of ``torch.optim.lr_scheduler``
==================  ==========================================================================

`flowtrain.callbacks.schedules.combining` joins schedules, and `flowtrain.callbacks.schedules.plateau` has the schedule
that depends on a metric.

Without a length, `cosine`, `polynomial` and `one_cycle` are stretched over the planned updates of a fit, and start
again with each fit; all other schedules count updates over the life of the learner. After its length a schedule keeps
its last value. In the formulas below t is ``n - 1``, the number of complete updates, and T the length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from flowtrain.callbacks.schedules.schedule import Schedule, check_milestones, check_number
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number

__all__ = ["constant", "cosine", "exponential", "from_torch", "one_cycle", "polynomial", "step"]


def constant(value: float) -> Schedule:
    """Return a schedule of one value.

    Raises:
        UsageError: `value` is no finite number.

    >>> constant(0.1)(1000)
    0.1
    """
    check_number("constant", "value", value)
    return Schedule(f"constant({value})", lambda n, _: value)


def cosine(value: float, *, end: float = 0.0, length: int | None = None) -> Schedule:
    """Return a schedule that falls from `value` to `end` along half a cosine.

    ``end + (value - end) * (1 + cos(pi * t / T)) / 2``, which is `end` after the last update. Loshchilov and Hutter,
    "SGDR", https://arxiv.org/abs/1608.03983, equation 5, without restarts; the same as torch's ``CosineAnnealingLR``
    for the first T updates.

    Args:
        value: The first value.
        end: The last value.
        length: T in updates; all updates of the fit by default.

    Raises:
        UsageError: `value` or `end` is no finite number, or `length` is no whole number from 1.

    >>> [round(cosine(1.0, length=4)(n), 3) for n in range(1, 6)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    check_number("cosine", "value", value)
    check_number("cosine", "end", end)

    def formula(n: int, total: int) -> float:
        """Return the value on the cosine."""
        return _cosine(value, end, min(n - 1, total) / total)

    return _stretched(f"cosine({value}, end={end}", length, formula)


def polynomial(value: float, *, end: float = 0.0, power: float = 1.0, length: int | None = None) -> Schedule:
    """Return a schedule that falls from `value` to `end` as a power of the updates that are left.

    ``end + (value - end) * (1 - t / T) ** power``, which is `end` after the last update; with ``power=1`` it is linear.
    Chen and others, "DeepLab", https://arxiv.org/abs/1606.00915, section 4.3.1 (the "poly" policy); with ``end=0`` the
    same as torch's ``PolynomialLR``.

    Args:
        value: The first value.
        end: The last value.
        power: The exponent.
        length: T in updates; all updates of the fit by default.

    Raises:
        UsageError: `value`, `end` or `power` is no finite number, or `length` is no whole number from 1.

    >>> [polynomial(1.0, length=4)(n) for n in range(1, 7)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    for name, number in (("value", value), ("end", end), ("power", power)):
        check_number("polynomial", name, number)

    def formula(n: int, total: int) -> float:
        """Return the value at a power of the share that is left."""
        return end + (value - end) * math.pow(1 - min(n - 1, total) / total, power)

    return _stretched(f"polynomial({value}, end={end}, power={power}", length, formula)


def exponential(value: float, gamma: float) -> Schedule:
    """Return a schedule that is multiplied with `gamma` after each update: ``value * gamma ** t``.

    The same as torch's ``ExponentialLR``.

    Raises:
        UsageError: `value` or `gamma` is no finite number.

    >>> exponential(1.0, 0.5)(4)
    0.125
    """
    check_number("exponential", "value", value)
    check_number("exponential", "gamma", gamma)
    return Schedule(f"exponential({value}, {gamma})", lambda n, _: value * gamma ** (n - 1))


def step(value: float, every: int | Sequence[int], gamma: float = 0.1) -> Schedule:
    """Return a schedule that is multiplied with `gamma` after each `every` updates, or after the listed updates.

    ``value * gamma ** (t // every)``, torch's ``StepLR``; or ``value * gamma ** k``, torch's ``MultiStepLR``, where k
    is how many of the listed numbers are at most t.

    Args:
        value: The first value.
        every: The number of updates between two steps; or a list of numbers of updates, ascending.
        gamma: The factor.

    Raises:
        UsageError: `value` or `gamma` is no finite number, `every` is no whole number from 1, or not ascending.

    >>> [step(1.0, 2, 0.5)(n) for n in range(1, 6)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    >>> [step(1.0, [1, 4], 0.5)(n) for n in range(1, 6)]
    [1.0, 0.5, 0.5, 0.5, 0.25]
    """
    check_number("step", "value", value)
    check_number("step", "gamma", gamma)
    text = f"step({value}, {every}, {gamma})"
    # A text is a sequence too; it is refused below, as an `every` that is no number.
    if isinstance(every, Sequence) and not is_a(every, str):
        done = check_milestones("step", "every", every)
        return Schedule(text, lambda n, _: value * gamma ** bisect_right(done, n - 1))
    period = whole_number("step(): every", every)
    return Schedule(text, lambda n, _: value * gamma ** ((n - 1) // period))


def one_cycle(
    max_value: float,
    *,
    start: float | None = None,
    end: float | None = None,
    peak: float = 0.3,
    shape: Literal["cosine", "linear"] = "cosine",
    length: int | None = None,
) -> Schedule:
    """Return a schedule that rises from `start` to `max_value`, and then falls to `end`.

    Smith and Topin, "Super-Convergence", https://arxiv.org/abs/1708.07120; the same as torch's ``OneCycleLR`` with two
    phases: the peak is at ``t = peak * T - 1`` and `end` at the last update, ``t = T - 1``. A momentum falls first and
    then rises: ``one_cycle(0.85, start=0.95, end=0.95)``.

    Args:
        max_value: The value at the peak.
        start: The first value; ``max_value / 25`` by default.
        end: The last value; ``start / 1e4`` by default.
        peak: The position of the peak, as a share of the length.
        shape: The shape of the rise and the fall: ``"cosine"`` or ``"linear"``.
        length: T in updates; all updates of the fit by default.

    Raises:
        UsageError: A value is no finite number, `peak` is not from 0 to 1, `shape` is not one of the two, or `length`
            is no whole number from 1.

    >>> [round(one_cycle(1.0, start=0.0, peak=0.5, shape="linear", length=8)(n), 2) for n in range(1, 9)]
    [0.0, 0.33, 0.67, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_number("one_cycle", "max_value", max_value)
    start = max_value / 25 if start is None else start
    end = start / 1e4 if end is None else end
    for name, number in (("start", start), ("end", end), ("peak", peak)):
        check_number("one_cycle", name, number)
    if not 0 <= peak <= 1:
        raise UsageError(f"one_cycle(peak={peak}): peak is a share of the length, from 0 to 1, such as 0.3.")
    if shape not in ("cosine", "linear"):
        raise UsageError(f'one_cycle(shape={shape!r}): shape is "cosine" or "linear".')
    between = _cosine if shape == "cosine" else _line

    def formula(n: int, total: int) -> float:
        """Return the value on the way up or on the way down."""
        # torch counts the updates of its two phases this way, so that the values are the same as those of `OneCycleLR`.
        top, last, t = peak * total - 1, total - 1, min(n, total) - 1
        if t <= top:
            # With a peak at the very beginning there is no way up, and the first value is the peak.
            return between(start, max_value, t / top if top > 0 else 1.0)
        return between(max_value, end, (t - top) / (last - top))

    return _stretched(f"one_cycle({max_value}", length, formula)


def from_torch(
    make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], value: float, *, key: str = "lr"
) -> Schedule:
    """Return a schedule with the values of a scheduler of torch.

    https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate. The scheduler gets a separate optimizer
    with one parameter group, and is stepped once for each update.

    Args:
        make: A function of an optimizer that returns the scheduler: ``lambda o: CosineAnnealingLR(o, T_max=100)``.
        value: The first value of the hyperparameter in that optimizer.
        key: The entry of the parameter group that the schedule returns; ``"momentum"`` for the momentum of
            ``OneCycleLR``.

    Raises:
        UsageError: `make` is no function, or returns no scheduler, or a scheduler that needs a metric.

    >>> schedule = from_torch(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), 1.0)
    >>> [schedule(n) for n in range(1, 6)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    check_number("from_torch", "value", value)
    if is_a(make, torch.optim.lr_scheduler.LRScheduler):
        kind = type(make).__name__
        raise UsageError(
            f"from_torch() takes a function that makes the scheduler: from_torch(lambda optimizer: {kind}(optimizer, "
            f"...), {value}); got a {kind}."
        )
    if not callable(make):
        raise UsageError(
            f"from_torch({make!r}, {value}) takes a function that makes the scheduler first, then the value. Write "
            f"from_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=100), 0.1)."
        )
    # The optimizer needs a learning rate even if the schedule is of another entry; the key comes last, so it wins.
    settings: dict[str, Any] = {"lr": 1.0, key: value}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **settings)
    scheduler = make(optimizer)
    if not is_a(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise UsageError(
            f"from_torch(make, value): make(optimizer) returned {scheduler!r}, which is no scheduler of torch. Write "
            f"from_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=100), 0.1)."
        )
    name = type(scheduler).__name__
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError(f"from_torch() got a {name}, which needs a metric. Use reduce_on_plateau({value}, ...).")
    group = optimizer.param_groups[0]
    # A scheduler of torch only goes forward, so its values are kept: a resumed fit asks for earlier updates too.
    values = [float(group[key])]

    def formula(n: int, _: int) -> float:
        """Return the value at update n. The scheduler is stepped through all updates before n, once."""
        while len(values) < n:
            optimizer.step()  # the optimizer has no gradients; torch warns if a scheduler steps before its optimizer
            scheduler.step()
            values.append(float(group[key]))
        return values[n - 1]

    return Schedule(f"from_torch({name}, {value})", formula)


def _stretched(text: str, length: int | None, formula: Callable[[int, int], float]) -> Schedule:
    """Return a schedule that has a length or is stretched.

    Args:
        text: The call that makes the schedule, up to its length.
        length: The length, or ``None`` for the length of the fit.
        formula: The value as a function of the update and of the length.
    """
    if length is None:
        return Schedule(f"{text})", formula, stretched=True)
    length = whole_number(f"{text.partition('(')[0]}(): length", length)
    return Schedule(f"{text}, length={length})", formula, length, stretched=True)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _line(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
