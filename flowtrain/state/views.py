# pyright: reportPrivateUsage=false
# `bind_view` fills the private slots of the views that are compiled here.
"""Compiled views: a handler sees the learner through an object that allows exactly the declared access.

For each declaration a view class is compiled once (`compile_view`), and all handlers with that declaration share it.
Reading a declared path runs C getters only: there is no Python call and no look-up in the declaration. An attribute
that is not declared falls through to ``__getattr__``, which refuses it and prints the declaration to paste.

``batch``, ``cbstate`` and ``optimizer`` are *namespaces*, whose entries are declared one by one. For the declared
entries of a namespace a class is compiled in the same way (`compile_namespace`). An entry that it has no getter for
falls through to ``__getattr__``, which finds it if the whole namespace is declared, and refuses it otherwise.

A view is bound (`bind_view`) to an object with the attributes of `LearnerState`. This is the state of the learner, or a
snapshot, so the same classes serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from flowtrain.callback.access import ROOTS, Declaration, Path, Read, Write, collective, granted, lag_of
from flowtrain.callback.view import LearnerView
from flowtrain.errors import MissingStateError, UsageError
from flowtrain.errors.describing import nearest
from flowtrain.state.batch import ReadOnlyBatch
from flowtrain.state.container import Tree
from flowtrain.state.detached import detached
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.partial_view import Owner, Part, tree, writes
from flowtrain.state.readonly import UNPROTECTED, readonly

__all__ = [
    "NAMESPACES",
    "BatchNamespace",
    "CbstateNamespace",
    "CompiledView",
    "GuardedView",
    "Namespace",
    "bind_view",
    "compile_namespace",
    "compile_view",
]

_LOOP_METHODS = frozenset({"epoch", "fit", "run_batch", "step", "validate"})
"""Methods of the learner that a handler cannot call; a message of its own says so."""


class GuardedView(LearnerView):
    """The base of all compiled views: it refuses the attributes that a subclass has no getter for."""

    __slots__ = ()

    _whole: ClassVar[dict[str, Read | Write]] = {}  # the access of each root that is declared as a whole

    if not TYPE_CHECKING:  # a checker must not think that every attribute exists

        def __getattr__(self, name: str) -> Any:
            if name in _LOOP_METHODS:
                raise UsageError(
                    f"{self._owner.callback} calls learner.{name}() in a handler, but the loop is running. "
                    f"Raise CancelBatchException, CancelEpochException or CancelFittingException to end a part of "
                    f"training, or fire an event with learner.fire(...)."
                )
            if name not in ROOTS or name == "resource":
                known = [root for root in ROOTS if root != "resource"]
                raise AttributeError(
                    f"a handler's learner has no {name!r}.{nearest(name, [*known, 'fire'])} It has: {', '.join(known)} "
                    f"and fire(); the numbers of epochs, steps and updates are in cbstate.history."
                )
            if name in self._whole:
                self._owner.missing((name,), None)
            if name in NAMESPACES:  # an empty namespace, which refuses the entry that is touched next by its full path
                return compile_namespace(name, {})(self._state, self._owner)
            return self._owner.refuse("Read", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ROOTS:
            raise AttributeError(
                f"a handler's learner has no {name!r}.{nearest(name, ROOTS)} To keep something declare "
                f'{{"cbstate.{name}": Write()}} and write learner.cbstate.{name}.'
            )
        if name == "resource":
            raise AttributeError(
                f"a handler's learner has no 'resource', so {value!r:.80} cannot be assigned to it: a resource is "
                f"declared and has no value. Keep the object in an attribute of the callback."
            )
        if isinstance(self._whole.get(name), Write):
            raise UsageError(
                f"{self._owner.callback} replaces learner.{name}, which the training core, the optimizer and other "
                f"views hold. Change it in place."
            )
        self._owner.refuse("Write", (name,))

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)


@dataclass(frozen=True)
class CompiledView:
    """A view class, and the objects with which `bind_view` fills the slots of its instances.

    Attributes:
        view_class: The class, with a C getter for each root that is declared as a whole.
        namespaces: The compiled class for each root that is a namespace.
        trees: The declarations inside each other root of which only parts are declared.
    """

    view_class: type[LearnerView]
    namespaces: dict[str, type[Namespace]]
    trees: dict[str, Tree]


@lru_cache(maxsize=4096)
def compile_view(declaration: Declaration, consumes: bool = False, copied: bool = False) -> CompiledView:
    """Return the view class for a declaration; equal declarations share it.

    Args:
        declaration: The declaration.
        consumes: Whether the view is for handlers of a deferrable callback, which see detached tensors.
        copied: Whether the view shows copies, which are detached already.
    """
    detaches = consumes and not copied
    namespaces: dict[str, type[Namespace]] = {}
    trees: dict[str, Tree] = {}
    whole: dict[str, Read | Write] = {}
    members: dict[str, Any] = {"_whole": whole}
    for root, inside in tree(declaration).items():
        covering = inside.get("") if isinstance(inside, dict) else inside
        if isinstance(covering, (Read, Write)):
            whole[root] = covering
        if root in NAMESPACES:
            namespaces[root] = compile_namespace(root, inside if isinstance(inside, dict) else {}, detaches)
        elif isinstance(inside, dict) and not isinstance(covering, (Read, Write)):
            if root != "resource":  # a resource has no value that a view could show
                trees[root] = inside
        elif root == "data" and isinstance(covering, Read):
            members[root] = property(lambda view: view._state.data.__twin__())
        elif root == "params" and isinstance(covering, Read) and covering.gather:
            members[root] = property(_of_all_ranks(_params if detaches else _own_params, ("params",), covering))
        elif root == "params" and detaches:
            members[root] = property(_params)
        else:
            members[root] = property(attrgetter(f"_state.{root}"))
    if consumes:
        members["updates"] = property(_no_updates)
    members["__slots__"] = (*namespaces, *trees)
    return CompiledView(type("LearnerView", (GuardedView,), members), namespaces, trees)


def _no_updates(view: LearnerView) -> NoReturn:
    """Refuse the number of updates to a deferrable callback, in place and in its lane."""
    raise UsageError(
        f"{view._owner.callback} is deferrable and reads learner.updates: training may be ahead of its handlers. "
        f'Declare {{"cbstate.history": Read()}} and read those of a phase: learner.cbstate.history[phase].updates.'
    )


def _own_params(view: LearnerView) -> Any:
    return view._state.params


def _params(view: LearnerView) -> Any:
    return view._owner.shown(view._state.params, ("params",))


def bind_view(declaration: Declaration, state: LearnerState, owner: Owner) -> LearnerView:
    """Return a view of a state that allows the declared access.

    Args:
        declaration: The declaration of the handler.
        state: The state of the learner, or a snapshot of it.
        owner: The callback that the view belongs to, which refusals name.
    """
    compiled = compile_view(declaration, owner.consumes, owner.copied)
    view = compiled.view_class()
    assign = object.__setattr__  # the view refuses assignments
    assign(view, "_state", state)
    assign(view, "_owner", owner)
    for root, namespace in compiled.namespaces.items():
        assign(view, root, namespace(state, owner))
    for root, inside in compiled.trees.items():
        assign(view, root, Part(owner, (root,), inside, partial(getattr, state, root)))
    return view


class Namespace:
    """The base of compiled views of ``batch``, ``cbstate`` and ``optimizer``.

    A compiled subclass has a C getter for each declared entry, and a slot with a `Part` for each entry of which only
    parts are declared. ``__getattr__`` gets the other entries: those that a declaration of the whole namespace covers,
    those that do not exist, and those that are not declared.
    """

    __slots__ = ("_live", "_owner", "_state", "_twins")

    _live: Any  # the object that holds the entries
    _owner: Owner
    _state: LearnerState
    _twins: Any  # the object that holds the read-only twins of the entries
    _root: ClassVar[str]  # the name of the namespace
    _writable: ClassVar[frozenset[str]]  # the entries that are declared with `Write()`
    _trees: ClassVar[dict[str, Tree]]  # the declarations inside entries of which only parts are declared

    def __init__(self, state: LearnerState, owner: Owner) -> None:
        assign = object.__setattr__
        assign(self, "_state", state)
        assign(self, "_owner", owner)
        for slot, source in zip(("_twins", "_live"), _STABLE.get(self._root, ()), strict=False):
            assign(self, slot, source(state))
        for name, inside in self._trees.items():
            assign(self, name, Part(owner, (self._root, name), inside, self._finder(name)))

    def _finder(self, name: str) -> Callable[[], Any]:
        """Return a function that finds an entry, for a `Part`. It does not refer to this view, which holds the part."""
        return partial(getattr, self._live, name)

    def _source(self, *, writing: bool) -> Any:
        """Return the object that holds the entries, or for reading the object that holds their twins."""
        return self._live if writing else self._twins

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = (self._root, name)
        access = granted(self._owner.declaration, path)
        if access is None:
            self._owner.refuse("Read", path)
        try:
            # For a deferrable callback `shown` detaches the entry itself, before it makes a twin.
            detaches = self._owner.detaches
            value = getattr(self._source(writing=detaches or isinstance(access, Write)), name)
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
        """Refuse to write an entry that is not declared with `Write()`."""
        if name not in self._writable and not isinstance(granted(self._owner.declaration, (self._root, name)), Write):
            if name.startswith("_"):
                raise AttributeError(
                    f"{self._root}.{name}: no entry begins with an underscore. Name it {name.lstrip('_')!r}."
                )
            self._owner.refuse("Write", (self._root, name))

    def __contains__(self, name: object) -> bool:
        if granted(self._owner.declaration, (self._root, str(name))) is None and name not in self._trees:
            self._owner.refuse("Read", (self._root, str(name)))
        source = self._source(writing=True)
        return name in vars(source) if hasattr(source, "__dict__") else hasattr(source, str(name))

    def __repr__(self) -> str:
        return f"Learner.{self._root} as {self._owner.callback} sees it"


class BatchNamespace(Namespace):
    """``batch``, which is a new object for each batch, so that it is looked up in the state at each use.

    A batch gets a twin of its own only when the first container is assigned to it: tensors and numbers need none.
    """

    __slots__ = ()

    def _finder(self, name: str) -> Callable[[], Any]:
        return partial(_entry_of_batch, self._state, name)

    def _source(self, *, writing: bool) -> Any:
        return self._state.batch if writing else self._state.batch_twin

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_write(name)
        state = self._state
        setattr(state.batch, name, value)
        if type(value) not in UNPROTECTED and state.batch_twin is state.batch:
            state.batch_twin = ReadOnlyBatch(state.batch)


class CbstateNamespace(Namespace):
    """``cbstate``, in which a plain value that replaces another one is assigned without a detour.

    A plain value is its own twin, so it is written to the entries and to their twins directly.
    """

    __slots__ = ("_entries", "_twin_entries")

    _entries: dict[str, Any]
    _twin_entries: dict[str, Any]

    def __init__(self, state: LearnerState, owner: Owner) -> None:
        super().__init__(state, owner)
        object.__setattr__(self, "_entries", vars(self._live))
        object.__setattr__(self, "_twin_entries", vars(self._twins))

    def __setattr__(self, name: str, value: Any) -> None:
        entries = self._entries
        if name in self._writable and type(value) in UNPROTECTED and type(entries.get(name)) in UNPROTECTED:
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
    "cbstate": (attrgetter("cbstate.__twins__"), attrgetter("cbstate")),
    "optimizer": (attrgetter("optimizers.__twins__"), attrgetter("optimizers")),
}
"""The namespaces that stay the same object as long as the learner lives: getters of the twins and of the entries."""


def _detached_getter(path: str, read: str, write: str, name: str) -> Callable[[Any], Any]:
    """Return a getter of an entry for a deferrable callback: it gives the twin, or a read-only copy without graphs.

    Args:
        path: The path of the entry.
        read: The attribute of a namespace that holds the twins, dotted.
        write: The attribute of a namespace that holds the entries, dotted.
        name: The name of the entry.
    """
    get, get_twin = attrgetter(f"{write}.{name}"), attrgetter(f"{read}.{name}")

    def show(view: Any) -> Any:
        """Return the entry of a namespace."""
        value = get(view)
        without_graph = detached(value)
        return get_twin(view) if without_graph is value else readonly(without_graph, path)

    return show


def _of_all_ranks(get: Callable[[Any], Any], path: Path, access: Read) -> Callable[[Any], Any]:
    """Return a getter of a path with ``reduce=`` or ``gather=``; `get` is that of the value of this rank."""

    def show(view: Any) -> Any:
        """Return the value that the ranks have exchanged, or in one process the value of it."""
        return view._owner.of_all_ranks(path, access, partial(get, view))

    return show


def compile_namespace(root: str, inside: Tree, detaches: bool = False) -> type[Namespace]:
    """Make the class for a namespace: a C getter for each declared entry, and a slot for each `Part`.

    Args:
        root: The name of the namespace.
        inside: The declarations in it.
        detaches: Whether the view detaches tensors, for handlers of a deferrable callback.
    """
    read, write = ("_twins", "_live") if root in _STABLE else ("_state.batch_twin", "_state.batch")
    trees: dict[str, Tree] = {}
    members: dict[str, Any] = {}
    for name, kind in inside.items():
        covering = kind.get("") if isinstance(kind, dict) else kind
        if isinstance(inside.get(""), Write):
            covering = inside[""]  # the whole namespace is declared with Write(), which includes every entry
        if isinstance(kind, dict) and (covering is None or (isinstance(covering, Read) and writes(kind))):
            trees[name] = kind
        elif name:
            # All batches share one object for the gradients, which has its own twin.
            twin = ".twin" if (root, name) == ("batch", "grads") and isinstance(covering, Read) else ""
            get: Callable[[Any], Any] = attrgetter(f"{write if isinstance(covering, Write) else read}.{name}{twin}")
            if detaches and root != "optimizer" and not isinstance(covering, Write):
                get = _detached_getter(f"{root}.{name}", read, write, name)
            if isinstance(covering, Read) and collective(covering):
                get = _of_all_ranks(get, (root, name), covering)
            members[name] = property(get)
    members |= {
        "__slots__": tuple(trees),
        "_root": root,
        "_writable": frozenset(name for name, kind in inside.items() if isinstance(kind, Write)),
        "_trees": trees,
    }
    late = any(map(lag_of, _kinds(inside)))  # assignments are kept, and not made
    base: type[Namespace] = Namespace if late else NAMESPACES[root]
    return type(f"{root.capitalize()}View", (base,), members)


def _kinds(inside: Tree) -> Iterator[Read | Write]:
    for kind in inside.values():
        if isinstance(kind, dict):
            yield from _kinds(kind)
        else:
            yield kind
