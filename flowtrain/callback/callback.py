"""Callbacks: objects with handlers for events, and with declarations of the state that the handlers touch.

A handler is a method marked with `on`, or a function that `on` adds to an existing callback type. For a fired event and
phase a callback runs at most one handler, the most specific one (`find_handler`). Two callbacks that touch the same
state are ordered by their declarations; where these leave the order open the callbacks answer with a `Resolution`.

`on` leaves a `Marked` in the class body, and `Callback.__init_subclass__` turns it into a `Handler` when the class is
complete. `Callback.handlers` gives the handlers of one instance, which a learner looks up once, when it is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, overload

from flowtrain.callback.access import Access
from flowtrain.callback.conditions import Condition
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler, Marked, mark
from flowtrain.callback.phases import Phase
from flowtrain.callback.resolution import Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.errors import CallbackError, HandlerError
from flowtrain.errors.arguments import is_a, is_type, runs_nothing

__all__ = ["Callback", "draws_own", "is_quiet", "on", "recording_of", "registered"]

C = TypeVar("C")
CB = TypeVar("CB", bound="Callback")
E = TypeVar("E", bound=Event)
P = TypeVar("P", bound=Phase)
_Access: TypeAlias = Access | str | None  # as `on` takes it: a declaration, or the name of an attribute
_Name: TypeAlias = str | None


class Callback:
    """Base of all callbacks: subclass it, mark methods with `on`, and declare in `state_access` what they touch.

    A callback in a learner has a unique `name`: the name of its type, with ``#2``, ``#3``, ... for further callbacks of
    that type, unless the callback sets a name itself. The name is the key of its state in checkpoints and reports.

    Attributes:
        conditions: The conditions that are asked before a handler runs; `flowtrain.callbacks.throttle` adds one.
        backends: The logging backends (`flowtrain.logging.LoggerBackend`) that the handlers log to. A callback may keep
            backends in other attributes as well: `flowtrain.graph.held_backends` finds them all.
        deferrable: Whether the handlers only consume, so that an executor may run them later and elsewhere, on a
            snapshot of the declared state. A deferrable callback declares no `Write` except on resources, and
            ``Write(lag=n)`` on entries of ``cbstate``, which arrives n events later.
        durable: Whether every event of the callback must be processed: an executor that runs it later then waits, and
            drops no event, when events come faster than the callback handles them.
        access_argument: The declaration that a user passed as ``access=`` to a callback that calls a function of the
            user. Messages then tell the user to pass more there, since the user did not write `state_access`.
        stochastic: Whether the handlers of a deferrable callback draw random numbers. With ``False`` the handlers are
            called as they are. With ``True``, or ``None`` if the callback does not say, they draw from generators that
            are seeded for them, and the generators of training stay as they are.
        quiet: Whether the handlers of exactly this class draw no random numbers, change nothing that they read and call
            no code of the user, so that they are called as they are. A subclass does not inherit it, and it does not
            hold where `on` has added a handler.
        audited: Whether `Learner.audit_syncs` runs the handlers; ``False`` for handlers that print, or that wait for
            the device on purpose.
        stops_at_nan: Whether the callback ends training when a loss is NaN. Where losses are read late, the core then
            lets no update change the parameters between the NaN and the end of training.
        renaming: A hint for messages about two series of one name: the code that renames those of this callback.
        missing: What a user changes where the callback reads state that does not exist, for messages. By default a
            message names the declaration, which a user cannot change in a bundled callback.
        ranks: The processes (*ranks*) that run the handlers, in a training of several: ``"every"`` one, or ``"main"``,
            the first one only. With ``None`` it is the main rank for a callback that writes nothing but resources, as
            a logger does, and every rank for all other callbacks.
        agrees: Whether the author says that the handlers write the same on every rank although they read state that
            differs between ranks. Otherwise several ranks refuse a callback that reads such state and writes shared
            state without an exchange.
        may_cancel: Whether a handler may cancel a batch or an update. Several ranks ask each other before an update
            whether one of them cancels it, unless all handlers of `BackwardEnd` and `UpdateBegin` are of callbacks that
            say no. In a batch that only accumulates gradients the handlers from `BatchBegin` on count.
        may_checkpoint: Whether a handler may request a checkpoint. Several ranks refuse the request of a callback that
            does not say so. They run one that does on every rank, compare what they request each time it has run, and
            ask each other in batches that only accumulate gradients whether one of them has left the batch.
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
    missing: ClassVar[str] = ""
    ranks: Literal["every", "main"] | None = None
    agrees: ClassVar[bool] = False
    may_cancel: ClassVar[bool] = True
    may_checkpoint: ClassVar[bool] = False
    _recording: Any = None  # the object that `flowtrain.record` attaches, which keeps what the handlers are given

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A class that assigns a mapping to `state_access` would otherwise fail much later, with an error of Python's.
        for method in ("state_access", "run_after", "resolve_conflict", "setup"):
            if not callable(getattr(cls, method)):
                raise CallbackError(
                    f"{cls.__name__}.{method} is {getattr(cls, method)!r}, and must be a method: "
                    f"def {method}(self, ...): return ..."
                )
            if runs_nothing(getattr(cls, method)):
                raise CallbackError(
                    f"{cls.__name__}.{method} has async or yield in it, so calling it runs nothing of it. Write a "
                    f"plain method: def {method}(self, ...): return ..."
                )
        # Each class has a table of its own: a shared one would give the handlers of a subclass to its base too. A class
        # that has one already is a copy, as ``@dataclass(slots=True)`` makes, and its methods have lost their marks.
        cls._handlers = dict(vars(cls).get("_handlers", ()))
        inherited = {base for parent in cls.__bases__ if issubclass(parent, Callback) for base in parent.__mro__}
        taken: set[str] = {*cls._handlers}
        for base in cls.__mro__:  # the most derived class first: it decides, as for every attribute
            if base in inherited:  # these handlers are registered already, and `_registered` finds them there
                taken.update(base.__dict__.get("_handlers", ()))
                continue
            for attribute, value in list(vars(base).items()):
                if not isinstance(value, Marked) or attribute in taken:
                    continue
                taken.add(attribute)
                cls._handlers[attribute] = value.handler(cls.__name__, attribute)
                # A subclass may have overridden the method without a mark; then its method stays in the class.
                if inspect.getattr_static(cls, attribute) is value:
                    setattr(cls, attribute, value.function)

    @classmethod
    def _add_handler(cls, key: str, handler: Handler) -> None:
        """Register a handler for this type, and replace an earlier handler with the same key; `on` calls this.

        Raises:
            HandlerError: The earlier handler has the same function for another event, so the function has two `on`.
        """
        earlier = cls._handlers.get(key)
        types = (handler.event_type, handler.phase_type, handler.names)
        earlier_types = earlier and (earlier.event_type, earlier.phase_type, earlier.names)
        if earlier and earlier.function is handler.function and earlier_types != types:
            raise HandlerError(
                f"{handler.attribute} is marked by two @on, and the outer one would replace the inner one. Write a "
                f"function for {earlier.event_type.__name__} and another one for {handler.event_type.__name__}."
            )
        cls._handlers[key] = handler

    def state_access(self) -> Access:
        """Return the access of the handlers that have no ``access=``. Called once, when a learner is built."""
        return {}

    def run_after(self) -> tuple[type[Callback], ...]:
        """Return the types of callbacks, subclasses included, that run before this one at every shared event."""
        return ()

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Answer a conflict with `other`: `RunFirst`, `NoConflict`, `Unresolvable`, or ``None`` for no answer."""
        return None

    def setup(self, learner: LearnerView) -> None:
        """Prepare the callback once, when the learner is built: make the ``cbstate`` entries that other callbacks read.

        Args:
            learner: A view that allows everything that `state_access` and the handlers declare.
        """

    def metric_modes(self) -> Mapping[str, Literal["min", "max"]]:
        """Return, by the names of the epoch metrics that this callback records, whether small or large values are good.

        Metrics of which this is not known are left out.
        """
        return {}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Check all callbacks of the learner when it is built and when they change; raise an error to refuse them.

        Called after every `setup`. If the change is refused, this is called again with the callbacks that stay.
        """

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series that this callback writes to its backends, as far as they are known when it is built.

        A learner refuses two callbacks that write one series to one backend. A series is given as the first part of its
        group, the phase type and its name; a name such as ``"cbstate.metrics_step"`` stands for all entries there.
        """
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold for this callback: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""

    def at_rest(self) -> AbstractContextManager[None]:
        """Return a context in which temporary changes that this callback has made to the learner are undone.

        A checkpoint is taken within it, `state_dict` included. `flowtrain.callbacks.EMA`, which replaces the weights
        during an evaluation, puts the trained weights back into the model. The base class changes nothing.
        """
        return nullcontext()

    def hold_judged(self, held: bool) -> bool:
        """Put the weights that evaluation uses into the model, or the trained ones; return whether they differ.

        Called with ``True`` within `at_rest` when a checkpoint is taken after an evaluation, and after that checkpoint
        has been loaded; called with ``False`` before training continues. The base class changes nothing.
        """
        return False

    def rank_state(self) -> Any:
        """Return what only this rank has measured, since the other ranks have computed other batches; or ``None``.

        Called in a training of several ranks, on the training thread between two events: at the end of each epoch,
        before `EpochEnd`, and wherever else the ranks exchange messages outside of batches.

        Returns:
            A value that can be pickled. It should be small, as sums and counts are, because every rank receives those
            of all ranks.
        """
        return None

    def merge_ranks(self, states: Sequence[Any]) -> None:
        """Replace the measurements of this rank by those of all ranks, which are then equal on every rank.

        Args:
            states: What `rank_state` of this callback has returned on each rank just now, in the order of the ranks.
                Every rank gets the same list.
        """

    def stateful(self) -> Iterator[object]:
        """Yield the objects that keep state for this callback alone: the callback itself, and its conditions.

        A learner refuses an object that belongs to another callback, or to a callback of another learner, since it
        would begin with the state of that one. Override this to add objects that a user passes to the constructor.
        """
        yield self
        yield from self.conditions

    def moved(self, before: str, here: str) -> None:
        """Take note of the two folders of a checkpoint whose state was just loaded. The base class does nothing.

        A callback whose state names files can so find them where they are now (`flowtrain.callbacks.Checkpointer`).

        Args:
            before: The folder that the checkpoint was written into, absolute and without symbolic links.
            here: The folder that the checkpoint was read from, absolute and without symbolic links.
        """

    def own_folders(self) -> Sequence[Path]:
        """Return the folders into which no other run may write while a fit runs; the base class has none."""
        return ()

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        """Yield the handlers of this callback, each with the type that registers it, most derived type first.

        A method that overrides a handler without `on` keeps the inherited registration; one with `on` replaces it.

        Raises:
            HandlerError: `on` was given the name of an attribute that does not exist, or that holds no event type or
                phase type.
        """
        for base, handler in registered(type(self)):
            own = handler.for_instance(self)
            if own is not None:
                yield base, own

    def __repr__(self) -> str:
        return f"<{self.name or type(self).__name__}>"


def registered(kind: type[Callback]) -> Iterator[tuple[type, Handler]]:
    """Yield the handlers of a type of callbacks, each with the type that registers it, most derived type first."""
    taken: set[str] = set()
    for base in kind.__mro__:
        for attribute, handler in base.__dict__.get("_handlers", {}).items():
            if attribute not in taken:
                taken.add(attribute)
                yield base, handler


def draws_own(callback: Callback) -> bool:
    """Tell whether the handlers of a callback draw from generators that are seeded for them, not from training's."""
    return callback.deferrable and callback.stochastic is not False and not is_quiet(callback)


