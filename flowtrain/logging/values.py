"""Helpers of backends and of callbacks that log: plain values, and the newest entries of series.

Plain values are the numbers, texts, lists and mappings that every sink can keep. `number` and `settings` convert the
contents of loggables to plain values, `newest` yields the last entry of each series that has grown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from flowtrain.errors import LoggingError
from flowtrain.errors.arguments import is_a
from flowtrain.logging.backend import Group, Histogram, Loggable, LoggerBackend, Value
from flowtrain.logging.names import readable
from flowtrain.state.series import Series

__all__ = [
    "checked_backends",
    "flat",
    "loggable",
    "newest",
    "number",
    "real",
    "refused",
    "settings",
]


def number(value: Any) -> float | int:
    """Return a value as a number.

    Args:
        value: A number, or a tensor or array with one element.

    Raises:
        LoggingError: `value` is no real number, or has no value or several elements.

    >>> number(True), number(0.5)
    (1, 0.5)
    """
    if type(value) is float or type(value) is int:  # nearly every record: the fast form
        return value
    if getattr(value, "is_meta", False):
        raise LoggingError(
            "Value(...) got a tensor on the device 'meta', which has no value. Give it one first, as "
            "module.to_empty(device='cpu') does."
        )
    if hasattr(value, "item") and hasattr(value, "shape"):  # a tensor, or an array of a library that is not imported
        if math.prod(value.shape) != 1:
            raise LoggingError(
                f"Value(...) holds one number, and got a {type(value).__name__} of shape {tuple(value.shape)}. Log "
                f"Histogram(...), or reduce it, as with .mean()."
            )
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Real):
        return _float(value)
    raise LoggingError(f"Value({value!r}) is no real number. Log a text as Text(...), many numbers as Histogram(...).")


def real(value: Any) -> float:
    """Return a value as a ``float``, for a backend that takes no other number.

    Args:
        value: As for `number`.

    Raises:
        LoggingError: As for `number`, or the value is larger than any ``float``.
    """
    return _float(number(value))


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise LoggingError(
            f"Value(...) got a {type(value).__name__} that is larger than any float, and this backend takes no other "
            f"number. Log its logarithm: Value(math.log10(x))."
        ) from None


def settings(values: Any, where: str = "Settings(...)", around: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return settings as plain values: paths become texts, tuples and sets lists, and one-element tensors numbers.

    Args:
        values: The settings by name.
        where: The name of `values` in messages.
        around: The ids of the containers that `values` is in.

    Raises:
        LoggingError: `values` is no mapping, a name is no text, a value has no plain form, or a container holds itself.
            The message names it.
    """
    if not is_a(values, Mapping):
        raise LoggingError(
            f"{where} takes a mapping from names to values, and got {values!r}. Write {{'lr': 0.1}}; for a Namespace "
            f"vars(...), for a dataclass dataclasses.asdict(...)."
        )
    around = (*around, id(values))
    return {_name(name, where): _setting(value, f"{where}[{name!r}]", around) for name, value in values.items()}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping, whose names join the nested names with dots.

    A name that is there already, because a setting has dots in its own name, gets ``_`` at its end.

    >>> flat({"model": {"width": 8}, "seed": 0, "model.width": 9})
    {'model.width': 8, 'seed': 0, 'model.width_': 9}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        for path, item in (flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}).items():
            while path in found:
                path += "_"
            found[path] = item
    return found


def refused(backend: LoggerBackend, loggable: Loggable) -> LoggingError:
    """Return the error for a loggable of a type that a backend does not take."""
    taken = ", ".join(kind.__name__ for kind in backend.accepts)
    return LoggingError(f"{backend!r} takes {taken}, and got a {type(loggable).__name__}.")


def checked_backends(owner: str, backends: Sequence[Any], kind: type[Loggable]) -> tuple[LoggerBackend, ...]:
    """Check the backends that a user has given to a callback, and return them.

    Args:
        owner: The name of the callback's type, for messages.
        backends: The arguments of the user.
        kind: The type of loggables that the callback logs.

    Raises:
        LoggingError: There is no backend, an argument is no backend or does not take `kind`, or one is given twice.
    """
    example = f'{owner}(TensorBoardBackend("runs/a"))'
    if not backends:
        raise LoggingError(f"{owner}() has no backend to log to. Write {example}.")
    for backend in backends:
        if not is_a(backend, LoggerBackend):
            made = f" Write {backend.__name__}(...)." if isinstance(backend, type) else ""
            if isinstance(backend, (list, tuple)):
                made = f" Pass the backends one by one: {owner}(*backends)."
            raise LoggingError(f"{owner} logs to {backend!r}, which is no LoggerBackend.{made or f' Write {example}.'}")
        if not any(issubclass(kind, taken) or issubclass(taken, kind) for taken in backend.accepts):
            taken = ", ".join(each.__name__ for each in backend.accepts)
            raise LoggingError(
                f"{owner} logs {kind.__name__}, and {backend!r} takes {taken}. Give {owner} another backend, such as "
                f"JsonlBackend(path)."
            )
        if sum(backend is other for other in backends) > 1:
            raise LoggingError(f"{owner} was given {backend!r} twice, and would log everything twice. Give it once.")
    return tuple(backends)


def _name(name: Any, where: str) -> str:
    if not is_a(name, str) or not name:
        raise LoggingError(f"{where} has the name {name!r}; names are texts.")
    return readable(name)


def _setting(value: Any, where: str, around: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        return readable(os.fsdecode(value))
    if id(value) in around:
        raise LoggingError(f"{where} holds itself: {value!r:.80}. Leave it out, or write a name instead.")
    if isinstance(value, Mapping):
        return settings(value, where, around)
    if isinstance(value, (list, tuple, set, frozenset)):
        # The order of a set differs between runs, and equal runs must write equal records.
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_setting(item, f"{where}[{place}]", (*around, id(value))) for place, item in enumerate(items)]
    try:
        return number(value)
    except LoggingError:
        raise LoggingError(
            f"{where} is {value!r}. Settings are numbers, texts, None, and lists and mappings of these: write "
            f"repr(...), or the part of it that matters."
        ) from None


def newest(series: Mapping[str, Series], group: Group, seen: dict[str, int]) -> Iterator[tuple[str, int, Any]]:
    """Yield the name and the newest step and value of each series that has grown since the last call.

    Args:
        series: The series by name.
        group: The group that the series are logged in, which tells them from the series of other phases.
        seen: How many values each series had been given at the last call, by group and name. This function updates it.
    """
    prefix = "/".join(group)
    for name, each in series.items():
        given = len(each) + each.dropped
        key = f"{prefix}/{name}"
        if given and seen.get(key) != given:
            seen[key] = given
            yield name, *each.last()


def loggable(value: Any) -> Loggable:
    """Return the loggable for a value of a series: a `Histogram` for a tensor with several elements, else a `Value`."""
    return Histogram(value) if hasattr(value, "numel") and value.numel() != 1 else Value(value)
