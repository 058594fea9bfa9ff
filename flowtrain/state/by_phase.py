"""A value for each phase, and the counters of training, which are kept that way.

The entries of ``cbstate`` that the learner makes: series by name and by phase, and the counters of training.

======================  =======================================  =====================================
entry                   type                                     written by
======================  =======================================  =====================================
``history``             `PhaseMap` of `Counts`                   `Recorder`
``metrics_step``        `PhaseMap` of `SeriesMap`                `Metrics`, for each batch
``metrics_epoch``       `PhaseMap` of `SeriesMap`                `Metrics`, for each epoch
``tracehistory``        `PhaseMap` of `SeriesMap`                `Traces`
``smooth_loss``         `PhaseMap` of `Series`                   `SmoothLoss`
``hyperparams``         `SeriesMap`                              `Scheduler`
======================  =======================================  =====================================

The learner makes these containers (`CONTAINERS`) when a callback declares to write into them. They are never replaced,
only filled. A series only grows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from flowtrain.callback.access import Path
from flowtrain.callback.phases import AbstractTrainingPhase, Phase, as_phase
from flowtrain.data.nested import Attribute
from flowtrain.state.container import Container, Freezer, Tree, changed_items
from flowtrain.state.encoding import Packer, in_types_of, phase_of, unpack
from flowtrain.state.readonly import itself, readonly, refuse
from flowtrain.state.series import Series, SeriesMap

__all__ = [
    "CONTAINERS",
    "Counts",
    "CountsMap",
    "PhaseMap",
    "ReadOnlyPhaseMap",
    "adopt",
    "epoch_of",
    "kind_of_series",
    "phase_key",
]

V = TypeVar("V")


class Counts(tuple[int, int, int, int]):
    """How far training in one phase is. Immutable: a new one replaces the old.

    Built from one tuple, ``Counts((epochs, steps, steps_epoch, updates))``.
    """

    __slots__ = ()

    epochs = property(itemgetter(0), doc="Epochs that ended normally.")
    steps = property(itemgetter(1), doc="Batches that were completed.")
    steps_epoch = property(itemgetter(2), doc="Batches completed in the current epoch, or in the last one.")
    updates = property(itemgetter(3), doc="Updates of an optimizer, as of the last batch that ended.")

    def __repr__(self) -> str:
        return f"Counts(epochs={self[0]}, steps={self[1]}, steps_epoch={self[2]}, updates={self[3]})"


_NONE = Counts((0, 0, 0, 0))


class PhaseMap(Container, dict[Phase, V]):
    """A value for each phase. The phase itself and its type are the same key.

    Args:
        path: Where it lives, for messages.
        make: Makes the value for a phase that is met for the first time; without it such a phase is a `KeyError`.
            Kept as an attribute.

    >>> from flowtrain.callback.phases import TrainingPhase
    >>> seen = PhaseMap("cbstate.seen", make=lambda: 0)
    >>> seen[TrainingPhase] += 1
    >>> seen[TrainingPhase()]
    1
    """

    __kind__ = "by phase"

    def __init__(self, path: str, make: Callable[[], V] | None = None) -> None:
        super().__init__()
        self._path = path
        self.make = make
        self._twins: Callable[[], ReadOnlyPhaseMap[V] | None] = _nothing  # a weak reference: the twin holds the map
        self._awaited: dict[Phase, V] = {}  # values that readers hold for phases that nobody has written yet

    if TYPE_CHECKING:

        def __getitem__(self, phase: Phase | type[Phase], /) -> V: ...

    def __missing__(self, phase: Phase | type[Phase]) -> V:
        # Python calls this for a key that is not in the dict: a phase type, or a phase that is met for the first time.
        key = phase_key(phase, self._path)
        if key not in self:
            if self.make is None:
                known = ", ".join(repr(known) for known in self) or "none yet"
                raise KeyError(
                    f"{self._path} has nothing for {key!r}; it has: {known}. "
                    f"Where an entry may be missing, write .get({key!r})."
                )
            self[key] = self._awaited[key] if key in self._awaited else self.make()
        return dict.__getitem__(self, key)

    def awaited(self, key: Phase) -> V:
        """Return the value that a missing phase will have. Reading does not add it to the map: others would see it."""
        if self.make is None:
            return self[key]
        if key not in self._awaited:
            self._awaited[key] = self.make()
        return self._awaited[key]

    def __setitem__(self, phase: Phase | type[Phase], value: V) -> None:
        key = phase_key(phase, self._path)
        self._awaited.pop(key, None)
        dict.__setitem__(self, key, value)
        twin = self._twins()
        if twin is not None:
            dict.__setitem__(twin, key, readonly(value, self._path))

    def __delitem__(self, phase: Phase | type[Phase]) -> None:
        key = phase_key(phase, self._path)
        dict.__delitem__(self, key)
        twin = self._twins()
        if twin is not None:
            dict.pop(twin, key, None)

    def __contains__(self, phase: object) -> bool:
        return dict.__contains__(self, as_phase(phase))

    def get(self, phase: Any, default: Any = None) -> Any:
        """Return the value for a phase or phase type, or the default; nothing is made."""
        if phase in self:
            return self[phase]
        return default

    def pop(self, phase: Any, *default: Any) -> Any:
        """Remove a phase and return its value, or the default."""
        if phase not in self and default:
            return default[0]
        value = self[phase]
        del self[phase]
        return value

    # The methods of dict would write past `__setitem__`.
    clear: Any = MutableMapping.clear
    popitem: Any = MutableMapping.popitem
    setdefault: Any = MutableMapping.setdefault
    update: Any = MutableMapping.update

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]  # a dict's takes no phase types
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy gets readers, and so a twin, of its own.
        own = ("_awaited", "_path", "_twins", "make")
        rest = {name: value for name, value in vars(self).items() if name not in own}
        return type(self), (self._path, self.make), rest, None, iter(self.items())

    def __twin__(self) -> Mapping[Phase, V]:
        # One twin for all readers: writing keeps it up to date, so that reading by phase is a plain dict lookup.
        twin = self._twins()
        if twin is None:
            twin = ReadOnlyPhaseMap(self)
            self._twins = weakref.ref(twin)
        return twin

    def __detached__(self, detach: Callable[[Any], Any]) -> PhaseMap[V]:
        changes = changed_items(self.items(), detach)
        if not changes:
            return self
        made = PhaseMap(self._path, self.make)
        made.update({**self, **changes})
        return made

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> PhaseMap[V]:
        make = None
        if self.make is not None:  # the function itself might not pickle, or look at training
            new: Any = self.make()  # a freezer that remembers the series it has copied need not remember a new one
            frozen = isinstance(new, Container)
            make = partial(itself, new.__frozen__(freezer) if frozen else freezer.part(new, None, Attribute("make()")))
        made: PhaseMap[V] = PhaseMap(self._path, make)
        for phase in list(self):
            made[phase] = freezer.part(self[phase], inside, phase)
        return made

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        return {repr(phase): packer.pack(item, f"{path}[{phase!r}]") for phase, item in self.items()}

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        for phase, item in list(self.items()):
            if repr(phase) in content:
                continue
            if isinstance(item, Container):
                item.__fill__({}, phases)  # emptied, not dropped: views hold it
            else:
                del self[phase]
        for name, packed in content.items():
            phase = phase_of(name, phases)
            [(kind, inside)] = packed.items()
            # A container is filled into the value that `make` gives, which has the right type. A plain value replaces
            # the present one, so none is made for it.
            there = self.get(phase) if kind == "value" or self.make is None else self[phase]
            if not unpack(there, kind, inside, phases):
                self[phase] = in_types_of(there, inside)

    def __mark__(self) -> dict[Phase, V]:
        return dict(self.items())

    def __rewind__(self, mark: Mapping[Phase, V]) -> None:
        self.clear()
        self.update(mark)

    def __leaves__(self, fingerprint: Callable[[Any], object]) -> Iterator[tuple[Path, object]]:
        # A value that a lookup alone has made is no change, so it is left out as long as it equals a new one.
        new = None if self.make is None else fingerprint(self.make())
        for phase, item in sorted(self.items(), key=lambda pair: repr(pair[0])):
            if isinstance(item, Container):
                for path, leaf in item.__leaves__(fingerprint):
                    yield path, (repr(phase), leaf)
            elif (found := fingerprint(item)) != new:
                yield (), (repr(phase), found)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._path}: {dict.__repr__(self)}>"


class CountsMap(PhaseMap[Counts]):
    """`Counts` for each phase. They are immutable, so the twin is a plain proxy and writing is a plain dict write.

    Phases are the keys; a phase type works for reading.
    """

    __kind__ = "counts"

    # The slots of dict itself: a write makes no Python call. The twin is a proxy, so it needs no update.
    __setitem__ = dict.__setitem__  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # C slots
    __delitem__ = dict.__delitem__  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # C slots

    def __init__(self, path: str) -> None:
        super().__init__(path, lambda: _NONE)

    def __missing__(self, phase: Phase | type[Phase]) -> Counts:
        return dict.get(self, phase_key(phase, self._path), _NONE)

    def __reduce__(self) -> tuple[Any, ...]:
        return CountsMap, (self._path,), None, None, iter(self.items())

    def __twin__(self) -> Mapping[Phase, Counts]:
        return MappingProxyType(self)

    __detached__ = Container.__detached__

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> CountsMap:
        made = CountsMap(self._path)
        dict.update(made, self)
        return made

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        return {repr(phase): tuple(counts) for phase, counts in self.items()}

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        self.__rewind__({phase_of(name, phases): Counts(counts) for name, counts in content.items()})


def epoch_of(history: Mapping[Phase, Counts], phase: Phase) -> int:
    """Return the number of the epoch that has just ended in a phase: the training epoch that its results belong to.

    A training epoch has its own number, from 1. An evaluation has that of the training epoch after which it ran, 0
    before the first: so evaluations that are made before, between or beside fits do not shift those that come later.

    Args:
        history: ``cbstate.history``, in which the epoch is counted already.
        phase: The phase.

    >>> from flowtrain.callback.phases import TrainingPhase, ValidationPhase
    >>> history = CountsMap("cbstate.history")
    >>> history[TrainingPhase()], history[ValidationPhase()] = Counts((3, 48, 16, 48)), Counts((5, 20, 4, 0))
    >>> epoch_of(history, ValidationPhase())
    3
    """
    trained = {
        other: counts.epochs
        for other, counts in history.items()
        if isinstance(other, AbstractTrainingPhase) or counts.updates  # a phase of one's own may train as well
    }
    return trained[phase] if phase in trained else max(trained.values(), default=0)


class ReadOnlyPhaseMap(PhaseMap[V]):
    """The twin of a `PhaseMap`; its values are twins as well."""

    def __init__(self, original: PhaseMap[V]) -> None:
        super().__init__(original._path)
        self._original = original
        for phase, value in original.items():
            dict.__setitem__(self, phase, readonly(value, self._path))

    def __missing__(self, phase: Phase | type[Phase]) -> V:
        key = phase_key(phase, self._path)
        if key not in self._original:
            return cast(V, readonly(self._original.awaited(key), self._path))
        if not dict.__contains__(self, key):
            dict.__setitem__(self, key, readonly(self._original[key], self._path))
        return dict.__getitem__(self, key)

    def __contains__(self, phase: object) -> bool:
        return phase in self._original

    def __iter__(self) -> Iterator[Phase]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)

    def __twin__(self) -> ReadOnlyPhaseMap[V]:
        return self

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return itself, (self._original,)  # a deep copy of a twin is one of the container

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        raise refuse(self._path)

    __setitem__ = __delitem__ = __ior__ = _refused
    pop = popitem = clear = update = setdefault = _refused  # pyright: ignore[reportAssignmentType]  # they only refuse


def _nothing() -> None:
    return None


def phase_key(key: object, path: str) -> Phase:
    """Return the phase of a key: the key itself, or the phase of that type.

    Raises:
        KeyError: The key is neither a phase nor a type of one.
    """
    phase = as_phase(key)
    if phase is None:
        raise KeyError(
            f"{path} is kept by phase, and {key!r} is not one. Write {path}[phase] or {path}[TrainingPhase]."
        )
    return phase


def adopt(phase: Phase, entries: dict[Phase, Any]) -> None:
    """Let a phase have the entry that another phase of its name has, at the same place in the order.

    Two phases have one name if a cell of a notebook that defines the class ran twice, or if a checkpoint was loaded
    when another class of that name was defined. Logs, conditions and checkpoints know a phase by its name, so the
    entries continue with the values of the earlier one.

    Args:
        phase: The phase that runs from now on.
        entries: Values by phase. A phase of the name is left alone if `phase` has an entry already.
    """
    name = type(phase).__name__
    old = next((each for each in entries if each is not phase and type(each).__name__ == name), None)
    if old is None or phase in entries:
        return
    items = [(phase if each is old else each, value) for each, value in entries.items()]
    entries.clear()
    entries.update(items)
    Series.rewound += 1


def kind_of_series(value: object) -> type[Series] | type[SeriesMap] | None:
    """Return `Series` or `SeriesMap` for one of them, and for a map that has one for each phase; else ``None``."""
    if isinstance(value, PhaseMap):
        value = value.make() if value.make is not None else next(iter(value.values()), None)
    return Series if isinstance(value, Series) else SeriesMap if isinstance(value, SeriesMap) else None


def _by_phase(path: str, late: bool = False) -> PhaseMap[SeriesMap]:
    return PhaseMap(path, partial(SeriesMap, path, late))


def _smooth_loss(path: str, late: bool = False) -> PhaseMap[Series]:
    return PhaseMap(path, partial(Series, path, late))


def _history(path: str, late: bool = False) -> CountsMap:
    return CountsMap(path)


CONTAINERS: Mapping[str, Callable[..., Any]] = {
    "history": _history,
    "hyperparams": SeriesMap,
    "metrics_epoch": _by_phase,
    "metrics_step": _by_phase,
    "smooth_loss": _smooth_loss,
    "tracehistory": _by_phase,
}
"""Functions that make the entries of ``cbstate``, by name. They take the path of the entry, and whether tensors on the
CPU are to be treated as those of a device (`flowtrain.state.device_values`)."""
