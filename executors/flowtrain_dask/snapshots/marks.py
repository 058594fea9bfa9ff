# pyright: reportPrivateUsage=false
# The lists of a series are read where they are: a mark is a view of them.
"""Marks: how long each series was, which is all that a snapshot of series needs while it waits.

Series only grow, so what was in them at an event is known from their lengths. A `Marker` notes these for all series of
a map by phase; what the handler sees is made from them when it is looked at, of the phases and names that it looks at.
That is `flowtrain_dask.snapshots.cuts` without the work for series that nobody reads.

On the way to another process the series of a whole batch of events are one `Column` each, however many events there
are: `Packing` collects the columns, `Packed` is what the other side makes the events of.

Where values of a device are read late (``TorchCore(lag=...)``), series are not marked but copied, as all else is
(`flowtrain_dask.snapshots.copying`): such a value is to be on its way before somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

from flowtrain.phasemap import PhaseMap, ReadOnlyPhaseMap, as_phase
from flowtrain.phases import Phase
from flowtrain.series import Series, SeriesMap
from flowtrain_dask.snapshots.cuts import Cut, tail_of

__all__ = ["Column", "Layout", "Lengths", "Marked", "Marker", "Packed", "Packing", "unpacked"]

Lengths: TypeAlias = tuple[int, ...]


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


class Marked(ReadOnlyPhaseMap[Any]):
    """The series of each phase, as long as they were; made when they are looked at.

    Args:
        source: Where they are read from.
        before: How long each was at the handler's event before; empty where the handler sees all of them.
        lengths: How long each is.
    """

    def __init__(self, source: Source, before: Lengths, lengths: Lengths) -> None:
        # Not what it extends does: that would make them all, on the training thread.
        self.source = source
        self.before = before
        self.lengths = lengths

    def __getattr__(self, name: str) -> Any:
        layout = self.source.layout
        if name == "_original":
            made: PhaseMap[Any] = PhaseMap(layout.path, layout.make)
            for phase in layout.phases:
                made[phase] = self._map(phase)
            self._original = made
            return made
        if name in ("_path", "make"):
            return layout.path if name == "_path" else layout.make
        raise AttributeError(name)

    def __missing__(self, phase: Phase | type[Phase]) -> Any:
        key = as_phase(phase, self._path)
        if key not in self.source.layout.phases:
            return super().__missing__(key)
        if not dict.__contains__(self, key):
            dict.__setitem__(self, key, self._map(key).__twin__())
        return dict.__getitem__(self, key)

    def _map(self, phase: Phase) -> SeriesMap:
        path, start, names = self.source.layout.phases[phase]
        made, before, read = SeriesMap(path), self.before or (0,) * len(self.lengths), self.source.series
        made.restore({name: read(at, before[at], self.lengths[at]) for at, name in enumerate(names, start)})
        return made

    def _whole(self) -> ReadOnlyPhaseMap[Any]:
        return ReadOnlyPhaseMap(self._original)

    # Those of a dict see only what has been looked at.

    def keys(self) -> Any:
        """Return the phases."""
        return self._whole().keys()

    def values(self) -> Any:
        """Return the series of each phase."""
        return self._whole().values()

    def items(self) -> Any:
        """Return the phases with their series."""
        return self._whole().items()

    def __eq__(self, other: object) -> bool:
        return dict.__eq__(self._whole(), other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]  # as of any dict

    def copy(self) -> Any:
        """Return a dict of the phases and their series."""
        return dict(self._whole())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __reversed__(self) -> Iterator[Phase]:
        return reversed(list(self))

    def __repr__(self) -> str:
        return repr(self._whole())


class Marker:
    """Marks the series of one entry of ``cbstate``, for one handler.

    Args:
        tail: Whether the handler runs in another process: of a series it gets the newest values.
    """

    __slots__ = ("_before", "_found", "_maps", "_rewound", "_source", "_tail")

    def __init__(self, tail: bool) -> None:
        self._tail = tail
        self._source: Here | None = None
        self._maps: list[Any] = []
        self._found: list[Series] = []
        self._before: Lengths = ()
        self._rewound = 0

    def mark(self, value: PhaseMap[Any]) -> Marked | None:
        """Return the series as they are; ``None`` where something else is in the map."""
        try:
            found = [series for each in value.values() for series in each._series.values()]
            lengths = tuple([len(series._steps) for series in found])
        except AttributeError:
            return None
        source = self._source
        if source is None or not self._knows(value, found):
            source = self._look(value, found)
            if source is None:
                return None
        before = self._before
        self._before = lengths
        return Marked(source, before if self._tail else (), lengths)

    def _knows(self, value: PhaseMap[Any], found: list[Series]) -> bool:
        """Return whether the series are the same as before, in the same places, and have only grown."""
        return (
            found == self._found  # by identity, which is what series compare by
            and [*value, *map(id, value.values())] == self._maps
            and self._rewound == Series.rewound
        )

    def _look(self, value: PhaseMap[Any], found: list[Series]) -> Here | None:
        """Take a new layout; return ``None`` where something is not what it should be."""
        if any(type(each) is not SeriesMap for each in value.values()):
            return None
        if any(type(series) is not Series for series in found):
            return None
        if value.make is not None and type(value.make()) is not SeriesMap:
            return None
        known: dict[int, int] = {}
        if self._rewound == Series.rewound:  # otherwise what was there may be something else now
            known = {id(series): length for series, length in zip(self._found, self._before, strict=False)}
        phases, start = dict[Phase, tuple[str, int, tuple[str, ...]]](), 0
        for phase, each in value.items():
            phases[phase] = each._path, start, tuple(each._series)
            start += len(each)
        make = None if value.make is None else _Empty(value._path)
        self._source = Here(Layout(value._path, make, phases), found, self._tail)
        self._maps = [*value, *map(id, value.values())]
        self._found = found
        self._before = tuple([known.get(id(series), 0) for series in found])
        self._rewound = Series.rewound
        return self._source


class _Empty:
    """Makes the map of a phase that has no series yet; the learner's own function might not travel."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self) -> SeriesMap:
        return SeriesMap(self._path)


