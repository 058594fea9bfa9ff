"""Namespaces of entries, of which ``cbstate`` is one: each keeps a read-only twin of every entry.

A checkpoint holds the content of a `State`, and fills it again. `make_entries` makes the entries that callbacks declare
to write, and `restore_point` remembers all of them, for a change of the callbacks that may be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flowtrain.callback.access import Path
from flowtrain.callback.phases import Phase
from flowtrain.data.nested import Attribute, is_nested, parts, rebuild, refill
from flowtrain.errors import CheckpointError, MissingStateError, UsageError
from flowtrain.errors.describing import nearest
from flowtrain.state.by_phase import CONTAINERS, CountsMap, PhaseMap
from flowtrain.state.container import Container, Freezer, Tree, changed_items, declared_items
from flowtrain.state.encoding import Packer, in_types_of, unpack
from flowtrain.state.readonly import readonly, refuse
from flowtrain.state.series import Series, SeriesMap

__all__ = ["State", "Twins", "make_entries", "restore_point"]


class _Namespace:
    """The common part of a namespace and its twin: entries that are attributes, and a path for messages."""

    __slots__ = ("__dict__", "_path")

    _path: str

    def __init__(self, path: str) -> None:
        # Not `self._path = path`: the subclasses override assignment for their entries.
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        raise _missing(self._path, name, self)

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        # The names are listed first, since a handler may add an entry while it iterates.
        return iter(list(self.__dict__))

    def __len__(self) -> int:
        return len(self.__dict__)

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self._path,), dict(vars(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._path}: {', '.join(self) or 'empty'})"


class State(Container, _Namespace):
    """A namespace of entries that keeps a read-only twin of each: `cbstate`.

    Entries are attributes. A container among them is filled and never replaced, so that everybody who holds a view of
    it sees the same; only a namespace in a namespace may be replaced.
    """

    __slots__ = ("__saved__", "__twins__")
    __kind__ = "namespace"

    __saved__: dict[str, Any]  # by entry, the state of an object in a checkpoint, until such an object is assigned
    __twins__: Twins

    def __init__(self, path: str) -> None:
        super().__init__(path)
        object.__setattr__(self, "__saved__", {})
        object.__setattr__(self, "__twins__", Twins(path))

    def __setattr__(self, name: str, value: Any) -> None:
        # Views hold the container itself, so nothing that is written into a new container would be seen through them.
        old = self.__dict__.get(name)
        if isinstance(old, Container) and not isinstance(old, State) and old is not value:
            raise UsageError(
                f"{self._path}.{name} is a {type(old).__name__} and is filled, never replaced: others hold it. "
                f"Write into it, as {self._path}.{name}[phase] = ... or .push(...)."
            )
        if name in self.__saved__ and value is not None:
            saved = self.__saved__.pop(name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(saved)
        self.__dict__[name] = value
        # The twin is made here and not at each reading, so that all readers of the entry have the same one.
        self.__twins__.__dict__[name] = readonly(value, f"{self._path}.{name}")

    def __twin__(self) -> Twins:
        return self.__twins__

    def __detached__(self, detach: Callable[[Any], Any]) -> State:
        changes = changed_items(vars(self).items(), detach)
        return _namespace(self._path, {**vars(self), **changes}) if changes else self

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> State:
        own = vars(self)
        declared = declared_items(list(own), inside)
        parts = {name: freezer.part(own[name], below, Attribute(name)) for name, below in declared}
        return _namespace(self._path, parts)

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        saved = {name: {"object": packer.copy(state, f"{path}.{name}")} for name, state in self.__saved__.items()}
        return {name: packer.pack(item, f"{path}.{name}") for name, item in vars(self).items()} | saved

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        self.__saved__.clear()
        for name in [name for name in self if name not in content]:
            delattr(self, name)
        for name, packed in content.items():
            self.__put__(name, packed, phases)

    def __put__(self, name: str, packed: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        """Put one entry back as `Packer.pack` found it; a container is filled in place, because views hold it.

        Args:
            name: The entry.
            packed: A result of `Packer.pack` that nobody else holds.
            phases: Phases by name, for those that the learner has data for.

        Raises:
            CheckpointError: The entry is of one kind here and of another one in the checkpoint.
        """
        [(kind, content)] = packed.items()
        # A callback that this learner does not have may have made the container in the run that was saved. It is made
        # here before it is filled: other callbacks may read it, and only a container fills those within it.
        if vars(self).get(name) is None:
            made = _empty(kind, content, f"{self._path}.{name}")
            if made is not None:
                setattr(self, name, made)
        there = vars(self).get(name)
        self.__saved__.pop(name, None)
        if unpack(there, kind, content, phases):
            return
        if (isinstance(there, Container) and not isinstance(there, State)) or hasattr(there, "load_state_dict"):
            raise CheckpointError(
                f"{self._path}.{name} is a {type(there).__name__} in this learner, and in the checkpoint of the kind "
                f"{kind!r}. Load the checkpoint with the callbacks that it was written with, or give the entry another "
                f"name."
            )
        if kind == "object":  # a handler makes the object later, or it is that of a callback that the learner lacks
            self.__saved__[name] = content
        else:
            setattr(self, name, in_types_of(there, content))

    def __mark__(self) -> dict[str, Any]:
        return {**vars(self), "": dict(self.__saved__)}  # no entry has an empty name

    def __rewind__(self, mark: Mapping[str, Any]) -> None:
        # The twins are cleared too, because those of entries that were added since the mark must be gone.
        for each in (vars(self), vars(self.__twins__), self.__saved__):
            each.clear()
        self.__setstate__({name: item for name, item in mark.items() if name})
        self.__saved__.update(mark.get("", {}))

    def __leaves__(self, fingerprint: Callable[[Any], object]) -> Iterator[tuple[Path, object]]:
        for name, item in vars(self).items():
            if isinstance(item, Container):
                for path, leaf in item.__leaves__(fingerprint):
                    yield (name, *path), leaf
            else:
                yield (name,), fingerprint(item)

    def __setstate__(self, entries: Mapping[str, Any]) -> None:
        for name, item in entries.items():
            setattr(self, name, item)

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise _missing(self._path, name, self)
        del self.__dict__[name]
        del self.__twins__.__dict__[name]


class Twins(_Namespace):
    """The read-only side of a `State`: the same entries as attributes, none of which can be assigned."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise refuse(f"{self._path}.{name}")

    def __delattr__(self, name: str) -> None:
        raise refuse(f"{self._path}.{name}")


