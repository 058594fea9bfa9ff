"""Protected views: a handler sees the learner through an object that allows exactly what it declares.

For each declaration a view class is compiled once (`compile_view`) and shared by all handlers with that declaration.
Reading a declared path runs C getters only: no Python call, no look-up in the declaration. Everything that is not
declared falls through to ``__getattr__`` and is refused there, with the declaration to paste.

A view is bound (`bind_view`) to any object with the attributes of `LearnerState`, so the same classes serve the live
learner and a frozen copy of its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, ClassVar

from flowtrain.access import ROOTS, Declaration, Read, Write
from flowtrain.errors import UsageError, is_a, nearest
from flowtrain.events import Event
from flowtrain.namespace import NAMESPACES, Namespace, compile_namespace
from flowtrain.part import Owner, Part, Tree, tree
from flowtrain.requests import CheckpointRequest
from flowtrain.state import LearnerState

__all__ = ["CompiledView", "LearnerView", "bind_view", "compile_view"]

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

    if TYPE_CHECKING:
        model: Any
        lossfn: Any
        optimizer: Any
        data: Any
        params: Any
        batch: Any
        cbstate: Any
        callbacks: Any

    updates = property(
        attrgetter("_state.updates"),
        doc="How many updates of optimizers the learner has made. A deferred handler has none: training has gone on.",
    )

    @property
    def lag(self) -> int:
        """After how many batches values of the device are to be read; 0 where reading does not wait for anything."""
        return getattr(self._state, "lag", 0)  # a frozen copy of a state holds values that were read

    def fire(self, event: Event) -> None:
        """Fire an event, in the current phase, when the current event has ended.

        The events that several handlers ask for are fired in serial order of who asked, first in, first out. They
        are dropped if the current event raises.
        """
        if not is_a(event, Event):
            raise UsageError(f"fire() takes an event, got {event!r}. Write learner.fire(MyEvent()).")
        self._state.fired.append((self._owner.callback, event))

    def request_checkpoint(
        self,
        path: str | PathLike[str],
        *,
        best: bool = False,
        remove: Iterable[str] = (),
        weights: bool = False,
        on_interrupt: bool = False,
        judged: bool = False,
        decide: Callable[[bool], tuple[bool, Iterable[str]]] | None = None,
    ) -> None:
        """Ask the loop for a checkpoint; it takes one when the current event has ended and no batch is open.

        The request is dropped if the event raises an error. `flowtrain.callbacks.Checkpointer` keeps a folder of them.

        Args:
            path: The file to write; ``latest`` beside it will name it, if the parameters that are trained and the last
                loss are finite.
            best: Let ``best``, beside it, name it too.
            remove: Names of files beside it to remove once it is there; what ``latest`` or ``best`` names stays. If it
                is not finite, nothing is removed.
            weights: Write the weights of the model also as safetensors, beside it.
            on_interrupt: Not now, but when an interrupt ends this fit.
            judged: Hold as the model the weights that evaluation uses (those of `flowtrain.callbacks.EMA`, say), and
                those that are trained beside it.
            decide: Called when it is taken, with whether it is finite; returns ``(best, remove)``, in place of both.
        """
        if not is_a(path, (str, PathLike)):
            raise UsageError(f"request_checkpoint() takes the path of a file, got {path!r}.")
        request = CheckpointRequest(fspath(path), best, tuple(remove), weights, on_interrupt, judged, decide)
        self._state.fired.append((self._owner.callback, request))

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
                    f"and fire(); how far training is stands in cbstate.history."
                )
            if name in self._whole:
                self._owner.missing((name,), None)
            if name in NAMESPACES:  # nothing in it is declared: what is touched next is refused, by its own path
                return compile_namespace(name, {})(self._state, self._owner)
            return self._owner.refuse("Read", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ROOTS:
            raise AttributeError(
                f"a handler's learner has no {name!r}.{nearest(name, ROOTS)} To keep something declare "
                f'{{"cbstate.{name}": Write()}} and write learner.cbstate.{name}.'
            )
        kind = self._whole.get(name)
        if name not in ROOTS or name == "resource":
            raise AttributeError(f"a handler's learner has no {name!r}.{nearest(name, ROOTS)}")
        if isinstance(kind, Write):
            raise UsageError(
                f"{self._owner.callback} replaces learner.{name}; a handler changes it in place, since the training "
                f"core, the optimizer and other views hold it."
            )
        self._owner.refuse("Write", (name,))

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __repr__(self) -> str:
        return f"LearnerView of {self._owner.callback}"


@dataclass(frozen=True)
class CompiledView:
    """A view class and what its slots hold.

    Attributes:
        view_class: The class, with a C getter for each root that is declared as a whole.
        namespaces: The class for each root that is a namespace.
        trees: What is declared inside each other root that is not declared as a whole.
    """

    view_class: type[LearnerView]
    namespaces: dict[str, type[Namespace]]
    trees: dict[str, Tree]


@lru_cache(maxsize=4096)
def compile_view(declaration: Declaration, consumes: bool = False) -> CompiledView:
    """Return the view class for a declaration; equal declarations share it.

    Args:
        declaration: The declaration.
        consumes: Whether it is for handlers that may run elsewhere, which see detached tensors.
    """
    namespaces: dict[str, type[Namespace]] = {}
    trees: dict[str, Tree] = {}
    whole: dict[str, Read | Write] = {}
    members: dict[str, Any] = {"_whole": whole}
    for root, inside in tree(declaration).items():
        covering = inside.get("") if isinstance(inside, dict) else inside
        if isinstance(covering, (Read, Write)):
            whole[root] = covering
        if root in NAMESPACES:
            namespaces[root] = compile_namespace(root, inside if isinstance(inside, dict) else {}, consumes)
        elif isinstance(inside, dict) and not isinstance(covering, (Read, Write)):
            if root != "resource":
                trees[root] = inside
        elif root == "data" and isinstance(covering, Read):
            members[root] = property(lambda view: view._state.data.__twin__())
        elif root == "params" and consumes:
            members[root] = property(_params)
        else:
            members[root] = property(attrgetter(f"_state.{root}"))
    members["__slots__"] = (*namespaces, *trees)
    return CompiledView(type("LearnerView", (LearnerView,), members), namespaces, trees)


def _params(view: LearnerView) -> Any:
    return view._owner.shown(view._state.params, ("params",))


def bind_view(declaration: Declaration, state: LearnerState, owner: Owner) -> LearnerView:
    """Return a view of `state` that allows what is declared, and refuses in the name of `owner`."""
    compiled = compile_view(declaration, owner.consumes)
    view = compiled.view_class()
    place = object.__setattr__
    place(view, "_state", state)
    place(view, "_owner", owner)
    for root, namespace in compiled.namespaces.items():
        place(view, root, namespace(state, owner))
    for root, inside in compiled.trees.items():
        place(view, root, Part(owner, (root,), inside, partial(getattr, state, root)))
    return view
