# pyright: reportPrivateUsage=false
# A cut reads the private lists of its series.
"""Snapshots of series. Nothing is copied: the lists of a series grow, so their length tells which values it had.

A writer that drops the oldest values of its series gives the series new lists; snapshots keep the earlier ones.

A snapshot of a series is a `Cut`: the first values of the learner's series. A snapshot of series by name is a `CutMap`:
the series with their lengths, from which it makes a cut when a handler reads one. `CutPhases` has a `CutMap` for each
phase.

A handler in another process gets the tail of a series: its length, its last value, and the values that were added since
the handler's previous event. A pickle of a cut contains only these. The events of a batch contain their lengths, and
share the values of all of them (`Tail`). A `Cutter` makes the cuts for one handler, and remembers the lengths at the
handler's previous event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.device_values import Unread
from flowtrain.state.series import ReadOnlySeries, ReadOnlySeriesMap, Series, SeriesMap

__all__ = ["Cut", "CutMap", "CutPhases", "Cutter", "Tail", "tails_of"]


class Cut(ReadOnlySeries):
    """The first values of a series.

    Args:
        series: The series, which continues to grow.
        length: How many of its values are shown.
        start: For another process, the position of the first value that is shown; the last value is always shown.
            ``None`` shows all values in this process.
        first: The position, in the whole series, of the first value in the lists of `series`.
    """

    __slots__ = ("_first", "_length", "_start", "_tail", *Series.__slots__)

    def __init__(self, series: Series, length: int, start: int | None = None, first: int = 0) -> None:
        # The lists are not copied: training appends to them, and does not change earlier values.
        self._path, self._late, self.dropped = series._path, series._late, series.dropped
        self._steps, self._values = series._steps, series._values
        self._unread, self._packed = series._unread, series._packed
        self._length = length
        self._tail = start is not None
        self._start = 0 if start is None else _start(start, length)
        self._first = first

    @property
    def first(self) -> int:
        """The position of the first value that can be read."""
        return self._start

    def since(self, start: int) -> list[Any]:
        """Return the values from position `start` on, without their steps.

        Raises:
            UsageError: The handler runs in another process, and some of the values are not there.
        """
        first = range(self._length)[start:].start
        if first < self._start:
            self._refuse(f"since({start}) asks for values from position {first} on")
        if self._unread:
            self._unread.read_all(self._values)
        return self._values[first - self._first : self._length - self._first]

    def newest(self) -> Any:
        """Return the newest value."""
        return self.last()[1]

    def last(self) -> tuple[int, Any]:
        """Return the newest ``(step, value)``.

        Raises:
            LookupError: The series is empty.
        """
        if not self._length:
            raise LookupError(f"{self._path} is empty: nothing has been recorded yet. Test len() first.")
        place = self._length - 1 - self._first
        if self._unread:
            self._unread.read_one(self._values, place)
        return self._steps[place], self._values[place]

    def _pair(self, position: int) -> tuple[int, Any]:
        if position < self._start:
            self._refuse(f"position {position} is asked for")
        return self._steps[position - self._first], self.since(position)[0]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if self._tail:
            self._refuse("it is iterated over")
        return zip(self._steps[: self._length], self.since(0), strict=True)

    def __len__(self) -> int:
        return self._length

    def __twin__(self) -> Any:
        return self

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"{self._path}: {what}, but the handler runs in another process, which gets len(), .last() and the values "
            f"since the handler's previous event: those from position {self._start} on. Declare "
            f'{{"{self._path}": Read(full=True)}}, and the callback stays in the process that trains.'
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        steps = self._steps[self._start - self._first : self._length - self._first]
        return _cut, (self._path, self._length, self._tail, steps, self.since(self._start), self.dropped)


class CutMap(ReadOnlySeriesMap):
    """Series by name with their lengths at one event. The `Cut` of a series is made when it is read.

    Args:
        path: The path of the map.
        series: Series with the present lists by name, in a dict that nobody changes.
        lengths: How many values of each series are shown.
        starts: For another process, the position of the first value of each series that is shown; a series without an
            entry is shown from its beginning. ``None`` shows all values in this process.
        firsts: The position, in the whole series, of the first value in the lists of each series; ``None``: they are
            the whole series.
    """

    __slots__ = ("_firsts", "lengths", "starts")

    def __init__(
        self,
        path: str,
        series: dict[str, Series],
        lengths: dict[str, int],
        starts: dict[str, int] | None,
        firsts: Mapping[str, int] | None = None,
    ) -> None:
        self._path, self._late, self._series = path, False, series
        self.lengths = lengths
        self.starts = starts
        self._firsts = firsts

    def __getitem__(self, name: str) -> Cut:
        series, starts, firsts = SeriesMap.__getitem__(self, name), self.starts, self._firsts
        start = None if starts is None else starts.get(name, 0)
        return Cut(series, self.lengths[name], start, 0 if firsts is None else firsts[name])

    def __twin__(self) -> Any:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced({})

    def reduced(self, tails: Mapping[int, Tail]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return how the map is made again from its lengths and a tail; `tails_of` gives those of a batch."""
        return _shown, (tails.get(id(self._series)) or Tail(self, self), self.lengths, self.starts)


