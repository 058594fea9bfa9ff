"""Conditions: objects that decide which events a callback handles and which it skips.

`flowtrain.callbacks.throttle` and its relatives attach conditions to a callback, and so do arguments like ``every=``.
All conditions of a callback are asked at each event that it has a handler for, and the handler runs if all of them are
ready. So a condition that counts events (`Counting`) also counts the events that another condition skips. It counts for
each phase separately, over the whole life of the callback, and its counts are part of checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, is_positive, is_type, whole_number

__all__ = ["After", "Before", "Condition", "Counting", "Every", "EverySeconds", "Once", "When"]


class Condition:
    """Decides at an event whether a callback handles it. A subclass overrides `ready`.

    Conditions are asked on the training thread, before a snapshot is taken and before the handler is called.

    Attributes:
        event_type: The condition is asked at events of this type, subclasses included, and at no others.

    Raises:
        UsageError: `event_type` is no type of events.
    """

    def __init__(self, event_type: type[Event]) -> None:
        if not is_type(event_type, Event):
            raise UsageError(
                f"{type(self).__name__}({event_type!r}): a condition is asked at events of a type. Write BatchEnd."
            )
        self.event_type = event_type

    def ready(self, phase: Phase) -> bool:
        """Return whether the callback may handle the current event. Called exactly once for each event."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define ready(phase). Define it: it returns whether the callback may "
            f"handle the event."
        )

    def passed(self, phase: Phase) -> None:
        """Take note that the handler runs now, because all conditions of the callback are ready."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


class Counting(Condition):
    """Base of the conditions that count events, for each phase. `ready` of a subclass calls `number` once."""

    def __init__(self, event_type: type[Event]) -> None:
        super().__init__(event_type)
        self._counts: dict[str, int] = {}  # by the name of the phase, since a checkpoint holds plain values only

    def number(self, phase: Phase) -> int:
        """Count the current event, and return its number in this phase, from 1."""
        count = self._counts[repr(phase)] = self._counts.get(repr(phase), 0) + 1
        return count

    def state_dict(self) -> dict[str, Any]:
        """Return the counts by phase."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts that `state_dict` returned."""
        self._counts = dict(state["counts"])


class Every(Counting):
    """Let the n-th, 2n-th, ... event pass, counted for each phase.

    Args:
        event_type: The type of the events that are counted.
        every: The n, at least 1.

    Raises:
        UsageError: `every` is no whole number, or below 1.
    """

    def __init__(self, event_type: type[Event], every: int) -> None:
        super().__init__(event_type)
        self.every = whole_number("Every(): every", every)

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether its number is a multiple of n."""
        return self.number(phase) % self.every == 0


class After(Counting):
    """Let all events but the first `n` pass, counted for each phase.

    Args:
        event_type: The type of the events that are counted.
        n: The number of events that do not pass, at least 1: with 0 the condition would do nothing.

    Raises:
        UsageError: `n` is no whole number, or below 1.
    """

    def __init__(self, event_type: type[Event], n: int) -> None:
        super().__init__(event_type)
        self.n = whole_number("after(): n", n)

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether the first n are over."""
        return self.number(phase) > self.n


class Before(Counting):
    """Let the events before the `n`-th pass, counted for each phase.

    Args:
        event_type: The type of the events that are counted.
        n: The number of the first event that does not pass, at least 2: with 1 no event would pass.

    Raises:
        UsageError: `n` is no whole number, or below 2.
    """

    def __init__(self, event_type: type[Event], n: int) -> None:
        super().__init__(event_type)
        self.n = whole_number("before(): n", n, least=2)

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether the n-th is still to come."""
        return self.number(phase) < self.n


class When(Counting):
    """Let an event pass if a predicate says so.

    Args:
        event_type: The type of the events that the condition decides about.
        predicate: A function of the number of the event (from 1, counted for each phase) and the phase; it returns a
            ``bool``.

    Raises:
        UsageError: `predicate` cannot be called.
    """

    def __init__(self, event_type: type[Event], predicate: Callable[[int, Phase], bool]) -> None:
        super().__init__(event_type)
        if not callable(predicate):
            raise UsageError(
                f"When(..., {predicate!r}): the predicate is a function of the event's number and the phase: "
                f"lambda number, phase: number < 10."
            )
        self.predicate = predicate

    def ready(self, phase: Phase) -> bool:
        """Count the event, and ask the predicate.

        Raises:
            UsageError: The predicate returned something else than ``True`` or ``False``.
        """
        # The event is counted before the predicate may raise, so that later numbers are right.
        answer = self.predicate(self.number(phase), phase)
        if not is_a(answer, bool):
            name = getattr(self.predicate, "__name__", repr(self.predicate))
            raise UsageError(
                f"The predicate {name} of when() returned {answer!r}. The answer decides whether the handler runs, so "
                f"it must be True or False: write bool(...) around it."
            )
        return answer


class Once(Condition):
    """Let events of a phase pass until the handler has run once in that phase."""

    def __init__(self, event_type: type[Event]) -> None:
        super().__init__(event_type)
        self._finished: list[str] = []

    def ready(self, phase: Phase) -> bool:
        """Tell whether the handler has not run in this phase yet."""
        return repr(phase) not in self._finished

    def passed(self, phase: Phase) -> None:
        """Let no further event of this phase pass. `ready` does not, since another condition may skip its event."""
        self._finished.append(repr(phase))

    def state_dict(self) -> dict[str, Any]:
        """Return the phases in which the handler has run."""
        return {"over": list(self._finished)}  # the key is part of the format of checkpoints

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the phases that `state_dict` returned."""
        self._finished = list(state["over"])


class EverySeconds(Condition):
    """Let the first event pass, and then each event that comes late enough after the last one that passed.

    Args:
        event_type: The type of the events that the condition decides about.
        seconds: The shortest time between two events that pass, in seconds.
        clock: A function that returns the time in seconds; it never goes back.

    Raises:
        UsageError: `seconds` is no number above zero.
    """

    def __init__(self, event_type: type[Event], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(event_type)
        if not is_positive(seconds):
            raise UsageError(f"EverySeconds(..., {seconds!r}): seconds is a number above zero, such as 30.")
        self.seconds = seconds
        self.clock = clock
        self._next = float("-inf")

    def ready(self, phase: Phase) -> bool:
        """Tell whether the time since the last event that passed is over."""
        # The next time is set when the handler runs, since another condition may still refuse this event.
        return self.clock() >= self._next

    def passed(self, phase: Phase) -> None:
        """Begin to wait. `ready` does not begin it, since another condition may skip its event."""
        self._next = self.clock() + self.seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds that are left to wait: the clock of another process begins elsewhere."""
        return {"left": max(0.0, self._next - self.clock())}  # before the first event `_next` is minus infinity

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Wait for the seconds that `state_dict` returned, counted from now."""
        self._next = self.clock() + state["left"]
