"""What a schedule is: a value for each update, worked out from the number of the update alone.

A schedule is any callable ``schedule(n) -> value``, n the number of the coming update, from 1. `Schedule` is one that
knows how it is written, for messages, and that can be stretched over the updates of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias

from flowtrain.errors import UsageError, is_a, whole_number

__all__ = ["Schedule", "ScheduleLike", "as_schedule", "check_milestones", "check_number"]


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """A value for each update: ``schedule(n)``, n the number of the coming update, from 1.

    Attributes:
        text: How it is written, for messages.
        formula: What is called with n, and with the length in updates where the schedule has one.
        length: Over how many updates the formula is stretched; ``None`` if it is not given, or the formula needs none.
        stretched: Whether the formula needs a length.
        unit: What n counts.
    """

    text: str
    formula: Callable[[int, int], float]
    length: int | None = None
    stretched: bool = False
    unit: Literal["update", "epoch"] = "update"

    @property
    def is_open(self) -> bool:
        """Whether the length is not given, so that the fit decides."""
        return self.stretched and self.length is None

    def over(self, total: int) -> Schedule:
        """Return this schedule stretched over `total` updates (or epochs), if its own length is not given."""
        return replace(self, length=max(total, 1)) if self.is_open else self

    def value(self, n: int, length: int) -> float:
        """Return the value at update n, stretched over `length` updates if its own length is not given."""
        return self.formula(n, max(length, 1) if self.length is None else self.length)

    def __call__(self, n: int) -> float:
        if self.is_open:
            raise UsageError(
                f"{self} has no length, and only a fit that knows how many batches its loader has can give it one. "
                f"Write length=, in {self.unit}s."
            )
        return self.value(n, 1)

    def __repr__(self) -> str:
        return self.text


ScheduleLike: TypeAlias = Schedule | Callable[[int], float] | float


def as_schedule(given: ScheduleLike) -> Schedule:
    """Return what a user gives as a schedule: a number stays the same value, a function is called with n.

    Raises:
        UsageError: It is neither.

    >>> as_schedule(0.1)(7)
    0.1
    """
    if isinstance(given, Schedule):
        return given
    if is_a(given, Real) and not is_a(given, bool):
        value: Any = given
        check_number("a schedule", "value", value)
        return Schedule(repr(value), lambda n, _: value)
    if not callable(given):
        raise UsageError(
            f"A schedule is a function schedule(n) of the coming update, from 1, or a number; got {given!r}. "
            f"Write one_cycle(1e-3), or lambda n: 1e-3 / n."
        )
    function = given
    return Schedule(getattr(given, "__qualname__", repr(given)), lambda n, _: function(n))


def check_number(what: str, name: str, value: Any) -> None:
    """Check that an argument is a finite number.

    Raises:
        UsageError: It is not.
    """
    if not is_a(value, Real) or is_a(value, bool) or not math.isfinite(value):
        raise UsageError(f"{what}({name}={value!r}): {name} is a finite number.")


def check_milestones(what: str, name: str, given: Iterable[Any]) -> list[int]:
    """Check that an argument is ascending positive whole numbers, and return them.

    Raises:
        UsageError: It is not.
    """
    found = [whole_number(f"{what}(): each of {name}", each) for each in given]
    if found != sorted(set(found)):
        raise UsageError(f"{what}({name}={found!r}): {name} is numbers of updates, in ascending order, none twice.")
    return found
