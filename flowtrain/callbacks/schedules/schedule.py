"""A schedule: the value of a hyperparameter as a function of the number of the update.

A schedule is any callable ``schedule(n) -> value``, where n is the number of the coming update, from 1. `Schedule` is a
schedule that knows the call that made it, for messages, and that can be stretched over the updates of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias

from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number

__all__ = ["Schedule", "ScheduleLike", "as_schedule", "check_milestones", "check_number"]


@dataclass(frozen=True, eq=False, repr=False)  # compared by identity, because equal texts may have different formulas
class Schedule:
    """A value for each update: ``schedule(n)``, where n is the number of the coming update, from 1.

    Attributes:
        text: The call that made the schedule, shortened, for messages.
        formula: A function of n and of the length, which returns the value.
        length: The number of updates that the formula is stretched over; ``None`` if it is not given, or not needed.
        stretched: Whether the formula depends on the length.
        unit: The unit of n and of the length: ``"update"`` or ``"epoch"``.
    """

    text: str
    formula: Callable[[int, int], float]
    length: int | None = None
    stretched: bool = False
    unit: Literal["update", "epoch"] = "update"

    @property
    def is_open(self) -> bool:
        """Whether the formula needs a length and none is given, so that the fit gives it."""
        return self.stretched and self.length is None

    def over(self, total: int) -> Schedule:
        """Return this schedule stretched over `total` updates (or epochs), if its own length is not given."""
        # A fit with nothing to train has 0 updates, and formulas divide by the length.
        return replace(self, length=max(total, 1)) if self.is_open else self

    def value(self, n: int, length: int) -> float:
        """Return the value at update n, of the schedule stretched over `length` updates if it has no own length."""
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
    """Return the schedule that a user's argument means: a number is a constant value, a function is called with n.

    Raises:
        UsageError: `given` is no schedule, no finite number and no function.

    >>> as_schedule(0.1)(7)
    0.1
    """
    if isinstance(given, Schedule):
        return given
    # True is a number for Python, but as a learning rate it is a mistake.
    if is_a(given, Real) and not is_a(given, bool):
        value: Any = given
        check_number("a schedule", "value", value)
        return Schedule(repr(value), lambda n, _: value)
    if hasattr(given, "get_last_lr"):
        kind = type(given).__name__
        raise UsageError(
            f"A schedule is a function schedule(n) of the coming update, from 1, or a number; got a {kind}, which "
            f"torch makes for an optimizer. Write from_torch(lambda optimizer: {kind}(optimizer, ...), 0.1)."
        )
    if not callable(given):
        raise UsageError(
            f"A schedule is a function schedule(n) of the coming update, from 1, or a number; got {given!r}. "
            f"Write one_cycle(1e-3), or lambda n: 1e-3 / n."
        )
    function = given
    return Schedule(getattr(given, "__qualname__", repr(given)), lambda n, _: function(n))


def check_number(what: str, name: str, value: Any) -> None:
    """Check that an argument is a finite number.

    Args:
        what: The name of the function, for the message.
        name: The name of the argument.
        value: The argument.

    Raises:
        UsageError: `value` is no finite number.
    """
    if not is_a(value, Real) or is_a(value, bool) or not math.isfinite(value):
        raise UsageError(f"{what}({name}={value!r}): {name} is a finite number, such as 0.1.")


def check_milestones(what: str, name: str, given: Iterable[Any]) -> list[int]:
    """Return an argument that is a list of positive whole numbers in ascending order.

    Args:
        what: The name of the function, for the message.
        name: The name of the argument.
        given: The argument.

    Raises:
        UsageError: It is no list, a number is not whole or below 1, or the numbers are not ascending.
    """
    if not is_a(given, Iterable) or is_a(given, str):
        raise UsageError(f"{what}({name}={given!r}): {name} is a list of numbers of updates, such as [100, 200].")
    found = [whole_number(f"{what}(): each of {name}", each) for each in given]
    if found != sorted(set(found)):
        raise UsageError(f"{what}({name}={found!r}): {name} is numbers of updates, in ascending order, none twice.")
    return found
