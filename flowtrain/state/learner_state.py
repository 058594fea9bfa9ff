"""The learner's state: what handlers see, and nothing else.

`LearnerState` is a plain object that the learner, the loop, the core and the compiled views share. It holds no
behaviour. What can change between two reads of a handler is replaced as a whole (`batch`), what is shared by
callbacks keeps a read-only twin beside it (`State`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from flowtrain.errors import MissingStateError, UsageError, nearest
from flowtrain.state.batch import BatchState, ReadOnlyBatch
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.random_numbers import Draws
from flowtrain.state.readonly import readonly, refuse
from flowtrain.state.series import Series, SeriesMap

__all__ = ["LearnerState", "Named", "State", "Twins", "restore_point"]


class State:
    """A namespace of entries that keeps a read-only twin of each: `cbstate`.

    Entries are attributes. A `PhaseMap`, `SeriesMap` or `Series` is filled, never replaced, so that everybody who
    holds a view of it sees the same.
    """

    __slots__ = ("__dict__", "__twins__", "_path")

    _path: str
    __twins__: Twins

    def __init__(self, path: str) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "__twins__", Twins(path))

    def __getattr__(self, name: str) -> Any:
        raise _missing(self._path, name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get(name)
        if isinstance(old, (PhaseMap, SeriesMap, Series)) and old is not value:
            raise UsageError(
                f"{self._path}.{name} is a {type(old).__name__} and is filled, never replaced: others hold it. "
                f"Write into it, as {self._path}.{name}[phase] = ... or .push(...)."
            )
        self.__dict__[name] = value
        self.__twins__.__dict__[name] = readonly(value, f"{self._path}.{name}")

    def __twin__(self) -> Twins:
        return self.__twins__

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise _missing(self._path, name, self)
        del self.__dict__[name]
        del self.__twins__.__dict__[name]

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.__dict__))

    def __len__(self) -> int:
        return len(self.__dict__)

    def __repr__(self) -> str:
        return f"State({self._path}: {', '.join(self) or 'empty'})"


class Twins:
    """The read-only side of a `State`: the same entries as attributes, none of which can be assigned."""

    __slots__ = ("__dict__", "_path")

    _path: str

    def __init__(self, path: str) -> None:
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        raise _missing(self._path, name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise refuse(f"{self._path}.{name}")

    def __delattr__(self, name: str) -> None:
        raise refuse(f"{self._path}.{name}")

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.__dict__))

    def __len__(self) -> int:
        return len(self.__dict__)

    def __repr__(self) -> str:
        return f"Twins({self._path}: {', '.join(self) or 'empty'})"


def _missing(path: str, name: str, known: Any) -> MissingStateError:
    if name.startswith("__"):
        raise AttributeError(name)
    return MissingStateError(
        f"{path}.{name}",
        f"{path}.{name} does not exist (yet). {path} has: {', '.join(known) or 'nothing'}.{nearest(name, known)}",
    )


class Named(Mapping[str, Any]):
    """Several models or optimizers by name: ``learner.model.gen`` and ``learner.model["gen"]`` are the same."""

    def __init__(self, what: str, members: Mapping[str, Any]) -> None:
        self.__dict__.update(members)
        self.__dict__["_what"] = what
        self.__dict__["_members"] = dict(members)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._members[name]
        except KeyError:
            raise KeyError(self._unknown(name)) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(self._unknown(name))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._what}.{name} cannot be replaced; pass the {self._what}s to Learner.")

    @cached_property
    def __twins__(self) -> Named:
        return Named(self._what, {name: readonly(each, f"{self._what}.{name}") for name, each in self.items()})

    def _unknown(self, name: str) -> str:
        return (
            f"there is no {self._what} {name!r}; the learner has: {', '.join(self._members)}."
            f"{nearest(name, self._members)}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Named({self._what}: {', '.join(self._members)})"


class LearnerState:
    """What a learner trains and what its handlers can be given.

    Attributes:
        model: The user's module, or a `Named` of several.
        lossfn: The loss function, a callable or module.
        optimizer: The user's optimizer, or a `Named` of several.
        optimizers: The same as handlers see it, with ``hyperparams`` and ``state`` apart.
        data: Loaders by phase.
        params: Parameters by name, read-only as a mapping.
        batch: The current batch.
        batch_twin: What handlers with `Read` see of it; the batch itself while it holds only tensors.
        cbstate: What callbacks share.
        callbacks: The learner's callbacks.
        draws: The seeds of the random numbers that deferrable callbacks draw.
        fired: Events that handlers of the current event asked to fire next, each with the name of who asked.
        updates: How many updates of optimizers the learner has made.
        lag: After how many batches a value of the device is read; 0 where reading does not wait.
    """

    __slots__ = (
        "batch",
        "batch_twin",
        "callbacks",
        "cbstate",
        "data",
        "draws",
        "fired",
        "lag",
        "lossfn",
        "model",
        "optimizer",
        "optimizers",
        "params",
        "requests",
        "updates",
    )

    def __init__(self) -> None:
        self.model: Any = None
        self.lossfn: Any = None
        self.optimizer: Any = None
        self.optimizers: Any = None
        self.data: PhaseMap[Any] = PhaseMap("data")
        self.params: Mapping[str, Any] = {}
        self.batch: BatchState = BatchState()
        self.batch_twin: BatchState | ReadOnlyBatch = self.batch
        self.cbstate = State("cbstate")
        self.callbacks: Any = ()
        self.draws = Draws()
        self.fired: list[tuple[str, Any]] = []
        self.requests: list[tuple[str, Any]] = []
        self.lag = 0
        self.updates = 0

    def moved(self) -> LearnerState:
        """Return another state with all that this one holds; nothing is left in this one.

        Views, plans and executors hold this one in circles. What a closed learner holds goes with it at once, without
        the garbage collector, because none of it is in a circle any more.
        """
        other = LearnerState()
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        self.__init__()  # type: ignore[misc]  # empty, as it was made
        return other

    def show(self, batch: BatchState) -> None:
        """Make `batch` the current one, with a twin for what it may come to hold."""
        self.batch = batch
        self.batch_twin = ReadOnlyBatch(batch)


def restore_point(state: State) -> Callable[[], None]:
    """Remember the entries of `state` and what its containers hold; the function returned puts all of it back.

    Containers (lists, dicts, sets, maps and series) are restored in place, because views hold them. Other values are
    put back by reference.
    """
    contents: dict[int, tuple[Any, Any]] = {}
    entries = dict(state.__dict__)
    for value in entries.values():
        _remember(value, contents)

    def restore() -> None:
        """Put everything back."""
        for value, content in contents.values():
            _refill(value, content)
        _refill(state, entries)

    return restore


def _remember(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Keep what a container holds, and what is in it."""
    if id(value) in contents:
        return
    if isinstance(value, (dict, list, set, deque)):
        contents[id(value)] = (value, dict(dict.items(value)) if isinstance(value, dict) else list(value))
        for inner in value.values() if isinstance(value, dict) else value:
            _remember(inner, contents)
    elif isinstance(value, tuple):
        for inner in value:
            _remember(inner, contents)
    elif isinstance(value, State):
        contents[id(value)] = (value, dict(value.__dict__))
        for inner in value.__dict__.values():
            _remember(inner, contents)
    elif isinstance(value, SeriesMap):
        contents[id(value)] = (value, value.snapshot())
        for series in value.values():
            _remember(series, contents)
    elif isinstance(value, Series):
        contents[id(value)] = (value, len(value))


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, Series):
        value.restore(content)
    elif isinstance(value, State):
        value.__dict__.clear()
        value.__twins__.__dict__.clear()
        for name, item in content.items():
            setattr(value, name, item)
    elif isinstance(value, SeriesMap):
        value.restore(content)
    elif isinstance(value, PhaseMap):
        for phase in list(value):
            del value[phase]
        for phase, item in content.items():
            value[phase] = item
    elif isinstance(value, list):
        value[:] = content
    elif isinstance(value, deque):
        value.clear()
        value.extend(content)
    else:
        value.clear()
        value.update(content)
