"""Read-only twins: a handler that declares to read a container gets its twin.

A twin shows the live container and refuses to change it. Twins are made once, when a container is assigned to the
learner's state, so reading costs no more than an attribute. Nested containers come back as twins too. Tensors, modules
and other objects cannot be protected and are handed out as they are; strict mode watches those.
"""

from __future__ import annotations

from collections import UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType, MethodType
from typing import Any

import torch

from flowtrain.data.nested import PLAIN, is_nested, like
from flowtrain.errors import ProtectedException

__all__ = ["UNPROTECTED", "LatePath", "ReadOnlyDict", "ReadOnlyList", "ReadOnlySet", "itself", "readonly", "refuse"]

UNPROTECTED: frozenset[type] = PLAIN | {torch.Tensor, torch.nn.Parameter, frozenset}
"""Types whose twin is the value itself; tested by exact type, which is quick."""

_CHANGES = frozenset(
    (
        "append",
        "appendleft",
        "add",
        "clear",
        "discard",
        "extend",
        "extendleft",
        "insert",
        "move_to_end",
        "pop",
        "popitem",
        "popleft",
        "remove",
        "reverse",
        "rotate",
        "setdefault",
        "sort",
        "subtract",
        "update",
        "difference_update",
        "intersection_update",
        "symmetric_difference_update",
    )
)


class LatePath(str):
    """The path of a value that a handler writes with a lag, so that it is replaced and not changed in place."""

    __slots__ = ()


def refuse(path: str) -> ProtectedException:
    """Make the exception for a change to the container at `path` through a twin."""
    if isinstance(path, LatePath):
        return ProtectedException(
            "Write", path, f"It is written with a lag, so the value that is there stays. Assign a new one: {path} = ..."
        )
    return ProtectedException(
        "Write", path, f'The container was read under Read(). To change it declare {{"{path}": Write()}}.'
    )


class _Twin:
    """The common part of the twins: the container, its path, and methods that refuse every way to change it."""

    __slots__ = ("_container", "_path")

    _container: Any
    _path: str

    def __init__(self, container: Any, path: str) -> None:
        object.__setattr__(self, "_container", container)
        object.__setattr__(self, "_path", path)

    def __len__(self) -> int:
        return len(self._container)

    def __contains__(self, item: object) -> bool:
        return item in self._container

    def __eq__(self, other: object) -> bool:
        return bool(self._container == (other._container if isinstance(other, _Twin) else other))

    __hash__ = None  # type: ignore[assignment]  # like the containers themselves

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._container!r})"

    def __getattr__(self, name: str) -> Any:
        # Subclasses of the built-in containers have attributes of their own (a model output's .logits).
        if name in _CHANGES:
            raise refuse(self._path)
        value = getattr(self._container, name)
        if isinstance(value, MethodType) and value.__self__ is self._container:
            # A method that is written in Python gets the twin, so that what it changes is refused as well.
            return MethodType(value.__func__, self)
        return readonly(value, self._path)

    def __setattr__(self, name: str, value: Any) -> None:
        raise refuse(self._path)

    def __delattr__(self, name: str) -> None:
        raise refuse(self._path)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise refuse(self._path)

    def __delitem__(self, key: Any) -> None:
        raise refuse(self._path)

    def __iadd__(self, other: Any) -> Any:
        raise refuse(self._path)

    __imul__ = __ior__ = __iand__ = __isub__ = __ixor__ = __iadd__

    def __copy__(self) -> Any:
        return self.copy()

    def copy(self) -> Any:
        """Return a copy that may be changed; containers nested in it are still shown by twins."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        # Deep copies and pickles give the container: nobody else sees the copy, so it needs no protection.
        return itself, (self._container,)


class ReadOnlyList(_Twin, Sequence[Any]):
    """The twin of a list or deque. Where a list itself is needed, as by `json.dumps`, write ``list(twin)``."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        return readonly(self._container[index], self._path)

    def __iter__(self) -> Iterator[Any]:
        return (readonly(item, self._path) for item in self._container)

    def __add__(self, other: Iterable[Any]) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Any]) -> list[Any]:
        return [*other, *self]

    def __mul__(self, number: int) -> list[Any]:
        return list(self) * number

    __rmul__ = __mul__

    def copy(self) -> list[Any]:
        """Return a list of the items."""
        return list(self)


class ReadOnlyDict(_Twin, Mapping[Any, Any]):
    """The twin of a dict, of a subclass of dict with attributes of its own, or of a view of a dict."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        container = self._container
        if isinstance(container, defaultdict) and key not in container and container.default_factory is not None:
            return readonly(container.default_factory(), self._path)  # shown, not entered: reading changes nothing
        return readonly(container[key], self._path)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value for a key, or the default."""
        return self[key] if key in self._container else default

    def __iter__(self) -> Iterator[Any]:
        return iter(self._container)

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**other, **self}

    def copy(self) -> dict[Any, Any]:
        """Return a dict of the items."""
        return dict(self)


class ReadOnlySet(_Twin, Set[Any]):
    """The twin of a set."""

    __slots__ = ()

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:
        return frozenset(it)  # the result of `&` and `|` is new, so it needs no protection

    def __iter__(self) -> Iterator[Any]:
        return iter(self._container)

    def copy(self) -> set[Any]:
        """Return a set of the items."""
        return set(self)


def itself(value: Any) -> Any:
    """Return the value: a twin is pickled and deeply copied as ``itself(container)``."""
    return value


_TWINS: tuple[tuple[type | tuple[type, ...], Callable[[Any, str], Any]], ...] = (
    ((dict, UserDict, MappingProxyType), ReadOnlyDict),
    ((list, deque, UserList), ReadOnlyList),
    (set, ReadOnlySet),
)


def readonly(value: Any, path: str) -> Any:
    """Return the read-only twin of a value, or the value itself where there is nothing to protect.

    Args:
        value: A value of the learner's state.
        path: Its path, dotted, for the message when somebody tries to change it.

    >>> readonly([1, 2], "cbstate.seen")
    ReadOnlyList([1, 2])
    """
    if type(value) in UNPROTECTED:
        return value
    own = getattr(type(value), "__twin__", None)
    if own is not None:
        return own(value)
    for kind, twin in _TWINS:
        if isinstance(value, kind):
            return twin(value, path)
    if isinstance(value, tuple):
        if not is_nested(type(value)):  # a member of an enumeration of tuples, which cannot be made again
            return value
        twins = [readonly(item, path) for item in value]
        return value if all(a is b for a, b in zip(value, twins, strict=True)) else like(value, twins)
    flags = getattr(value, "flags", None)
    if getattr(flags, "writeable", False):  # a numpy array, without importing numpy; its scalars cannot be written
        view = value.view()
        view.flags.writeable = False
        return view
    return value
