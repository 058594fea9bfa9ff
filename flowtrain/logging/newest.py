"""What is new in series by name, without going through what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flowtrain.records import Group, Histogram, Loggable, Value
from flowtrain.series import Series

__all__ = ["loggable", "newest"]


def newest(series: Mapping[str, Series], group: Group, seen: dict[str, int]) -> Iterator[tuple[str, int, Any]]:
    """Yield ``(name, step, value)``, the newest one, of each series that has grown.

    Args:
        series: Series by name.
        group: Tells the series from those of other phases.
        seen: How long each was when this was called before, by group and name; brought up to date.
    """
    prefix = "/".join(group)
    for name, each in series.items():
        length = len(each)
        key = f"{prefix}/{name}"
        if length and seen.get(key) != length:
            seen[key] = length
            yield name, *each.last()


def loggable(value: Any) -> Loggable:
    """Return an entry of a series as something to log: a number, or how the elements of a tensor are distributed."""
    return Histogram(value) if hasattr(value, "numel") and value.numel() != 1 else Value(value)
