"""throttle, once, after, before and when: let a callback handle only some of the events of a type.

=============================================  =====================================================================
``throttle(callback, BatchEnd, every=10)``     at the 10th, 20th, ... event
``throttle(callback, BatchEnd, seconds=60)``   at the first event, then when a minute has passed since the last one
``once(callback, BatchEnd)``                   at the first event
``after(callback, BatchEnd, 100)``             from the 101st event on
``before(callback, BatchEnd, 100)``            up to the 99th event
``when(callback, BatchEnd, predicate)``        at each event for which ``predicate(number, phase)`` is true
=============================================  =====================================================================

Each function attaches a condition to the callback and returns the same callback, so ``run_after``, conflicts and
`get_callback` see its own type. If a callback has several conditions, each counts all events, and a handler runs when
all conditions agree: ``throttle(after(callback, BatchEnd, 100), BatchEnd, every=10)``. Conditions are asked on the
training thread, before any state is copied for a deferred handler. Events are counted for each phase over the life of
the callback, and the counts are in checkpoints. Attach conditions before a learner gets the callback.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from flowtrain.callback.callback import Callback
from flowtrain.callback.conditions import After, Before, Condition, Every, EverySeconds, Once, When
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, is_positive, is_type, whole_number

__all__ = ["after", "before", "once", "throttle", "when"]

CB = TypeVar("CB", bound=Callback)


def throttle(
    callback: CB,
    event_type: type[Event],
    *,
    every: int | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> CB:
    """Let a callback handle only every n-th event, or at most one event in some seconds; return the callback.

    Args:
        callback: The callback.
        event_type: The event, subclasses included; other events are not throttled.
        every: Handle the n-th, 2n-th, ... event, counted for each phase over the life of the callback.
        seconds: Handle an event if this many seconds have passed since the last handled one. The result of such a run
            depends on the clock.
        clock: A function that returns the time in seconds, for `seconds`.

    Raises:
        UsageError: Both or neither of `every` and `seconds` are given, one of them is out of its range, or the
            callback does not handle the event.

    >>> from flowtrain import EpochEnd
    >>> from flowtrain.callbacks import MetricsPrinter
    >>> throttle(MetricsPrinter(), EpochEnd, every=10)
    <MetricsPrinter>
    """
    _check("throttle", callback, event_type, "every=10")
    if (every is None) == (seconds is None):
        raise UsageError(
            f"throttle(every={every!r}, seconds={seconds!r}) takes one of the two: throttle(Printer(), BatchEnd, "
            f"every=10)."
        )
    if every is not None:
        return _attach(callback, Every(event_type, whole_number("throttle(): every", every)))
    if seconds is None or not is_positive(seconds):
        raise UsageError(f"throttle(seconds={seconds!r}): seconds is a number above zero, such as 30.")
    return _attach(callback, EverySeconds(event_type, seconds, clock))


def once(callback: CB, event_type: type[Event]) -> CB:
    """Let a callback handle only the first event in each phase; return the callback.

    Args:
        callback: The callback.
        event_type: The event. With subclasses only the first event of all these types is handled.

    Raises:
        UsageError: The callback does not handle the event.
    """
    _check("once", callback, event_type)
    return _attach(callback, Once(event_type))


def after(callback: CB, event_type: type[Event], n: int) -> CB:
    """Let a callback handle all events but the first `n`; return the callback.

    Args:
        callback: The callback.
        event_type: The event, subclasses included.
        n: The number of events that are not handled, counted for each phase.

    Raises:
        UsageError: `n` is no whole number, or below 1, or the callback does not handle the event.
    """
    _check("after", callback, event_type, "100")
    return _attach(callback, After(event_type, n))


def before(callback: CB, event_type: type[Event], n: int) -> CB:
    """Let a callback handle only the events before the `n`-th; return the callback.

    Args:
        callback: The callback.
        event_type: The event, subclasses included.
        n: The number of the first event that is not handled, counted for each phase.

    Raises:
        UsageError: `n` is no whole number, or below 2, or the callback does not handle the event.
    """
    _check("before", callback, event_type, "100")
    return _attach(callback, Before(event_type, n))


def when(callback: CB, event_type: type[Event], predicate: Callable[[int, Phase], bool]) -> CB:
    """Let a callback handle only the events for which a predicate is true; return the callback.

    Args:
        callback: The callback.
        event_type: The event, subclasses included.
        predicate: Called at each such event with its number, from 1 and counted for each phase, and the phase; returns
            a ``bool``.

    Raises:
        UsageError: `predicate` cannot be called, or the callback does not handle the event. At the event: `predicate`
            does not return a ``bool``.

    >>> from flowtrain import EpochEnd
    >>> from flowtrain.callbacks import MetricsPrinter
    >>> when(MetricsPrinter(), EpochEnd, lambda number, phase: number.bit_count() == 1)  # 1, 2, 4, 8, ...
    <MetricsPrinter>
    """
    _check("when", callback, event_type, "predicate")
    if not callable(predicate):
        raise UsageError(
            f"when(..., {predicate!r}): the predicate is a function of the event's number and the phase: "
            f"lambda number, phase: number < 10."
        )
    return _attach(callback, When(event_type, predicate))


def _check(name: str, callback: Callback, event_type: type[Event], last: str = "") -> None:
    """Check the first two arguments of a function of this module.

    Args:
        name: The name of the function.
        callback: Its first argument.
        event_type: Its second argument.
        last: Its further arguments as an example writes them.

    Raises:
        UsageError: `callback` is no callback or does not handle the event, or `event_type` is no event type.
    """
    example = f"{name}(Printer(), BatchEnd{', ' if last else ''}{last})"
    if not is_a(callback, Callback):
        raise UsageError(f"{name}() takes a callback first, got {callback!r}. Write {example}.")
    if not is_type(event_type, Event):
        raise UsageError(f"{name}() takes an event type second, got {event_type!r}. Write {example}.")
    handled = [handler.event_type for _, handler in callback.handlers()]
    # Either type may be the wider one: a handler of `Event` handles `BatchEnd`, and ``throttle(..., Event)`` any event.
    if not any(issubclass(kind, event_type) or issubclass(event_type, kind) for kind in handled):
        listed = ", ".join(dict.fromkeys(kind.__name__ for kind in handled)) or "nothing"
        raise UsageError(
            f"{name}({type(callback).__name__}(), {event_type.__name__}): the callback does not handle "
            f"{event_type.__name__}; it handles {listed}."
        )


def _attach(callback: CB, condition: Condition) -> CB:
    callback.conditions = (*callback.conditions, condition)
    return callback
