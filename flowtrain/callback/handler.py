"""One handler: for which event and phase, with which function, under which access."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from flowtrain.callback.access import Access
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import HandlerError, is_type, nearest

__all__ = ["Handler", "Marked", "mark"]


@dataclass(frozen=True, eq=False)
class Handler:
    """A registration: what to call for which event and phase.

    Attributes:
        event_type: The event, subclasses included.
        phase_type: The phase, subclasses included.
        access: What the handler touches, or ``None`` for the callback's `state_access`.
        callback_type: The name of the type that registers it.
        attribute: The name of the method.
        function: The function to call with the callback as first argument, or ``None``: the method of that name, so
            that an override is called.
        names: What each instance of the callback decides for itself (``"event_type"``, ``"phase_type"``, ``"access"``
            or ``"enabled"``), each with the name of the attribute or method that says it. `of` looks them up.
    """

    event_type: type[Event]
    phase_type: type[Phase]
    access: Access | None
    callback_type: str
    attribute: str
    function: Callable[..., None] | None = None
    names: tuple[tuple[str, str], ...] = ()

    def of(self, callback: object) -> Handler | None:
        """Return the handler as one instance of its callback has it; ``None`` if that has not enabled it.

        Raises:
            HandlerError: The instance has no attribute or method of a name, or it says something else than a type.
        """
        if not self.names:
            return self
        said = {what: self._said(callback, what, name) for what, name in self.names}
        enabled = said.pop("enabled", True)
        return None if enabled is None or enabled is False else replace(self, names=(), **said)

    def _said(self, callback: object, what: str, name: str) -> Any:
        kind = type(callback).__name__
        where = f"{self.callback_type}.{self.attribute} takes its {what} from {name!r}, as on() says"
        remedy = f"Set self.{name} in __init__, or write what it is: @on(BatchEnd, TrainingPhase, access={{...}})."
        try:
            said = getattr(callback, name)
        except AttributeError as error:
            hint = nearest(name, dir(callback))
            raise HandlerError(
                f"{where}, and {kind} has no attribute or method of that name.{hint} {remedy}"
            ) from error
        value = said() if inspect.ismethod(said) else said
        base = {"event_type": Event, "phase_type": Phase}.get(what)
        if base is not None and not is_type(value, base):
            raise HandlerError(f"{where}, and that is {value!r}, which is no subclass of {base.__name__}. {remedy}")
        return value

    def covers(self, other: Handler) -> bool:
        """Tell whether this handler is at least as specific as `other`, and not the same registration twice."""
        if other is self:
            return True
        if (self.event_type, self.phase_type) == (other.event_type, other.phase_type):
            return False
        return issubclass(self.event_type, other.event_type) and issubclass(self.phase_type, other.phase_type)

    def bind(self, callback: object) -> Callable[[Event, Phase, Any], None]:
        """Return what to call with ``(event, phase, view)``."""
        if self.function is None:
            return getattr(callback, self.attribute)  # type: ignore[no-any-return]  # a method found by name
        return self.function.__get__(callback)  # type: ignore[no-any-return]  # binds like a method

    def check(self, callback: object) -> None:
        """Check that what an override left under the method's name can still be called as a handler.

        Raises:
            HandlerError: It cannot.
        """
        if self.function is None:
            method = getattr(callback, self.attribute, None)
            if not callable(method):
                raise HandlerError(f"{self} is {method!r} in {type(callback).__name__}; override it with a method.")
            _check_function(method, 3)

    def as_function(self, function: Callable[..., None]) -> Handler:
        """Return the same handler for a function that is no attribute of the callback's type."""
        return replace(self, function=function)

    def decorator(self) -> str:
        """Return the decorator as source, up to the access."""
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
    """A method under `on` until its class is complete: `Callback` takes the function out again."""

    event_type: type[Event]
    phase_type: type[Phase]
    access: Access | None
    function: Callable[..., None]
    names: tuple[tuple[str, str], ...] = ()

    def handler(self, callback_type: str, attribute: str) -> Handler:
        """Return the registration for the class that has it."""
        return Handler(self.event_type, self.phase_type, self.access, callback_type, attribute, names=self.names)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind like a method: in a class that is no `Callback`, as a mixin for one, the mark has no effect."""
        return self if instance is None else self.function.__get__(instance, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function, as when a method of the class itself is called."""
        self.function(*args, **kwargs)


def mark(
    event_type: type[Event] | str,
    phase_type: type[Phase] | str,
    access: Access | str | None,
    enabled: str | None = None,
) -> Callable[[Any], Marked]:
    """Return the decorator of `on` for methods."""
    given = {"event_type": event_type, "phase_type": phase_type, "access": access, "enabled": enabled}
    names = tuple((what, name) for what, name in given.items() if isinstance(name, str))
    event = Event if isinstance(event_type, str) else event_type
    phase = Phase if isinstance(phase_type, str) else phase_type
    declared = None if isinstance(access, str) else access

    def decorate(function: Any) -> Marked:
        """Return the function with what it handles."""
        if isinstance(function, Marked):
            raise HandlerError(
                f"{function.function.__qualname__} is marked by two @on; a method handles one event. Write two methods "
                f"for {function.event_type.__name__} and {event.__name__}, and call what they share."
            )
        method: Callable[..., None] = function
        if not callable(function):
            raise HandlerError(f"@on({event.__name__}) marks a method, got {function!r}.")
        _check_function(method)
        return Marked(event, phase, declared, method, names)

    return decorate


def _check_function(function: Callable[..., Any], count: int = 4) -> None:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(kind(function) for kind in kinds):
        raise HandlerError(
            f"{function.__qualname__} cannot be a handler: it has async or yield in it, so calling it runs nothing of "
            f"it. Write a plain function that does its work and returns None."
        )
    try:
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
