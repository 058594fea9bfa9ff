"""Changes of a learner's callbacks: a change takes effect as a whole, or the learner stays as it was.

A change makes a new `flowtrain.graph.registry.Callbacks`, which checks and orders all callbacks of the learner. Only
then do the core, the dispatch and the sinks use the new callbacks.

A callback belongs to one learner, even after that learner is closed or deleted, because the callback holds the state
that it gathered there. Removing the callback from the learner frees it for another learner. A learner whose
construction failed owns no callbacks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import BackwardEnd, BatchEnd, Event, UpdateBegin, UpdateEnd
from flowtrain.callback.phases import AbstractTrainingPhase
from flowtrain.errors import CallbackError
from flowtrain.graph.executor import Measuring
from flowtrain.graph.nodes import Node, unique_names
from flowtrain.graph.plan import Call, PlannedHandler
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.shared_state import Peers
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.training.loop import Loop

__all__ = ["CallbackChanges"]


class _Owner(NamedTuple):
    """The learner and the callback that an object with state belongs to.

    Attributes:
        part: The object; its entry in `_owners` is removed when the object is deleted.
        changes: The `CallbackChanges` of the learner.
        learner: The learner as messages name it, also after the learner is deleted.
        callback: The name of the callback.
    """

    part: weakref.ref[object]
    changes: weakref.ref[CallbackChanges]
    learner: str
    callback: str


_owners: dict[int, _Owner] = {}
"""The owner of each callback, condition and criterion, by the `id` of that object.

The owner is no attribute of the object, because a copy of the object (for a dry run, in another process) would copy
the attribute, and copies belong to no learner.
"""


class CallbackChanges:
    """Changes the callbacks of one learner.

    Args:
        loop: The loop of the learner.
        learner: The learner as messages name it.

    Attributes:
        closed: Whether the learner is closed, so that none of its callbacks can be removed any more.
    """

    def __init__(self, loop: Loop, learner: str) -> None:
        self.closed = False
        self._loop, self._learner = loop, learner
        self._peers = _peers(loop)

    def close(self) -> None:
        """Refuse further changes, since the learner is closed: it runs no callbacks any more."""
        self.closed = True

    def use(self, callbacks: list[Callback], watched: Callable[[PlannedHandler], Call] | None) -> None:
        """Make these the callbacks of the learner. Callbacks that it had before are not set up again.

        Args:
            callbacks: All callbacks of the learner from now on, in order.
            watched: A wrapper of every handler's call, which strict mode passes, or ``None``.

        Raises:
            FlowtrainError: The callbacks are refused, and the learner is as it was.
        """
        loop, state, core = self._loop, self._loop.state, self._loop.core
        before: Iterable[Callback] = state.callbacks
        self._check_free(callbacks)
        phases = [type(phase) for phase in state.data]
        made = Callbacks(callbacks, state, phases, before, watched, self._accept, self._peers)
        made.annotate(loop.executor.explain, loop.executor.costs if isinstance(loop.executor, Measuring) else None)
        state.callbacks = made
        core.need_grad_norm(any(map(_sees_norm, made.nodes)))
        core.guard_nan(any(callback.stops_at_nan for callback in made))
        loop.dispatch.use(made)
        self._own(made, before)
        loop.sinks.use(made.running)  # last, because closing an old sink may raise, and by now the change is complete

    def replace_optimizer(self, wanted: Any, watched: Callable[[PlannedHandler], Call] | None) -> Any:
        """Train with another optimizer from now on; return the one before, or all of them by name.

        Args:
            wanted: As the argument `optimizer` of a learner.
            watched: As for `use`.

        Raises:
            FlowtrainError: The optimizer does not fit the models or the callbacks, and the learner is as it was.
        """
        loop, state, core = self._loop, self._loop.state, self._loop.core
        before = state.optimizer
        made = core.make_optimizers(wanted)
        loop.executor.flush()  # deferred handlers may read the optimizer
        try:
            core.use_optimizers(state, made)
            self.use(list(state.callbacks), watched)  # which callbacks meet depends on the parameters of the optimizers
        except BaseException:
            core.use_optimizers(state, by_name(before))
            raise
        loop.checkpoints.changes.use_optimizers()
        return before

    def _accept(self, nodes: Sequence[Node], state: LearnerState) -> None:
        self._loop.sinks.check(nodes)
        self._loop.executor.check(nodes, state)

    def _check_free(self, callbacks: list[Callback]) -> None:
        """Check that no object with state belongs to another learner, or to two of these callbacks.

        Raises:
            CallbackError: An object with state belongs to another learner, or to two of the callbacks.
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
        """Record the learner as the owner of `callbacks`, and no longer of the callbacks that it had `before`."""
        for callback in before:  # all of them, also the ones that stay, which get a new entry below
            for part in callback.stateful():
                _owners.pop(id(part), None)
        me: weakref.ref[CallbackChanges] = weakref.ref(self)
        for callback in callbacks:
            for part in callback.stateful():
                gone = partial(_forget, _owners, id(part))
                _owners[id(part)] = _Owner(weakref.ref(part, gone), me, self._learner, callback.name)


def _peers(loop: Loop) -> Peers | None:
    """Return the processes that train together; ``None`` for one process."""
    core = loop.core
    if core.world is None:
        return None
    in_batch: tuple[type[Event], ...] = ()
    if core.replica.runs_bundled_steps:  # the ranks agree on a batch when they send its gradients
        in_batch = (UpdateBegin, UpdateEnd)
        if core.accumulate == 1:
            in_batch = (BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd)
    sharded, world = core.replica.forward_is_collective, core.world
    return Peers(world.rank, world.size, world.exchange, sharded=sharded, in_batch=in_batch)


def _sees_norm(node: Node) -> bool:
    """Tell whether a callback may read the norm of the gradients: it declares the norm, or the batch in training."""
    if any(path == ("batch", "grad_norm") for path, _ in node.union):
        return True
    trains = AbstractTrainingPhase
    return any(
        path == ("batch",)  # rule 4: this declaration covers the norm too
        for handler, declaration in node.access.items()
        if issubclass(handler.phase_type, trains) or issubclass(trains, handler.phase_type)
        for path, _ in declaration
    )


def _forget(owners: dict[int, _Owner], key: int, part: weakref.ref[object]) -> None:
    # `owners` is an argument, since a module's globals may be cleared already when Python calls this while it exits.
    owners.pop(key, None)


def _taken(name: str, callback: Callback, part: object, owner: _Owner) -> CallbackError:
    """Make the error for an object that belongs to another learner."""
    changes = owner.changes()
    what = name if part is callback else f"{part!r} of {name}"
    text = (
        f"{what} belongs to another learner, {owner.learner}, and would bring along the state it has gathered there. "
        f"Make a new {type(part).__name__}(...) for each learner, such as one for each fold of a cross-validation."
    )
    if changes is not None and not changes.closed and part is callback:
        text += f" To move it with that state, write other.remove_callback({owner.callback!r}) first."
    return CallbackError(text)
