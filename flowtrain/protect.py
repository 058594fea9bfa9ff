"""Protected views: a handler sees the learner through an object that allows exactly what it declares.

For each declaration a view class is compiled once (`compile_view`) and shared by all handlers with that declaration.
Reading a declared path runs C getters only: no Python call, no look-up in the declaration. Everything that is not
declared falls through to ``__getattr__`` and is refused there, with the declaration to paste.

A view is bound (`bind_view`) to any object with the attributes of `LearnerState`, so the same classes serve the live
learner and a frozen copy of its state.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

from flowtrain.access import ROOTS, Declaration, Read, Write, granted
from flowtrain.batch import ReadOnlyBatch
from flowtrain.errors import MissingStateError, UsageError, is_a, nearest
from flowtrain.events import Event
from flowtrain.part import Owner, Part, Tree, tree
from flowtrain.readonly import PLAIN
from flowtrain.state import LearnerState

__all__ = ["LearnerView", "Namespace", "bind_view", "compile_view"]

_SOURCES = {
    # root: (where Read looks, where Write looks), from the state on
    "batch": ("batch_twin", "batch"),
    "cbstate": ("cbstate.__twins__", "cbstate"),
    "optimizer": ("optimizers.__twins__", "optimizers"),
}
_LOOP_METHODS = frozenset({"epoch", "fit", "run_batch", "step", "validate"})


class LearnerView:
    """What a handler gets as `learner`: the state that it declares, and `fire`.

    The attributes are ``model``, ``lossfn``, ``optimizer``, ``data``, ``params``, ``batch``, ``cbstate`` and
    ``callbacks``. One that is not declared raises `ProtectedException`.
    """

    __slots__ = ("_owner", "_state")

    _owner: Owner
    _state: LearnerState
    _whole: ClassVar[dict[str, Read | Write]] = {}
    _trees: ClassVar[dict[str, Tree]] = {}

    if TYPE_CHECKING:
        model: Any
        lossfn: Any
        optimizer: Any
        data: Any
        params: Any
        batch: Any
        cbstate: Any
        callbacks: Any

    def fire(self, event: Event) -> None:
        """Fire an event, in the current phase, when the current event has ended.

        The events that several handlers ask for are fired in serial order of who asked, first in, first out. They
        are dropped if the current event raises.
        """
        if not is_a(event, Event):
            raise UsageError(f"fire() takes an event, got {event!r}. Write learner.fire(MyEvent()).")
        self._state.fired.append((self._owner.callback, event))

    if not TYPE_CHECKING:  # a checker must not think that every attribute exists

        def __getattr__(self, name: str) -> Any:
            if name in _LOOP_METHODS:
                raise UsageError(
                    f"{self._owner.callback} calls learner.{name}() in a handler, but the loop is running. "
                    f"Raise CancelBatchException, CancelEpochException or CancelFittingException to end a part of "
                    f"training, or fire an event with learner.fire(...)."
                )
            if name not in ROOTS or name == "resource":
                raise AttributeError(f"a handler's learner has no {name!r}.{nearest(name, [*ROOTS, 'fire'])}")
            if name in self._whole:
                self._owner.missing((name,), None)
            self._owner.refuse("Read", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._whole.get(name)
        if isinstance(kind, Write) and name != "batch":
            raise UsageError(
                f"{self._owner.callback} replaces learner.{name}; a handler changes it in place, since the training "
                f"core, the optimizer and other views hold it."
            )
        self._owner.refuse("Write", (name,))

    def __repr__(self) -> str:
        return f"LearnerView of {self._owner.callback}"


class Namespace:
    """The base of compiled views of ``batch``, ``cbstate`` and ``optimizer``.

    A compiled subclass has a C getter for each declared entry. What lands in ``__getattr__`` is an entry under a
    declaration for the whole namespace, an entry that is not there, or one that is not declared.
    """

    __slots__ = ("_owner", "_parts", "_state")

    _owner: Owner
    _state: LearnerState
    _parts: dict[str, Part]
    _root: ClassVar[str]
    _read: ClassVar[attrgetter[Any]]
    _write: ClassVar[attrgetter[Any]]
    _writable: ClassVar[frozenset[str]]
    _trees: ClassVar[dict[str, Tree]]

    def __init__(self, state: LearnerState, owner: Owner) -> None:
        object.__setattr__(self, "_state", state)
        object.__setattr__(self, "_owner", owner)
        parts = {name: _part(self, owner, name, inside) for name, inside in self._trees.items()}
        object.__setattr__(self, "_parts", parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        part = self._parts.get(name)
        if part is not None:
            return part
        path = (self._root, name)
        access = granted(self._owner.declaration, path)
        if access is None:
            self._owner.refuse("Read", path)
        source = type(self)._write if isinstance(access, Write) else type(self)._read
        try:
            return getattr(source(self), name)
        except MissingStateError as error:
            if isinstance(access, Read) and access.optional:
                return None
            self._owner.missing(path, error)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._writable and not isinstance(granted(self._owner.declaration, (self._root, name)), Write):
            self._owner.refuse("Write", (self._root, name))
        self._assign(name, value)

    def __delattr__(self, name: str) -> None:
        if not isinstance(granted(self._owner.declaration, (self._root, name)), Write):
            self._owner.refuse("Write", (self._root, name))
        delattr(type(self)._write(self), name)

    def __contains__(self, name: object) -> bool:
        return granted(self._owner.declaration, (self._root, str(name))) is not None and name in vars(
            type(self)._write(self)
        )

    def _assign(self, name: str, value: Any) -> None:
        setattr(type(self)._write(self), name, value)

    def __repr__(self) -> str:
        return f"Learner.{self._root} as {self._owner.callback} sees it"


class BatchNamespace(Namespace):
    """``batch``: one that only ever held tensors gets its twin when a container is assigned."""

    __slots__ = ()

    def _assign(self, name: str, value: Any) -> None:
        state = self._state
        setattr(state.batch, name, value)
        if type(value) not in PLAIN and state.batch_twin is state.batch:
            state.batch_twin = ReadOnlyBatch(state.batch)


class CbstateNamespace(Namespace):
    """``cbstate``: a plain value that replaces a plain value is its own twin."""

    __slots__ = ()

    def _assign(self, name: str, value: Any) -> None:
        setattr(self._state.cbstate, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._writable:
            cbstate = self._state.cbstate
            entries = cbstate.__dict__
            if type(value) in PLAIN and type(entries.get(name)) in PLAIN:
                entries[name] = cbstate.__twins__.__dict__[name] = value
                return
        Namespace.__setattr__(self, name, value)


_NAMESPACES: dict[str, type[Namespace]] = {
    "batch": BatchNamespace,
    "cbstate": CbstateNamespace,
    "optimizer": Namespace,
}


def _part(namespace: Namespace, owner: Owner, name: str, inside: Tree) -> Part:
    source = type(namespace)._write

    def find() -> Any:
        return getattr(source(namespace), name)

    return Part(owner, (namespace._root, name), inside, find)


def _compile_namespace(root: str, inside: Tree) -> type[Namespace]:
    """Make the class for one root: a C getter for each declared entry, a `Part` for what is declared deeper."""
    read, write = _SOURCES[root]
    members: dict[str, Any] = {
        "__slots__": (),
        "_root": root,
        "_read": attrgetter(f"_state.{read}"),
        "_write": attrgetter(f"_state.{write}"),
        "_writable": frozenset(name for name, kind in inside.items() if isinstance(kind, Write)),
        "_trees": {name: kind for name, kind in inside.items() if isinstance(kind, dict) and "" not in kind},
    }
    for name, kind in inside.items():
        covering = kind.get("") if isinstance(kind, dict) else kind
        if name and not isinstance(covering, (dict, type(None))):
            source = write if isinstance(covering, Write) else read
            members[name] = property(attrgetter(f"_state.{source}.{name}"))
    return type(f"{root.capitalize()}View", (_NAMESPACES[root],), members)


@lru_cache(maxsize=4096)
def compile_view(declaration: Declaration) -> type[LearnerView]:
    """Return the view class for a declaration; equal declarations share it."""
    members: dict[str, Any] = {"_whole": {}, "_trees": {}}
    slots: list[str] = []
    for root, inside in tree(declaration).items():
        if root == "resource":
            continue
        whole = inside.get("") if isinstance(inside, dict) else inside
        if isinstance(whole, (Read, Write)):
            members["_whole"][root] = whole
        if root in _SOURCES:
            members["_trees"][root] = _compile_namespace(root, inside if isinstance(inside, dict) else {})
            slots.append(root)
        elif isinstance(whole, (Read, Write)):
            members[root] = property(attrgetter(f"_state.{root}"))
        else:
            members["_trees"][root] = inside
            slots.append(root)
    if isinstance(members["_whole"].get("data"), Read):
        members["data"] = property(lambda view: view._state.data.__twin__())
    members["__slots__"] = tuple(slots)
    return type("LearnerView", (LearnerView,), members)


def bind_view(declaration: Declaration, state: LearnerState, owner: Owner) -> LearnerView:
    """Return a view of `state` that allows what is declared, and refuses in the name of `owner`."""
    view = compile_view(declaration)()
    object.__setattr__(view, "_state", state)
    object.__setattr__(view, "_owner", owner)
    for root, inside in view._trees.items():
        if isinstance(inside, type):
            part: Any = inside(state, owner)
        else:
            part = Part(owner, (root,), inside, _root_of(state, root))
        object.__setattr__(view, root, part)
    return view


def _root_of(state: LearnerState, root: str) -> Any:
    return lambda: getattr(state, root)
