"""Handlers: the registration of one method for an event and a phase.

`mark` is the decorator behind `on`: it wraps a method in a `Marked`, which waits in the class body. When the class is
complete, `Marked.handler` makes the `Handler` that knows the class and the attribute. A handler whose event, phase or
access differs between instances names attributes for them, and `Handler.for_instance` looks these up. `find_handler`
chooses among the handlers of a callback the one that runs for an event and a phase.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowtrain.callback.access import Access
from flowtrain.callback.events import Event, FitBegin, FitEnd
from flowtrain.callback.phases import Phase
from flowtrain.errors import AmbiguousHandlerError, HandlerError
from flowtrain.errors.arguments import is_type, runs_nothing
from flowtrain.errors.describing import nearest

__all__ = ["Handler", "Marked", "check_handlers", "find_handler", "is_bundled_event", "mark"]


@dataclass(frozen=True, eq=False)
class Handler:
    """A registration: the function to call for an event and a phase.

    Attributes:
        event_type: The type of the events, subclasses included.
        phase_type: The type of the phases, subclasses included.
        access: The declaration of this handler, or ``None`` for `Callback.state_access`.
        callback_type: The name of the callback type that registers the handler.
        attribute: The name of the method.
        function: A function that `on` added to the callback type; it is called with the callback as first argument.
            ``None`` for a method: it is looked up by its name, so that an override is called.
        names: The arguments of `on` that each instance decides for itself (``"event_type"``, ``"phase_type"``,
            ``"access"`` or ``"enabled"``), each with the name of the attribute or method that holds the value.
    """

    event_type: type[Event]
    phase_type: type[Phase]
    access: Access | None
    callback_type: str
    attribute: str
    function: Callable[..., None] | None = None
    names: tuple[tuple[str, str], ...] = ()

    def for_instance(self, callback: object) -> Handler | None:
        """Return the handler with the values that one callback has for `names`; ``None`` if it disables the handler.

        Raises:
            HandlerError: The callback has no attribute or method of a name, or finds no event or phase type there.
        """
        if not self.names:
            return self
        values = {argument: self._look_up(callback, argument, name) for argument, name in self.names}
        enabled = values.pop("enabled", True)
        return None if enabled is None or enabled is False else replace(self, names=(), **values)

    def _look_up(self, callback: object, argument: str, name: str) -> Any:
        """Return the value of an argument of `on` that a callback holds in an attribute, or returns from a method."""
        kind = type(callback).__name__
        where = f"{self.callback_type}.{self.attribute} takes its {argument} from {name!r}, as on() says"
        itself = "" if argument == "enabled" else f", or give on() the {argument} itself instead of a name"
        remedy = f"Set self.{name} in __init__{itself}."
        if not hasattr(type(callback), name) and name not in getattr(callback, "__dict__", {name: None}):
            hint = nearest(name, dir(callback))
            raise HandlerError(f"{where}, and {kind} has no attribute or method of that name.{hint} {remedy}")
        held = getattr(callback, name)  # an error of a property is that of the user's code, and is raised as it is
        value = held() if inspect.ismethod(held) or _asks_nothing(held) else held
        if argument == "enabled" and _is_false(value):
            return False
        base = {"event_type": Event, "phase_type": Phase}.get(argument)
        if base is not None and not is_type(value, base):
            raise HandlerError(f"{where}, and that is {value!r}, which is no subclass of {base.__name__}. {remedy}")
        return value

    def covers(self, other: Handler) -> bool:
        """Tell whether this handler is at least as specific as `other`, so that it runs instead of `other`.

        Two different handlers for the same event and phase do not cover each other: neither is the right one.
        """
        if other is self:
            return True
        if (self.event_type, self.phase_type) == (other.event_type, other.phase_type):
            return False
        return issubclass(self.event_type, other.event_type) and issubclass(self.phase_type, other.phase_type)

    def bind(self, callback: object) -> Callable[[Event, Phase, Any], None]:
        """Return the function of ``(event, phase, view)`` that calls the handler, and a recording before it."""
        function: Any = self.function
        bound: Callable[[Event, Phase, Any], None]
        bound = getattr(callback, self.attribute) if function is None else function.__get__(callback)
        recording: Any = getattr(callback, "_recording", None)
        return bound if recording is None else recording.around(callback, self, bound)

    def check(self, callback: object) -> None:
        """Check that the attribute of the callback can be called as a handler: a subclass may have overridden it.

        Raises:
            HandlerError: The attribute is no method, or does not take three arguments after ``self``.
        """
        if self.function is None:
            method = getattr(callback, self.attribute, None)
            if not callable(method):
                raise HandlerError(f"{self} is {method!r} in {type(callback).__name__}; override it with a method.")
            _check_function(method, 3)

    def as_function(self, function: Callable[..., None]) -> Handler:
        """Return this handler with a function to call that is no attribute of the callback's type."""
        return replace(self, function=function)

    def decorator(self) -> str:
        """Return the source of the decorator up to the access, as ``"@on(BatchEnd, "``, for messages."""
        types = [self.event_type.__name__]
        if self.function is not None:
            types += [self.phase_type.__name__, self.callback_type]
        elif self.phase_type is not Phase:
            types.append(self.phase_type.__name__)
        return f"@on({', '.join(types)}, "

    def __str__(self) -> str:
        return f"{self.callback_type}.{self.attribute} on ({self.event_type.__name__}, {self.phase_type.__name__})"


