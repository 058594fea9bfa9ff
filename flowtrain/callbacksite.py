"""The callbacks of a learner, from outside: found, added, replaced and removed, each as one change or not at all.

`Learner` is one of these. A change makes a new `flowtrain.registry.Callbacks`, which checks and orders all of them.
Then everybody who works for the callbacks is told: core, dispatch and sinks.

A callback has one learner, and keeps it when that is closed or gone: it holds what it has gathered there. It is free
again when it is taken out of the learner, and a learner that could not be built never had it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from flowtrain.arguments import as_list
from flowtrain.callback import Callback
from flowtrain.callbacks import Metrics, MetricsPrinter, ProgressBar, Recorder, StopOnNaNLoss
from flowtrain.errors import CallbackError, ExecutorError, UsageError
from flowtrain.graph import Node
from flowtrain.naming import unique_names
from flowtrain.registry import Callbacks
from flowtrain.state import LearnerState
from flowtrain.stepsite import StepSite
from flowtrain.strict import watch

__all__ = ["CallbackSite", "default_callbacks_for"]


class _Owner(NamedTuple):
    """Who has an object that keeps state.

    Attributes:
        part: The object; its entry goes when it does.
        site: The learner.
        learner: How the learner is written, also when it is gone.
        callback: The name of the callback.
    """

    part: weakref.ref[object]
    site: weakref.ref[CallbackSite]
    learner: str
    callback: str


_owners: dict[int, _Owner] = {}
"""The owner of each callback, condition and criterion by its id.

It is kept here and not on the object, whose copies (for a dry run, in another process) belong to nobody.
"""


class CallbackSite(StepSite):
    """A learner as who changes its callbacks sees it.

    Attributes:
        strict: Whether every handler is checked to change only what it declares.
        closed: Whether the learner is closed.
    """

    strict: bool
    closed: bool

    def get_callback(self, wanted: type[Callback] | str) -> Callback | None:
        """Return the first callback of a type, subclasses included, or of a name; ``None`` if there is none."""
        return self.callbacks.find(wanted)

    def add_callback(self, callback: Callback) -> None:
        """Add a callback at the end of the list. A refused change leaves everything as it was; so with the next."""
        self._use([*self.callbacks, callback])

    def set_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """Use these callbacks, and no default ones. Those that are there already are not set up again."""
        self._use(as_list(callbacks))

    def replace_callback(self, new: Callback) -> Callback:
        """Replace the callback of the same type, and return it.

        Raises:
            CallbackError: There is none of exactly that type, or more than one.
        """
        same = [callback for callback in self.callbacks if type(callback) is type(new)]
        if len(same) != 1:
            raise CallbackError(
                f"replace_callback({new!r}) needs exactly one {type(new).__name__} to replace; there are {len(same)}. "
                f"Use set_callbacks(...) or add_callback(...)."
            )
        self._use([new if callback is same[0] else callback for callback in self.callbacks])
        return same[0]

    def remove_callback(self, wanted: type[Callback] | str) -> Callback:
        """Remove the first callback of a type, subclasses included, or of a name, and return it.

        Raises:
            CallbackError: There is none.
        """
        found = self.callbacks.must_find(wanted)
        self._use([callback for callback in self.callbacks if callback is not found])
        return found

    def _use(self, callbacks: list[Callback]) -> None:
        self._check_open("Changing the callbacks")
        self.loop.scopes.refuse_nested("Changing the callbacks")
        phases = [type(phase) for phase in self.state.data]
        before = self.state.callbacks
        self._check_free(callbacks)
        watched = watch(self.state) if self.strict else None
        made = Callbacks(callbacks, self.state, phases, before, watched, self._accept)
        made.annotate(self.loop.executor.explain)
        self.state.callbacks = made
        named = (path for node in made.nodes for path, _ in node.union)
        self.core.need_grad_norm(("batch", "grad_norm") in named)
        self.core.guard_nan(any(isinstance(callback, StopOnNaNLoss) for callback in made))
        self.loop.dispatch.use(made)
        self._own(made, before)
        self.loop.sinks.use(made.nodes)  # last: a sink that cannot be closed is an error, and the change is done then

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise ExecutorError(f"{what} on a closed learner: its executor has given back all it held. Make a new one.")

    def _check_free(self, callbacks: list[Callback]) -> None:
        """Check that nothing that keeps state is another learner's, or is in two of these callbacks.

        Raises:
            CallbackError: Something is.
        """
        holders: dict[int, str] = {}
        for callback, name in unique_names(callbacks):
            for part in callback.stateful():
                owner = _owners.get(id(part))
                if owner is not None and owner.site() is not self:
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
        me, written = weakref.ref(self), repr(self)
        for callback in callbacks:
            for part in callback.stateful():
                gone = partial(_forget, _owners, id(part))
                _owners[id(part)] = _Owner(weakref.ref(part, gone), me, written, callback.name)

    def _accept(self, nodes: Sequence[Node], state: LearnerState) -> None:
        self.loop.sinks.check(nodes)
        self.loop.executor.check(nodes, state)


def _forget(owners: dict[int, _Owner], place: int, part: weakref.ref[object]) -> None:
    owners.pop(place, None)


def _taken(name: str, callback: Callback, part: object, owner: _Owner) -> CallbackError:
    """Make the error for an object that another learner has."""
    learner = owner.site()
    what = name if part is callback else f"{part!r} of {name}"
    text = (
        f"{what} belongs to another learner, {owner.learner}, and would bring along what it has gathered there. Make a "
        f"new {type(part).__name__}(...) for each learner, such as one for each fold of a cross-validation."
    )
    if learner is not None and not learner.closed and part is callback:
        text += f" To move it with what it has gathered, write other.remove_callback({owner.callback!r}) first."
    return CallbackError(text)


def default_callbacks_for(wanted: object, chosen: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks that a learner has without being told, except where one of that type was chosen.

    Args:
        wanted: ``True``, ``False``, or ``"quiet"``, which leaves out those that print.
        chosen: The user's.
    """
    if wanted not in (True, False, "quiet"):
        raise UsageError(f'default_callbacks={wanted!r} is not True, False or "quiet".')
    if not wanted:
        return []
    kinds: list[type[Callback]] = [Recorder, Metrics, StopOnNaNLoss]
    if wanted != "quiet":
        kinds += [ProgressBar, MetricsPrinter]
    return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in chosen)]
