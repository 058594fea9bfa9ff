# pyright: reportPrivateUsage=false
# The lists of a series are read where they are: a mark is a view of them.
"""Marks: how long each series was, which is all that a snapshot of series needs while it waits.

Series only grow, so what was in them at an event is known from their lengths. A `Marker` notes these for all series of
a map by phase; what the handler sees is made from them when it is looked at, of the phases and names that it looks at.
That is `flowtrain_dask.snapshots.series` without the work for series that nobody reads. Where the values themselves are
read from is a source's business (`flowtrain_dask.snapshots.sources`).

On the way to another process the events of a whole batch share their sources: `Packing` collects these, `Packed` is
what the other side makes the events of.

Where values of a device are read late (``TorchCore(lag=...)``), series are not marked but copied, as all else is
(`flowtrain_dask.snapshots.copying`): such a value is to be on its way before somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from flowtrain.callback.phases import Phase
from flowtrain.state.by_phase import PhaseMap, ReadOnlyPhaseMap, as_phase
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask.snapshots.sources import Column, Here, Layout, Lengths, Source, There

__all__ = ["Lengths", "Marked", "Marker", "Packed", "Packing", "unpacked"]


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
        made.__rewind__({name: read(at, before[at], self.lengths[at]) for at, name in enumerate(names, start)})
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
        return [(source.layout, source.columns(before, first, last)) for source, before, first, last in self._spans]


def unpacked(packed: Packed) -> list[There]:
    """Return the sources that events were packed with, by their numbers."""
    return [There(layout, columns) for layout, columns in packed]