class Here:
    """The learner's own series.

    Args:
        layout: Where they are.
        found: The series, in the order of the layout.
        tail: Whether they are shown as another process would show them.
    """

    __slots__ = ("_tail", "found", "layout")

    def __init__(self, layout: Layout, found: list[Series], tail: bool) -> None:
        self.layout = layout
        self.found = found
        self._tail = tail

    def series(self, position: int, before: int, length: int) -> Series:
        """Return what the learner has, up to that length."""
        series = self.found[position]
        if not self._tail:
            return Cut(series, length)
        start = _first(before, length)
        return tail_of(
            series._path, length, start, series._steps[start:length], series.since(start)[: length - start]
        )


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


Packed: TypeAlias = "list[tuple[Layout, list[Column]]]"
"""The series of a batch, as they travel."""


class Packing:
    """Collects the series of a batch of events."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._spans: list[tuple[Here, Lengths, Lengths, Lengths]] = []

    def add(self, marked: Marked) -> tuple[int, Lengths, Lengths]:
        """Return what stands for marked series: the number of their source, and their two lengths."""
        source, before, lengths = marked.source, marked.before, marked.lengths
        place = self._places.get(id(source))
        if place is None:
            assert isinstance(source, Here), "what has travelled does not travel on"
            place = self._places[id(source)] = len(self._spans)
            self._spans.append((source, before, lengths, lengths))
        else:
            known, first_before, first, _ = self._spans[place]
            self._spans[place] = known, first_before, first, lengths  # later events have longer ones
        return place, before, lengths

    def packed(self) -> Packed:
        """Return the series, from the first event on that needs them."""
        done: Packed = []
        for source, before, first, last in self._spans:
            columns = []
            for series, old, length, end in zip(source.found, before, first, last, strict=True):
                start = _first(old, length)
                values = series.since(start)[: end - start]
                columns.append(Column(series._path, start, series._steps[start:end], values))
            done.append((source.layout, columns))
        return done


def unpacked(packed: Packed) -> list[There]:
    """Return the sources that events were packed with, by their numbers."""
    return [There(layout, columns) for layout, columns in packed]


def _first(before: int, length: int) -> int:
    """Return the first position that is kept: since `before`, and the newest one always."""
    return min(before, max(length - 1, 0))