@dataclass(frozen=True)
class Marked:
    """A method that is marked with `on`, until its class is complete and `Callback` puts the function back.

    Attributes:
        event_type: As for `Handler`.
        phase_type: As for `Handler`.
        access: As for `Handler`.
        function: The method as it was defined.
        names: As for `Handler`.
    """

    event_type: type[Event]
    phase_type: type[Phase]
    access: Access | None
    function: Callable[..., None]
    names: tuple[tuple[str, str], ...] = ()

    def handler(self, callback_type: str, attribute: str) -> Handler:
        """Return the registration for the class that has the method."""
        return Handler(self.event_type, self.phase_type, self.access, callback_type, attribute, names=self.names)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind like a method: in a class that is no `Callback`, such as a mixin, the mark stays and must do no harm."""
        return self if instance is None else self.function.__get__(instance, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function, as ``Mixin.method(instance, ...)`` does."""
        self.function(*args, **kwargs)


def mark(
    event_type: type[Event] | str,
    phase_type: type[Phase] | str,
    access: Access | str | None,
    enabled: str | None = None,
) -> Callable[[Any], Marked]:
    """Return the decorator of `on` for methods."""
    given = {"event_type": event_type, "phase_type": phase_type, "access": access, "enabled": enabled}
    names = tuple((argument, name) for argument, name in given.items() if isinstance(name, str))
    # A name of an attribute is replaced by its value in `Handler.for_instance`; until then the type stands for any.
    event = Event if isinstance(event_type, str) else event_type
    phase = Phase if isinstance(phase_type, str) else phase_type
    declared = None if isinstance(access, str) else access

    def decorate(function: Any) -> Marked:
        """Return the method, wrapped with the arguments of `on`."""
        if isinstance(function, Marked):
            raise HandlerError(
                f"{function.function.__qualname__} is marked by two @on; a method handles one event. Write two methods "
                f"for {function.event_type.__name__} and {event.__name__}, and call what they share."
            )
        method: Callable[..., None] = function
        if not callable(function):
            raise HandlerError(
                f"@on({event.__name__}) marks a method, got {function!r}. Write it above a def of a Callback."
            )
        _check_function(method)
        return Marked(event, phase, declared, method, names)

    return decorate


def _check_function(function: Callable[..., Any], count: int = 4) -> None:
    """Check that a function can be called with `count` arguments, and that the call runs all of its code."""
    if runs_nothing(function):
        raise HandlerError(
            f"{function.__qualname__} cannot be a handler: it has async or yield in it, so calling it runs nothing of "
            f"it. Write a plain function that does its work and returns None."
        )
    try:
        # Binding finds wrong parameters without a call, and lets defaults and ``*args`` pass.
        inspect.signature(function).bind(*[None] * count)
    except TypeError as error:
        name = getattr(function, "__qualname__", repr(function))
        raise HandlerError(
            f"{name}{inspect.signature(function)} cannot be a handler, which is called with "
            f"{', '.join(['self', 'event', 'phase', 'learner'][4 - count :])}: {error}. "
            f"Write def {getattr(function, '__name__', 'handler')}(self, event, phase, learner) -> None."
        ) from None
    except ValueError:
        return  # a builtin without a signature


def _asks_nothing(value: object) -> bool:
    """Tell whether a value is a function without arguments, such as a static method or a lambda, that gives a value."""
    if not inspect.isroutine(value):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):  # it has arguments, so it is a setting itself; or it is a builtin
        return False
    return True


def _is_false(value: Any) -> bool:
    """Tell whether a value is the ``False`` of NumPy or of a tensor, which only a comparison of its content shows."""
    kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return kind == "bool" and getattr(value, "shape", None) == () and not value


def is_bundled_event(event_type: type[Event]) -> bool:
    """Tell whether an event type is one of the library's, which the loop fires; any handler may fire a user's event."""
    return event_type.__module__ == Event.__module__


def find_handler(
    handlers: Sequence[tuple[type, Handler]], event_type: type[Event], phase_type: type[Phase]
) -> Handler | None:
    """Return the handler that a callback runs for an event and phase, or ``None`` if it has no handler for them.

    Only the handlers of the most derived type with a fitting handler are compared. Among these, the event type and the
    phase type of the result are both at least as specific as those of every other one.

    Args:
        handlers: The handlers as `Callback.handlers` yields them, most derived type first.
        event_type: The type of the event.
        phase_type: The type of the phase.

    Raises:
        AmbiguousHandlerError: No handler is the most specific one.
    """
    owner: type | None = None
    fitting: list[Handler] = []
    for base, handler in handlers:
        if fitting and base is not owner:  # the handlers of a base class do not compete with those of a derived one
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
    # A handler for exactly this event and phase would be more specific than both, unless one of them is for exactly it.
    remedy = "Remove one, or merge them"
    if (event_type, phase_type) not in [(handler.event_type, handler.phase_type) for handler in fitting]:
        remedy = f"Remove one, or add a handler with @on({event_type.__name__}, {phase_type.__name__})"
    raise AmbiguousHandlerError(
        f"{one.callback_type} has two handlers for ({event_type.__name__}, {phase_type.__name__}) and neither is "
        f"more specific: {one} and {other}. {remedy}."
    )


def check_handlers(handlers: Sequence[tuple[type, Handler]]) -> None:
    """Check that every handler of a callback can run.

    Raises:
        AmbiguousHandlerError: Two handlers fit an event equally well.
        HandlerError: Another handler always runs instead of one, or the phase of a handler never fires its event.
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
        if handler.phase_type is Phase or fires is None or not is_bundled_event(handler.event_type):
            continue  # any phase; a phase that does not list its events; a user's event, which any handler may fire
        if not any(issubclass(event, handler.event_type) for event in fires):
            listed = ", ".join(event.__name__ for event in fires)
            raise HandlerError(
                f"{handler} can never run: {handler.phase_type.__name__} does not fire {handler.event_type.__name__}. "
                f"It fires: {listed}. Handle one of these, or another phase."
            )