def _namespace(path: str, entries: Mapping[str, Any]) -> State:
    made = State(path)
    made.__setstate__(entries)
    return made


def _missing(path: str, name: str, known: Any) -> MissingStateError:
    # `copy` and `pickle` ask for methods with such names, and do without them only after an AttributeError.
    if name.startswith("__"):
        raise AttributeError(name)
    return MissingStateError(
        f"{path}.{name}",
        f"{path}.{name} does not exist (yet). {path} has: {', '.join(known) or 'nothing'}.{nearest(name, known)}",
    )


def _empty(kind: str, content: Any, path: str) -> Container | None:
    """Return an empty container for packed content, or ``None`` if content of this kind is in no container."""
    if kind == PhaseMap.__kind__:
        inside = {each for packed in content.values() for each in packed}
        make = _MAKERS.get(inside.pop()) if len(inside) == 1 else None
        made: PhaseMap[Any] = PhaseMap(path, make=None if make is None else partial(make, path))
        return made
    make = _MAKERS.get(kind)
    return None if make is None else make(path)


_MAKERS: dict[str, Callable[[str], Container]] = {each.__kind__: each for each in (State, Series, SeriesMap, CountsMap)}


def make_entries(cbstate: State, written: Sequence[Path], *, late: bool) -> None:
    """Make the entries of ``cbstate`` that callbacks declare to write and that the learner makes for them.

    These are the containers of the bundled callbacks with the declared series in them, and a namespace for each further
    entry of which callbacks declare only parts.

    Args:
        cbstate: The state in which the entries are made.
        written: The paths below ``cbstate`` that callbacks declare to write.
        late: Whether values of the device are read late, so that series keep them there.
    """
    whole = {path[1] for path in written if len(path) == 2}  # entries that the `setup` of their writers makes
    for path in written:
        if len(path) == 1 or path[1] in cbstate:
            continue
        name = path[1]
        if name in CONTAINERS:
            setattr(cbstate, name, CONTAINERS[name](f"cbstate.{name}", late))
        elif name not in whole:
            setattr(cbstate, name, State(f"cbstate.{name}"))
    for path in written:
        if len(path) > 2 and isinstance(cbstate.__dict__.get(path[1]), SeriesMap):
            cbstate.__dict__[path[1]].series(".".join(path[2:]))


def restore_point(state: State) -> Callable[[], None]:
    """Remember the entries of `state` and the content of its containers; the function returned puts all of it back.

    Containers (flowtrain's own, and those of `flowtrain.data.nested`) are restored in place, because views hold
    them. Other values are put back by reference.
    """
    marks: dict[int, tuple[Any, Any]] = {}
    _remember(state, marks)

    def restore() -> None:
        """Put everything back, the namespaces last, because they make twins of their entries."""
        # A container is marked before its parts, so in reverse the parts are put back before the container.
        for value, mark in reversed(marks.values()):
            _rewind(value, mark)

    return restore


def _remember(value: Any, marks: dict[int, tuple[Any, Any]]) -> None:
    """Record a container and the containers in it, each with a mark from which `_rewind` restores it.

    The mark is the result of ``__mark__``; for one of Python's containers, a shallow copy.
    """
    if id(value) in marks:
        return
    if isinstance(value, Container):
        mark = value.__mark__()
        # A mark that is no dict says that no item is a container, as in a series.
        inner = list(mark.values()) if isinstance(mark, dict) else []
    elif is_nested(type(value)):
        mark = rebuild(value, lambda part, where: part, {})  # a shallow copy, made without a constructor
        inner = [part for _, part in parts(value) or ()]
    else:
        return
    marks[id(value)] = value, mark
    for item in inner:
        _remember(item, marks)


def _rewind(value: Any, mark: Any) -> None:
    if isinstance(value, Container):
        value.__rewind__(mark)
    else:
        refill(value, mark)