class Tail:
    """The values of series by name that the events of a batch show, for another process.

    Args:
        first: The series as the first event shows them.
        last: The same series as the last event shows them.
    """

    __slots__ = ("firsts", "path", "series")

    def __init__(self, first: CutMap, last: CutMap) -> None:
        self.path = first._path
        self.firsts: dict[str, int] = {}
        self.series: dict[str, Series] = {}
        starts, offsets = first.starts or {}, first._firsts or {}
        for name, series in first._series.items():
            start, offset = _start(starts.get(name, 0), first.lengths[name]), offsets.get(name, 0)
            if series._unread:
                series.since(0)  # brings all values to the host that are on a device
            shown = slice(start - offset, last.lengths[name] - offset)
            self.firsts[name] = start
            self.series[name] = _series(series._path, series._steps[shown], series._values[shown], series.dropped)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        lists = {name: (each._path, each._steps, each._values, each.dropped) for name, each in self.series.items()}
        return _tail, (self.path, self.firsts, lists)


def tails_of(snapshots: Iterable[Mapping[Any, Any]]) -> dict[int, Tail]:
    """Return the tails for the maps in some snapshots of one lane, in order, by the id of the dict of their series."""
    spans: dict[int, tuple[CutMap, CutMap]] = {}
    for snapshot in snapshots:
        for value in snapshot.values():
            if type(value) is CutPhases:
                for each in value.maps.values():
                    key = id(each._series)
                    spans[key] = spans[key][0] if key in spans else each, each
    return {key: Tail(first, last) for key, (first, last) in spans.items()}


class CutPhases:
    """A `CutMap` for each phase. A view shows it as a map by phase.

    Args:
        path: The path of the map by phase.
        maps: The series of each phase.
        makes: Whether a phase without series has an empty map.
    """

    __slots__ = ("_makes", "_path", "maps")

    def __init__(self, path: str, maps: dict[Phase, CutMap], makes: bool) -> None:
        self._path = path
        self.maps = maps
        self._makes = makes

    def __twin__(self) -> Any:
        made = PhaseMap[SeriesMap](self._path, partial(SeriesMap, self._path) if self._makes else None)
        dict.update(made, self.maps)
        return made.__twin__()

    def __reduce__(self) -> tuple[type[CutPhases], tuple[Any, ...]]:
        return CutPhases, (self._path, self.maps, self._makes)


