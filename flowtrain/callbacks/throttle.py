"""throttle: let a callback handle an event only now and then."""

from __future__ import annotations

from typing import TypeVar

from flowtrain.callback import Callback
from flowtrain.conditions import Every, EverySeconds
from flowtrain.errors import UsageError, is_a, is_type
from flowtrain.events import Event

__all__ = ["throttle"]

CB = TypeVar("CB", bound=Callback)


def throttle(callback: CB, event_type: type[Event], *, every: int | None = None, seconds: float | None = None) -> CB:
    """Let a callback handle an event only every n-th time, or at most once in some seconds; return the callback.

    The condition is attached to the callback, which stays what it is: ``run_after``, conflicts and `get_callback`
    see its own type. Several conditions on one callback all count, and its handler runs where all of them agree.
    Throttle a callback before a learner gets it.

    Args:
        callback: The callback.
        event_type: The event, subclasses included; other events are not throttled.
        every: Let the n-th, 2n-th, ... event pass, counted for each phase over the callback's life.
        seconds: Let an event pass when this much time has gone by since the last that passed. The result of such a
            run depends on the clock.

    Raises:
        UsageError: Not exactly one of the two, a value that means nothing, or an event that the callback does not
            handle.

    >>> from flowtrain import EpochEnd
    >>> from flowtrain.callbacks import MetricsPrinter
    >>> throttle(MetricsPrinter(), EpochEnd, every=10)
    <MetricsPrinter>
    """
    example = "throttle(Printer(), BatchEnd, every=10)"
    if not is_a(callback, Callback):
        raise UsageError(f"throttle() takes a callback first, got {callback!r}. Write {example}.")
    if not is_type(event_type, Event):
        raise UsageError(f"throttle() takes an event type second, got {event_type!r}. Write {example}.")
    if (every is None) == (seconds is None):
        raise UsageError(f"throttle() takes either every= or seconds=: {example}.")
    if every is not None and (not is_a(every, int) or isinstance(every, bool) or every < 1):
        raise UsageError(f"throttle(every={every!r}): every is a whole number, at least 1.")
    if seconds is not None and (not is_a(seconds, (int, float)) or not seconds > 0):
        raise UsageError(f"throttle(seconds={seconds!r}): seconds must be positive.")
    handled = [handler.event_type for _, handler in callback.handlers()]
    if not any(issubclass(kind, event_type) or issubclass(event_type, kind) for kind in handled):
        listed = ", ".join(dict.fromkeys(kind.__name__ for kind in handled)) or "nothing"
        raise UsageError(
            f"throttle({type(callback).__name__}(), {event_type.__name__}): the callback does not handle "
            f"{event_type.__name__}; it handles {listed}."
        )
    condition = Every(event_type, every) if every is not None else EverySeconds(event_type, seconds or 0.0)
    callback.conditions = (*callback.conditions, condition)
    return callback