def recording_of(callback: Callback) -> Any:
    """Return the object that `flowtrain.record` has attached to a callback, or ``None``."""
    return callback._recording  # pyright: ignore[reportPrivateUsage]  # of this module


def is_quiet(callback: Callback) -> bool:
    """Tell whether `Callback.quiet` holds for all handlers of a callback: its class says it, and `on` added none."""
    # The class itself must say it: a subclass of a quiet callback may draw random numbers.
    kind = type(callback)
    return vars(kind).get("quiet", False) and all(handler.function is None for _, handler in registered(kind))


@overload
def on(
    event_type: type[E], phase_type: str = ..., *, access: _Access = None, enabled: _Name = None
) -> Callable[[Callable[[C, E, Phase, LearnerView], None]], Callable[[C, E, Phase, LearnerView], None]]:
    """Mark a method that handles an event in any phase, or in a phase that each instance chooses."""


@overload
def on(
    event_type: str, phase_type: str | type[Phase] = ..., *, access: _Access = None, enabled: _Name = None
) -> Callable[[Callable[[C, Event, Phase, LearnerView], None]], Callable[[C, Event, Phase, LearnerView], None]]:
    """Mark a method that handles an event which each instance chooses."""


@overload
def on(
    event_type: type[E], phase_type: type[P], *, access: _Access = None, enabled: _Name = None
) -> Callable[[Callable[[C, E, P, LearnerView], None]], Callable[[C, E, P, LearnerView], None]]:
    """Mark a method that handles an event in a phase."""


