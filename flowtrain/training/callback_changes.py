"""Changes of a learner's callbacks: one is added, replaced or removed as a whole, or everything stays as it was.

A change makes a new `flowtrain.graph.registry.Callbacks`, which checks and orders all of them. Then the core, the
dispatch and the sinks are told.

A callback belongs to one learner, also when that is closed or gone, because it holds what it has gathered there. It is
free again when it is removed from the learner; a learner that could not be built never owned it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from flowtrain.callback.callback import Callback
from flowtrain.errors import CallbackError
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, Step
from flowtrain.graph.registry import Callbacks, unique_names
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.loop import Loop

__all__ = ["CallbackChanges"]


class _Owner(NamedTuple):
    """Who owns an object that keeps state.

    Attributes:
        part: The object; its entry is removed when it is gone.
        changes: The `CallbackChanges` of the learner.
        learner: How the learner is written, also when it is gone.
        callback: The name of the callback.
    """

    part: weakref.ref[object]
    changes: weakref.ref[CallbackChanges]
    learner: str
    callback: str


_owners: dict[int, _Owner] = {}
"""The owner of each callback, condition and criterion by its id.

It is kept here and not on the object, whose copies (for a dry run, in another process) belong to nobody.
"""


class CallbackChanges:
    """Changes the callbacks of one learner.

    Args:
        loop: What runs the learner.
        learner: How the learner is written in messages.

    Attributes:
        closed: Whether the learner is closed, so that none of its callbacks can be removed any more.
    """

    def __init__(self, loop: Loop, learner: str) -> None:
        self.closed = False
        self._loop, self._learner = loop, learner

    def use(self, callbacks: list[Callback], watched: Callable[[Step], Call] | None) -> None:
        """Use these callbacks from now on. Those that are there already are not set up again.

        Args:
            callbacks: All of them, in order.
            watched: Wraps each handler's call; strict mode does.

        Raises:
            FlowtrainError: They are refused, and everything is as it was.
        """
        loop, state, core = self._loop, self._loop.state, self._loop.core
        before: Iterable[Callback] = state.callbacks
        self._check_free(callbacks)
        phases = [type(phase) for phase in state.data]
        made = Callbacks(callbacks, state, phases, before, watched, self._accept)
        made.annotate(loop.executor.explain)
        state.callbacks = made
        core.need_grad_norm(any(path == ("batch", "grad_norm") for node in made.nodes for path, _ in node.union))
        core.guard_nan(any(callback.stops_at_nan for callback in made))
        loop.dispatch.use(made)
        self._own(made, before)
        loop.sinks.use(made.nodes)  # last: a sink that cannot be closed is an error, and the change is done then

    def _accept(self, nodes: Sequence[Node], state: LearnerState) -> None:
        self._loop.sinks.check(nodes)
        self._loop.executor.check(nodes, state)

    def _check_free(self, callbacks: list[Callback]) -> None:
        """Check that no object that keeps state belongs to another learner, or to two of these callbacks.

        Raises:
            CallbackError: One does.
        """
        holders: dict[int, str] = {}
        for callback, name in unique_names(callbacks):
            for part in callback.stateful():
                owner = _owners.get(id(part))
                if owner is not None and owner.changes() is not self:
                    raise _taken(name, callback, part, owner)
                other = holders.setdefault(id(part), name)
                if other != name:
                    raise CallbackError(
                        f"{other} and {name} have the same {part!r}, which would count the events or values of both. "
                        f"Make one for each of them."
                    )

    def _own(self, callbacks: Iterable[Callback], before: Iterable[Callback]) -> None:
        for callback in before:
            for part in callback.stateful():
                _owners.pop(id(part), None)
        me: weakref.ref[CallbackChanges] = weakref.ref(self)
        for callback in callbacks:
            for part in callback.stateful():
                gone = partial(_forget, _owners, id(part))
                _owners[id(part)] = _Owner(weakref.ref(part, gone), me, self._learner, callback.name)


def _forget(owners: dict[int, _Owner], place: int, part: weakref.ref[object]) -> None:
    owners.pop(place, None)


def _taken(name: str, callback: Callback, part: object, owner: _Owner) -> CallbackError:
    """Make the error for an object that belongs to another learner."""
    changes = owner.changes()
    what = name if part is callback else f"{part!r} of {name}"
    text = (
        f"{what} belongs to another learner, {owner.learner}, and would bring along what it has gathered there. Make a "
        f"new {type(part).__name__}(...) for each learner, such as one for each fold of a cross-validation."
    )
    if changes is not None and not changes.closed and part is callback:
        text += f" To move it with what it has gathered, write other.remove_callback({owner.callback!r}) first."
    return CallbackError(text)
