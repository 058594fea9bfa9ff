"""Namespaces: what a handler sees of ``batch``, ``cbstate`` and ``optimizer``, entry by entry.

For the entries that are declared in one of them a class is compiled (`compile_namespace`), as `flowtrain.protect` does
it for the whole learner: reading a declared entry runs C getters only. Everything else falls through to
``__getattr__``, where it is found under a declaration for the whole namespace, or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

from flowtrain.access import Read, Write, granted
from flowtrain.batch import ReadOnlyBatch
from flowtrain.detached import detached
from flowtrain.errors import MissingStateError
from flowtrain.part import Owner, Part, Tree, writes
from flowtrain.readonly import PLAIN, readonly
from flowtrain.state import LearnerState

__all__ = ["NAMESPACES", "Namespace", "compile_namespace"]


class Namespace:
    """The base of compiled views of ``batch``, ``cbstate`` and ``optimizer``.

    A compiled subclass has a C getter for each declared entry, and a slot with a `Part` for each entry of which only
    something inside is declared. What lands in ``__getattr__`` is an entry under a declaration for the whole
    namespace, an entry that is not there, or one that is not declared.
    """

    __slots__ = ("_live", "_owner", "_state", "_twins")

    _live: Any
    _owner: Owner
    _state: LearnerState
    _twins: Any
    _root: ClassVar[str]
    _writable: ClassVar[frozenset[str]]
    _trees: ClassVar[dict[str, Tree]]

    def __init__(self, state: LearnerState, owner: Owner) -> None:
        place = object.__setattr__
        place(self, "_state", state)
        place(self, "_owner", owner)
        for slot, source in zip(("_twins", "_live"), _STABLE.get(self._root, ()), strict=False):
            place(self, slot, source(state))
        for name, inside in self._trees.items():
            place(self, name, Part(owner, (self._root, name), inside, self._finder(name)))

    def _finder(self, name: str) -> Callable[[], Any]:
        """Return what finds an entry; it holds no reference to this view, which holds the part that calls it."""
        return partial(getattr, self._live, name)

    def _source(self, *, writing: bool) -> Any:
        """Return the object that holds the entries, or the twins of them."""
        return self._live if writing else self._twins

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = (self._root, name)
        access = granted(self._owner.declaration, path)
        if access is None:
            self._owner.refuse("Read", path)
        try:
            consumes = self._owner.consumes  # what is detached is the entry itself, and then shown read-only
            value = getattr(self._source(writing=consumes or isinstance(access, Write)), name)
            return value if isinstance(access, Write) else self._owner.shown(value, path)
        except MissingStateError as error:
            if isinstance(access, Read) and access.optional:
                return None
            self._owner.missing(path, error)

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_write(name)
        setattr(self._source(writing=True), name, value)

    def __delattr__(self, name: str) -> None:
        self._check_write(name)
        delattr(self._source(writing=True), name)

    def _check_write(self, name: str) -> None:
        if name not in self._writable and not isinstance(granted(self._owner.declaration, (self._root, name)), Write):
            if name.startswith("_"):
                raise AttributeError(f"{self._root}.{name}: no entry begins with an underscore")
            self._owner.refuse("Write", (self._root, name))

    def __contains__(self, name: object) -> bool:
        if granted(self._owner.declaration, (self._root, str(name))) is None and name not in self._trees:
            self._owner.refuse("Read", (self._root, str(name)))
        source = self._source(writing=True)
        return name in vars(source) if hasattr(source, "__dict__") else hasattr(source, str(name))

    def __repr__(self) -> str:
        return f"Learner.{self._root} as {self._owner.callback} sees it"


class BatchNamespace(Namespace):
    """``batch``: a new object for each batch; one that only ever held tensors gets a twin with the first container."""

    __slots__ = ()

    def _finder(self, name: str) -> Callable[[], Any]:
        return partial(_entry_of_batch, self._state, name)

    def _source(self, *, writing: bool) -> Any:
        return self._state.batch if writing else self._state.batch_twin

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_write(name)
        state = self._state
        setattr(state.batch, name, value)
        if type(value) not in PLAIN and state.batch_twin is state.batch:
            state.batch_twin = ReadOnlyBatch(state.batch)


class CbstateNamespace(Namespace):
    """``cbstate``: a plain value that replaces a plain value is its own twin, and takes a short way."""

    __slots__ = ("_entries", "_twin_entries")

    _entries: dict[str, Any]
    _twin_entries: dict[str, Any]

    def __init__(self, state: LearnerState, owner: Owner) -> None:
        super().__init__(state, owner)
        object.__setattr__(self, "_entries", vars(self._live))
        object.__setattr__(self, "_twin_entries", vars(self._twins))

    def __setattr__(self, name: str, value: Any) -> None:
        entries = self._entries
        if name in self._writable and type(value) in PLAIN and type(entries.get(name)) in PLAIN:
            entries[name] = self._twin_entries[name] = value
        else:
            Namespace.__setattr__(self, name, value)


def _entry_of_batch(state: LearnerState, name: str) -> Any:
    return getattr(state.batch, name)


NAMESPACES: dict[str, type[Namespace]] = {
    "batch": BatchNamespace,
    "cbstate": CbstateNamespace,
    "optimizer": Namespace,
}
_STABLE: dict[str, tuple[attrgetter[Any], attrgetter[Any]]] = {
    # Objects that stay the same as long as the learner lives: their twins, and they themselves.
    "cbstate": (attrgetter("cbstate.__twins__"), attrgetter("cbstate")),
    "optimizer": (attrgetter("optimizers.__twins__"), attrgetter("optimizers")),
}


def _detached_getter(path: str, read: str, write: str, name: str) -> Callable[[Any], Any]:
    """Return what gets an entry as a deferrable callback sees it: its twin, or one of it without graphs."""
    get, get_twin = attrgetter(f"{write}.{name}"), attrgetter(f"{read}.{name}")

    def show(view: Any) -> Any:
        """Return the entry."""
        value = get(view)
        found = detached(value)
        return get_twin(view) if found is value else readonly(found, path)

    return show


def compile_namespace(root: str, inside: Tree, consumes: bool = False) -> type[Namespace]:
    """Make the class for one root: a C getter for each declared entry, a `Part` for what is declared deeper.

    Args:
        root: The root.
        inside: What is declared in it.
        consumes: Whether it is for a handler that may run elsewhere, which sees detached tensors.
    """
    read, write = ("_twins", "_live") if root in _STABLE else ("_state.batch_twin", "_state.batch")
    trees: dict[str, Tree] = {}
    members: dict[str, Any] = {}
    for name, kind in inside.items():
        covering = kind.get("") if isinstance(kind, dict) else kind
        if isinstance(inside.get(""), Write):
            covering = inside[""]  # a `Read` of an entry takes nothing from a `Write` of all
        if isinstance(kind, dict) and (covering is None or (isinstance(covering, Read) and writes(kind))):
            trees[name] = kind
        elif name:
            # The gradients are not the batch's own, so they bring their twin along.
            twin = ".twin" if (root, name) == ("batch", "grads") and isinstance(covering, Read) else ""
            if consumes and root != "optimizer" and not isinstance(covering, Write):
                members[name] = property(_detached_getter(f"{root}.{name}", read, write, name))
                continue
            members[name] = property(attrgetter(f"{write if isinstance(covering, Write) else read}.{name}{twin}"))
    members |= {
        "__slots__": tuple(trees),
        "_root": root,
        "_writable": frozenset(name for name, kind in inside.items() if isinstance(kind, Write)),
        "_trees": trees,
    }
    return type(f"{root.capitalize()}View", (NAMESPACES[root],), members)