class Cutter:
    """Makes the cuts for one handler.

    Args:
        tail: Whether the handler runs in another process.
        late: Whether values on a device are read late (``TorchCore(lag=...)``). For another process they are sent to
            the host when the cut is made, so that no thread of lanes waits for the device.
    """

    def __init__(self, *, tail: bool = False, late: bool = False) -> None:
        self.tail = tail
        self._late = tail and late
        # What was made at the handler's previous event, by the id of the list or dict from which it was made. The list
        # or dict is kept with it, so that no other object gets the id. What this event makes is kept apart until
        # `end_event`, because several paths may lead to one series, and each shows the same values.
        self._before: dict[int, tuple[object, Any]] = {}
        self._made: dict[int, tuple[object, Any]] = {}
        self._rewound = Series.rewound

    def end_event(self) -> None:
        """Take note that the snapshot of an event is complete: the next tails begin where its tails end."""
        self._before.update(self._made)
        self._made.clear()

    def series(self, series: Series) -> Series:
        """Return a series as it is now."""
        length = len(series._steps)
        if not self.tail:
            return Cut(series, length)
        cut = Cut(series, length, self._last(series._steps, 0))
        self._made[id(series._steps)] = series._steps, length
        return _on_its_way(cut) if self._late else cut

    def by_phase(self, maps: PhaseMap[Any]) -> CutPhases | None:
        """Return the series of each phase as they are now.

        ``None`` means that the map must be copied like any container, series by series: it contains other objects, or
        values on a device that must be sent to the host now.
        """
        if self._late:
            return None
        makes = self._last(maps, None)
        if makes is None:
            makes = maps.make is None or type(maps.make()) is SeriesMap
            self._made[id(maps)] = maps, makes
        for each in maps.values() if makes else [None]:
            if type(each) is not SeriesMap:
                return None
        return CutPhases(
            maps._path, {phase: self._by_name(each) for phase, each in maps.items()}, maps.make is not None
        )

    def _by_name(self, series: SeriesMap) -> CutMap:
        live = series._series
        lengths = {name: len(each._steps) for name, each in live.items()}
        last: CutMap | None = self._last(live, None)
        starts = None if not self.tail else {} if last is None else last.lengths
        if last is not None and last.lengths == lengths and last.starts == starts:
            return last  # no series has grown; a batch of events contains the same object only once
        # Series are added to a map and not replaced, but for a rewind, after which `last` is None: equal lengths of the
        # dicts mean equal series.
        found = last._series if last is not None and len(last._series) == len(live) else None
        if found is None:
            found = {name: _sharing(each) for name, each in live.items()}
        made = CutMap(series._path, found, lengths, starts)
        self._made[id(live)] = live, made
        return made

    def _last(self, of: object, none: Any) -> Any:
        """Return what was made from a list or dict at the handler's previous event, or `none`."""
        if self._rewound != Series.rewound:  # series were shortened, as by loading a checkpoint, which the handler saw
            self._before.clear()
            self._rewound = Series.rewound
        known = self._before.get(id(of))
        return none if known is None else known[1]


def _start(start: int, length: int) -> int:
    """Return the first position that is shown of a series of this length: the last value is always shown."""
    return start if start < length else length - 1 if length else 0


def _on_its_way(cut: Cut) -> Cut:
    """Return a cut with lists of its own, whose values on a device are being sent to the host."""
    start, length = cut._start, cut._length
    values = cut._values[start:length]
    if None in values:  # the series itself has sent them, and no longer has the tensors
        values = cut.since(start)
    made = _cut(cut._path, length, True, cut._steps[start:length], values, cut.dropped)
    made._unread = Unread.sent(values)
    return made


def _cut(path: str, length: int, tail: bool, steps: list[int], values: list[Any], dropped: int) -> Cut:
    """Return a cut that has only the steps and values that are shown."""
    first = length - len(steps)
    return Cut(_series(path, steps, values, dropped), length, first if tail else None, first)


def _tail(path: str, firsts: dict[str, int], lists: dict[str, tuple[str, list[int], list[Any], int]]) -> Tail:
    made: Tail = object.__new__(Tail)
    made.path, made.firsts = path, firsts
    made.series = {name: _series(*each) for name, each in lists.items()}
    return made


def _shown(tail: Tail, lengths: dict[str, int], starts: dict[str, int] | None) -> CutMap:
    return CutMap(tail.path, tail.series, lengths, starts, tail.firsts)


def _series(path: str, steps: list[int], values: list[Any], dropped: int) -> Series:
    made = Series(path)
    made._steps, made._values, made.dropped = steps, values, dropped
    return made


def _sharing(series: Series) -> Series:
    """Return a series that keeps the present lists of another one, also when that one gets others."""
    made = _series(series._path, series._steps, series._values, series.dropped)
    made._unread = series._unread
    return made
