"""Callbacks: objects with handlers for events, and declarations of the state that the handlers touch.

A handler is a method marked with `on`, or a function added to an existing callback type. For a fired event and phase a
callback runs at most one handler, the most specific; `find_handler` decides. Two callbacks that touch the same state
get an order from what they declare; where that is not enough they answer with a `Resolution`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, overload

from flowtrain.callback.access import Access
from flowtrain.callback.events import Event, FitBegin, FitEnd
from flowtrain.callback.handler import Handler, Marked, mark
from flowtrain.callback.phases import Phase
from flowtrain.callback.resolution import Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.errors import AmbiguousHandlerError, CallbackError, HandlerError, is_a, is_type

__all__ = ["Callback", "Condition", "check_handlers", "check_marks", "draws_own", "find_handler", "is_quiet", "on"]

C = TypeVar("C")
CB = TypeVar("CB", bound="Callback")
E = TypeVar("E", bound=Event)
P = TypeVar("P", bound=Phase)
_Given: TypeAlias = Access | str | None
_Name: TypeAlias = str | None


class Condition:
    """Whether a handler of a callback runs at an event; asked on the training thread, before anything else.

    `flowtrain.callbacks.throttle` attaches conditions. A subclass overrides `ready`.

    Attributes:
        event_type: The events that it decides about; other events are not asked.
    """

    def __init__(self, event_type: type[Event]) -> None:
        self.event_type = event_type

    def ready(self, phase: Phase) -> bool:
        """Return whether the handler runs now. Called once for each such event."""
        raise NotImplementedError(f"{type(self).__name__} does not define ready(phase)")

    def passed(self, phase: Phase) -> None:
        """Learn that the handler runs now: every condition that was asked is ready."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `ready` needs to go on from here, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class Callback:
    """Base of all callbacks: subclass it, mark methods with `on`, declare what they touch in `state_access`.

    A callback in a learner has a unique `name`: its type's name, with ``#2`` and so on for further ones, unless it
    sets one itself. The name is the key of its state in checkpoints and reports.

    Attributes:
        conditions: What is asked before a handler runs; `flowtrain.callbacks.throttle` adds one.
        backends: The logging backends (`flowtrain.logging.LoggerBackend`) that its handlers log to. A callback may keep
            them in other attributes as well: `flowtrain.graph.held_backends` finds them all.
        deferrable: Nothing in training waits for its handlers: an executor may run them later, elsewhere, on a
            snapshot of what they declare. Such a callback declares no `Write` but on resources.
        durable: No event of it may be dropped, however far behind it is.
        access_argument: What it was given as ``access=``, for a callback that calls a function of the user. Messages
            then tell the user to pass more there, since its `state_access` is not theirs.
        stochastic: Whether the handlers of a deferrable callback draw random numbers. ``False``: never, and nothing is
            done about it. ``True``, or ``None`` for a callback that does not say: what they draw are numbers of their
            own, and training's stay as they are.
        quiet: Whether this very class is known to draw no random numbers, to change nothing that it reads and to call
            no code of the user's, so that its handlers are called as they are. A subclass says it anew, and it does
            not hold where `on` has added a handler.
        audited: Whether `Learner.audit_syncs` runs its handlers; not those that print, or wait for the device by
            purpose.
        stops_at_nan: Whether it ends training at a loss that is NaN. Where losses are read late, the core keeps the
            parameters from the updates in between.
        renaming: What the user can write to give its series another name, for messages about two of one name.
    """

    name: str = ""
    _handlers: ClassVar[dict[str, Handler]] = {}
    conditions: tuple[Condition, ...] = ()
    backends: tuple[Any, ...] = ()
    deferrable: bool = False
    durable: bool = False
    access_argument: Access | None = None
    stochastic: bool | None = None
    quiet: ClassVar[bool] = False
    audited: ClassVar[bool] = True
    stops_at_nan: ClassVar[bool] = False
    renaming: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in ("state_access", "run_after", "resolve_conflict", "setup"):
            if not callable(getattr(cls, method)):
                raise CallbackError(
                    f"{cls.__name__}.{method} is {getattr(cls, method)!r}, and must be a method: "
                    f"def {method}(self, ...): return ..."
                )
        cls._handlers = {}
        inherited = {base for parent in cls.__bases__ if issubclass(parent, Callback) for base in parent.__mro__}
        taken: set[str] = set()
        for base in cls.__mro__:  # the most derived first: it decides, as for every attribute
            if base in inherited:
                taken.update(base.__dict__.get("_handlers", ()))
                continue
            for attribute, value in list(vars(base).items()):
                if not isinstance(value, Marked) or attribute in taken:
                    continue
                taken.add(attribute)
                cls._handlers[attribute] = value.handler(cls.__name__, attribute)
                if inspect.getattr_static(cls, attribute) is value:  # not overridden without a mark
                    setattr(cls, attribute, value.function)

    @classmethod
    def add_handler(cls, key: str, handler: Handler) -> None:
        """Register a handler for this type, in place of an earlier one with the same key; `on` calls this.

        Raises:
            HandlerError: The earlier one is the same function, for another event: there are two `on` on it.
        """
        earlier = cls._handlers.get(key)
        where = (handler.event_type, handler.phase_type, handler.names)
        before = earlier and (earlier.event_type, earlier.phase_type, earlier.names)
        if earlier and earlier.function is handler.function and before != where:
            raise HandlerError(
                f"{handler.attribute} is marked by two @on, and the outer one would replace the inner one. Write two "
                f"functions for {earlier.event_type.__name__} and {handler.event_type.__name__}, and call what they "
                f"share."
            )
        cls._handlers[key] = handler

    def state_access(self) -> Access:
        """Return what the handlers touch. Called once when a learner is built; a handler's ``access=`` goes first."""
        return {}

    def run_after(self) -> tuple[type[Callback], ...]:
        """Return the types of callbacks, subclasses included, that run before this one at every shared event."""
        return ()

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Answer for a conflict with `other`: `RunFirst`, `NoConflict`, `Unresolvable`, or ``None`` for no answer."""
        return None

    def setup(self, learner: LearnerView) -> None:
        """Prepare, once, when the learner is built: make the ``cbstate`` entries that others read.

        The view allows what `state_access` and all handlers declare.
        """

    def metric_modes(self) -> Mapping[str, Literal["min", "max"]]:
        """Return, for epoch metrics that this callback records, whether small or large values are good, if known."""
        return {}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Look at all callbacks of the learner, when it is built and when they change; raise what refuses them.

        Called after every `setup`. If the change is refused, it is called again with the callbacks that stay.
        """

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series that this callback writes to its backends, where they are known when a learner is built.

        No two callbacks write one series to one backend. A series is the first part of its group, the phase, and its
        name; a name such as ``"cbstate.metrics_step"`` stands for the names of all entries there.
        """
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for this callback: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def at_rest(self) -> AbstractContextManager[None]:
        """Return a context in which what this callback has changed for a while only is as it was: nothing, here.

        A checkpoint is taken inside of it, `state_dict` included. `flowtrain.callbacks.EMA` puts the weights that are
        trained back in the model.
        """
        return nullcontext()

    def hold_judged(self, held: bool) -> bool:
        """Let the model have what evaluation judges it by, or what is trained; return whether that changes anything.

        Called with ``True`` when a checkpoint is taken after an evaluation, inside of `at_rest`, and when it has been
        loaded; with ``False`` before training goes on then. Here nothing is changed.
        """
        return False

    def stateful(self) -> Iterator[object]:
        """Yield the objects that keep state for this callback alone: itself, and its conditions.

        A learner refuses an object that another learner, or another callback, has: it would begin with the state of
        that one. Override this to add objects of your own that a user passes to the constructor.
        """
        yield self
        yield from self.conditions

    def moved(self, before: str, here: str) -> None:
        """Take note of where the checkpoint lies whose state was just loaded: nothing, here.

        A callback whose state names files can tell by it whether they are its own. `flowtrain.callbacks.Checkpointer`
        counts only the files of its folder.

        Args:
            before: The folder that the checkpoint was written into, absolute and without symbolic links.
            here: The folder that it was read from, likewise.
        """

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        """Yield the handlers of this callback, each with the type that registers it, most derived type first.

        A method that overrides a handler without `on` keeps the inherited registration; one with `on` replaces it.

        Raises:
            HandlerError: `on` was given the name of an attribute that is not there, or is no type where one belongs.
        """
        for base, handler in _registered(type(self)):
            own = handler.of(self)
            if own is not None:
                yield base, own

    def __repr__(self) -> str:
        return f"<{self.name or type(self).__name__}>"


def _registered(kind: type[Callback]) -> Iterator[tuple[type, Handler]]:
    """Yield the handlers of a type of callbacks, each with the type that registers it, most derived type first."""
    taken: set[str] = set()
    for base in kind.__mro__:
        for attribute, handler in base.__dict__.get("_handlers", {}).items():
            if attribute not in taken:
                taken.add(attribute)
                yield base, handler


def draws_own(callback: Callback) -> bool:
    """Tell whether the handlers of a deferrable callback get random numbers of their own."""
    return callback.deferrable and callback.stochastic is not False and not is_quiet(callback)


def is_quiet(callback: Callback) -> bool:
    """Tell whether all handlers of a callback are those of which `Callback.quiet` says that they are known."""
    kind = type(callback)
    return vars(kind).get("quiet", False) and all(handler.function is None for _, handler in _registered(kind))


def find_handler(
    handlers: Sequence[tuple[type, Handler]], event_type: type[Event], phase_type: type[Phase]
) -> Handler | None:
    """Return the handler that a callback runs for an event and phase, or ``None``.

    The handlers of the most derived type that has a fitting one are compared; among them the one whose event type and
    phase type are both at least as specific as every other's.

    Args:
        handlers: What `Callback.handlers` yields.
        event_type: The event.
        phase_type: The phase.

    Raises:
        AmbiguousHandlerError: No handler is the most specific one.
    """
    owner: type | None = None
    fitting: list[Handler] = []
    for base, handler in handlers:
        if fitting and base is not owner:
            break
        if issubclass(event_type, handler.event_type) and issubclass(phase_type, handler.phase_type):
            owner = base
            fitting.append(handler)
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    best = [handler for handler in fitting if all(handler.covers(other) for other in fitting)]
    if best:
        return best[0]
    one, other = fitting[:2]
    remedy = "Remove one, or merge them"
    if (event_type, phase_type) not in [(handler.event_type, handler.phase_type) for handler in fitting]:
        remedy = f"Remove one, or add a handler with @on({event_type.__name__}, {phase_type.__name__})"
    raise AmbiguousHandlerError(
        f"{one.callback_type} has two handlers for ({event_type.__name__}, {phase_type.__name__}) and neither is "
        f"more specific: {one} and {other}. {remedy}."
    )


@overload
def on(
    event_type: type[E], phase_type: str = ..., *, access: _Given = None, enabled: _Name = None
) -> Callable[[Callable[[C, E, Phase, LearnerView], None]], Callable[[C, E, Phase, LearnerView], None]]: ...
@overload
def on(
    event_type: str, phase_type: str | type[Phase] = ..., *, access: _Given = None, enabled: _Name = None
) -> Callable[[Callable[[C, Event, Phase, LearnerView], None]], Callable[[C, Event, Phase, LearnerView], None]]: ...
@overload
def on(
    event_type: type[E], phase_type: type[P], *, access: _Given = None, enabled: _Name = None
) -> Callable[[Callable[[C, E, P, LearnerView], None]], Callable[[C, E, P, LearnerView], None]]: ...
@overload
def on(
    event_type: type[E], phase_type: type[P], callback_type: type[CB], *, access: _Given = None, enabled: _Name = None
) -> Callable[[Callable[[CB, E, P, LearnerView], None]], Callable[[CB, E, P, LearnerView], None]]: ...
def on(
    event_type: type[Event] | str,
    phase_type: type[Phase] | str = Phase,
    callback_type: type[Callback] | None = None,
    *,
    access: _Given = None,
    enabled: _Name = None,
) -> Callable[[Any], Any]:
    """Mark a method as the handler of an event, or add a function as handler to an existing callback type.

    A handler takes ``(self, event, phase, learner)``, positionally, and returns nothing.

    Where instances differ, a text stands for a value: the name of an attribute or a method of the callback, which is
    looked up when a learner is built. ``@on("event_type", "phase_type")`` handles what the constructor was given.

    Args:
        event_type: The event; subclasses of it too.
        phase_type: The phase; subclasses of it too. `Phase` is any phase.
        callback_type: With it, the decorated function becomes a handler of that type. Learners that were built
            before do not change.
        access: What this handler touches, instead of `Callback.state_access`.
        enabled: The name of an attribute or method: where it is, or returns, ``None`` or ``False``, the instance does
            not have this handler.

    Raises:
        HandlerError: The types are none, the function does not take four arguments, or it is marked already.
    """
    if not isinstance(event_type, str) and not is_type(event_type, Event):
        raise HandlerError(f"on() takes an event type first, got {event_type!r}. Write @on(BatchEnd, TrainingPhase).")
    if not isinstance(phase_type, str) and not is_type(phase_type, Phase):
        raise HandlerError(f"on() takes a phase type second, got {phase_type!r}. Write @on(BatchEnd, TrainingPhase).")
    if enabled is not None and not is_a(enabled, str):
        raise HandlerError(
            f"on() got enabled={enabled!r}; enabled is the name of an attribute or method of the callback that says "
            f'whether it has this handler: @on(BatchEnd, enabled="verbose"), with self.verbose = True in __init__.'
        )
    marked = mark(event_type, phase_type, access, enabled)
    event, phase = (each if isinstance(each, str) else each.__name__ for each in (event_type, phase_type))
    if callback_type is None:
        return marked
    if not is_type(callback_type, Callback) or callback_type is Callback:
        raise HandlerError(
            f"on() adds handlers to a subclass of Callback, got {callback_type!r}. Write @on({event}, {phase}, Mine)."
        )

    def add(function: Callable[..., None]) -> Callable[..., None]:
        """Add the function to the handlers of the type."""
        wanted = marked(function).handler(callback_type.__name__, function.__name__)
        # A cell that is run again replaces its handler; the key cannot clash with a method's name.
        key = f"{function.__module__}:{function.__qualname__}"
        if function.__name__ == "_":  # no name: told apart by what it handles
            key += f" {event} {phase}"
        callback_type.add_handler(key, wanted.as_function(function))
        return function

    return add


def check_handlers(handlers: Sequence[tuple[type, Handler]]) -> None:
    """Check that every handler of a callback can run.

    Raises:
        AmbiguousHandlerError: Two handlers fit equally well.
        HandlerError: A handler is shadowed, or the phase never fires its event.
    """
    for _, handler in handlers:
        first = find_handler(handlers, handler.event_type, handler.phase_type)
        if first is not None and first is not handler:
            raise HandlerError(
                f"{handler} can never run: {first} goes before it. To replace an inherited handler override "
                f"{handler.attribute}; to run both, give the new one a more specific event or phase."
            )
        if handler.event_type in (FitBegin, FitEnd) and handler.phase_type is not Phase:
            raise HandlerError(
                f"{handler} can never run: {handler.event_type.__name__} is fired with Phase(), not with "
                f"{handler.phase_type.__name__}. Write @on({handler.event_type.__name__})."
            )
        fires = handler.phase_type.events
        ours = handler.event_type.__module__ == Event.__module__
        if handler.phase_type is Phase or fires is None or not ours:
            continue  # any phase, a phase that does not say what it fires, or an event that anybody may fire
        if not any(issubclass(event, handler.event_type) for event in fires):
            listed = ", ".join(event.__name__ for event in fires)
            raise HandlerError(
                f"{handler} can never run: {handler.phase_type.__name__} does not fire {handler.event_type.__name__}. "
                f"It fires: {listed}."
            )


_HOOKS = {
    "FitBegin": "on_fit_start on_fit_begin on_train_start on_train_begin before_fit fit_start",
    "FitEnd": "on_fit_end on_train_end after_fit fit_end",
    "EpochBegin, TrainingPhase": "on_train_epoch_start on_epoch_begin on_epoch_start before_epoch before_train "
    "epoch_start",
    "EpochEnd, TrainingPhase": "on_train_epoch_end on_epoch_end after_epoch after_train epoch_end",
    "BatchBegin, TrainingPhase": "on_train_batch_start on_train_batch_begin on_batch_begin on_batch_start "
    "on_step_begin before_batch batch_start",
    "LossBegin, TrainingPhase": "after_pred before_loss",
    "BackwardBegin, TrainingPhase": "on_before_backward before_backward after_loss",
    "BackwardEnd, TrainingPhase": "on_after_backward after_backward on_substep_end",
    "UpdateBegin, TrainingPhase": "on_before_optimizer_step on_pre_optimizer_step before_step",
    "UpdateEnd, TrainingPhase": "on_optimizer_step after_step",
    "BatchEnd, TrainingPhase": "on_train_batch_end on_batch_end on_step_end after_batch batch_end",
    "EpochBegin, ValidationPhase": "on_validation_epoch_start on_validation_start on_test_begin before_validate "
    "eval_start",
    "BatchEnd, ValidationPhase": "on_validation_batch_end on_test_batch_end on_prediction_step eval_batch_end",
    "EpochEnd, ValidationPhase": "on_validation_epoch_end on_validation_end on_test_end on_evaluate after_validate "
    "eval_end",
    "EpochCancelled": "on_exception",
}
"""The hooks of other libraries, by what to pass to `on` for the same moment."""


def check_marks(callback: Callback) -> None:
    """Check that a callback without a handler has no method that is meant as one.

    Raises:
        HandlerError: It has: a hook of another library, or a method that takes what a handler takes. Nothing would
            call it.
    """
    if type(callback).handlers is not Callback.handlers or any(_registered(type(callback))):
        return  # it decides by itself which of its methods are handlers, or this instance has not enabled them
    hooks = {name: types for types, names in _HOOKS.items() for name in names.split()}
    for kind in type(callback).__mro__[: type(callback).__mro__.index(Callback)]:
        for name, value in vars(kind).items():
            if not inspect.isfunction(value) or hasattr(Callback, name):
                continue
            if name in hooks or name.startswith("on_") or [*inspect.signature(value).parameters][1:] == _TAKES:
                types = hooks.get(name, "EpochEnd, TrainingPhase")
                raise HandlerError(
                    f"{type(callback).__name__} has no handler, so it would do nothing: no method of it is marked with "
                    f"on(), and a method is a handler by its mark, not by its name. For {name} write:\n\n"
                    f"    @on({types})\n    def {name}(self, event, phase, learner) -> None: ...\n"
                )


_TAKES = ["event", "phase", "learner"]
