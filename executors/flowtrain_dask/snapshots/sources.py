# pyright: reportPrivateUsage=false
# The lists of a series are read where they are, and nothing is copied before somebody looks.
"""Sources: where marked series are read from, once it is known how long they were.

In the process that trains these are the learner's own series (`Here`). On the way to another process each of them is
one `Column`, however many events there are that show it; over there a series is made of what has come (`There`).

Where another process is to see a series, it shows the same in both: the length, the newest value, and those since the
handler's event before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from flowtrain.callback.phases import Phase
from flowtrain.state.series import Series
from flowtrain_dask.snapshots.series import Cut, tail_of

__all__ = ["Column", "Here", "Layout", "Lengths", "Source", "There"]

Lengths: TypeAlias = tuple[int, ...]
"""How long each series of a layout is, in its order."""


class Layout(NamedTuple):
    """Where the series of a map by phase are.

    Attributes:
        path: The map's.
        make: What makes the map of a phase that is not there.
        phases: For each phase the path of its map, the position of its first series, and their names.
    """

    path: str
    make: Callable[[], Any] | None
    phases: dict[Phase, tuple[str, int, tuple[str, ...]]]


class Source(Protocol):
    """Where marked series are read from.

    Attributes:
        layout: The layout.
    """

    layout: Layout

    def series(self, position: int, before: int, length: int) -> Series:
        """Return the series at a position of the layout, of that length, with the values since `before` at least."""
        ...


class Column(NamedTuple):
    """A part of a series, as it travels.

    Attributes:
        path: The series'.
        start: The position of the first value.
        steps: The steps.
        values: The values.
    """

    path: str
    start: int
    steps: list[int]
    values: list[Any]


class Here:
    """The learner's own series.

    Args:
        layout: Where they are.
        found: The series, in the order of the layout.
        tail: Whether they are shown as another process would show them.
    """

    __slots__ = ("_found", "_tail", "layout")

    def __init__(self, layout: Layout, found: list[Series], tail: bool) -> None:
        self.layout = layout
        self._found = found
        self._tail = tail

    def series(self, position: int, before: int, length: int) -> Series:
        """Return what the learner has, up to that length."""
        series = self._found[position]
        if not self._tail:
            return Cut(series, length)
        start = _first(before, length)
        return tail_of(series._path, length, start, series._steps[start:length], series.since(start)[: length - start])

    def columns(self, before: Lengths, first: Lengths, last: Lengths) -> list[Column]:
        """Return the series as they travel, for all events of a batch.

        Args:
            before: How long each was at the handler's event before the batch.
            first: How long each is at the first event of the batch.
            last: How long each is at the last one.
        """
        columns = []
        for series, old, length, end in zip(self._found, before, first, last, strict=True):
            start = _first(old, length)
            values = series.since(start)[: end - start]
            columns.append(Column(series._path, start, series._steps[start:end], values))
        return columns


class There:
    """Series that have travelled.

    Args:
        layout: Where they are.
        columns: The series, in the order of the layout.
    """

    __slots__ = ("columns", "layout")

    def __init__(self, layout: Layout, columns: list[Column]) -> None:
        self.layout = layout
        self.columns = columns

    def series(self, position: int, before: int, length: int) -> Series:
        """Return the part that has come, up to that length."""
        path, at, steps, values = self.columns[position]
        start = _first(before, length)
        return tail_of(path, length, start, steps[start - at : length - at], values[start - at : length - at])


def _first(before: int, length: int) -> int:
    """Return the first position that is kept: since `before`, and the newest one always."""
    return min(before, max(length - 1, 0))