@overload
def on(
    event_type: type[E], phase_type: type[P], callback_type: type[CB], *, access: _Access = None, enabled: _Name = None
) -> Callable[[Callable[[CB, E, P, LearnerView], None]], Callable[[CB, E, P, LearnerView], None]]:
    """Add a function as a handler to an existing callback type."""


def on(
    event_type: type[Event] | str,
    phase_type: type[Phase] | str = Phase,
    callback_type: type[Callback] | None = None,
    *,
    access: _Access = None,
    enabled: _Name = None,
) -> Callable[[Any], Any]:
    """Mark a method as the handler of an event, or add a function as a handler to an existing callback type.

    A handler takes ``(self, event, phase, learner)``, positionally, and returns nothing.

    Where instances differ, pass a string: the name of an attribute or method of the callback, which is looked up when
    a learner is built. ``@on("event_type", "phase_type")`` handles the types that the constructor stored there.

    Args:
        event_type: The type of the events, subclasses included.
        phase_type: The type of the phases, subclasses included. `Phase` is any phase.
        callback_type: The type to which the decorated function is added as a handler. Learners that were built before
            do not change.
        access: The declaration of this handler, used instead of `Callback.state_access`.
        enabled: The name of an attribute or method. An instance does not have this handler if the attribute is, or the
            method returns, ``None`` or ``False``.

    Raises:
        HandlerError: An argument has the wrong type, the function does not take four arguments, or it is marked
            already.
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
    event, phase = (kind if isinstance(kind, str) else kind.__name__ for kind in (event_type, phase_type))
    if callback_type is None:
        return marked
    if not is_type(callback_type, Callback) or callback_type is Callback:
        raise HandlerError(
            f"on() adds handlers to a subclass of Callback, got {callback_type!r}. Write @on({event}, {phase}, Mine)."
        )

    def add(function: Callable[..., None]) -> Callable[..., None]:
        """Add the function to the handlers of the callback type."""
        handler = marked(function).handler(callback_type.__name__, function.__name__)
        # A notebook cell that is run again replaces its own handler. The colon keeps the key apart from method names.
        key = f"{function.__module__}:{function.__qualname__}"
        if function.__name__ == "_":  # functions named _ are told apart by their event and phase
            key += f" {event} {phase}"
        registered = handler.as_function(function)
        callback_type._add_handler(key, registered)  # pyright: ignore[reportPrivateUsage]  # of this module
        return function

    return add
