"""The checks of the arguments that users pass.

A user may run no type checker, so what an annotation promises is tested at the boundary, once, and refused with the
name and the value of the argument.
"""

from __future__ import annotations

import inspect
import sys
from numbers import Integral, Real
from typing import cast

from flowtrain.errors import FlowtrainError, UsageError

__all__ = ["is_a", "is_positive", "is_type", "is_whole", "runs_nothing", "switch", "whole_number"]


def is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    """Tell whether an argument of a user has the type of its annotation.

    Type checkers take an annotation for proof, and would report a plain ``isinstance`` as always true.
    """
    return isinstance(value, kind)


def is_positive(value: object) -> bool:
    """Tell whether an argument of a user is a number above zero that a ``float`` can hold, and not a ``bool``."""
    return not is_a(value, bool) and isinstance(value, Real) and 0 < cast("float", value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    """Tell whether an argument of a user is an integer, also one of NumPy, but neither ``True`` nor ``2.0``."""
    return type(value) is int or (is_a(value, Integral) and not is_a(value, bool))


def whole_number(what: str, value: object, least: int = 1, error: type[FlowtrainError] = UsageError) -> int:
    """Return an argument of a user as an ``int``, if it is a whole number (`is_whole`) that is large enough.

    Args:
        what: The name of the argument, for the message.
        value: The argument.
        least: The smallest number that is allowed.
        error: The type of the error to raise.

    Raises:
        FlowtrainError: The argument is no whole number, or is below `least`.

    >>> whole_number("Every(): n", 2.0)
    Traceback (most recent call last):
    flowtrain.errors.UsageError: Every(): n is a whole number, at least 1, got 2.0.
    """
    if not is_whole(value) or (number := int(cast("int", value))) < least:  # an integer of NumPy becomes an `int`
        raise error(f"{what} is a whole number, at least {least}, got {value!r}.")
    return number


def switch(call: str, name: str, value: object, error: type[FlowtrainError] = UsageError) -> bool:
    """Return an argument of a user that is ``True`` or ``False``: any other value, as ``"no"``, would count as true.

    Args:
        call: The name of the class or function that was called, for the message.
        name: The name of the argument.
        value: The argument.
        error: The type of the error to raise.

    Raises:
        FlowtrainError: The argument is neither ``True`` nor ``False``.

    >>> switch("EMA", "buffers", "no")
    Traceback (most recent call last):
    flowtrain.errors.UsageError: EMA(buffers='no'): buffers is True or False.
    """
    if value is not True and value is not False:
        raise error(f"{call}({name}={value!r}): {name} is True or False.")
    return value


def runs_nothing(function: object) -> bool:
    """Tell whether a call of a function of a user runs none of its code, since it has ``async`` or ``yield`` in it."""
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(kind(function) for kind in kinds)


def is_type(value: object, base: type) -> bool:
    """Tell whether an argument of a user is a type, and `base` or a subclass of it."""
    return isinstance(value, type) and issubclass(value, base)
