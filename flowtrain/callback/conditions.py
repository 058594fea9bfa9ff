"""Conditions: when a callback handles an event. `throttle` and its kin attach them, so do arguments like ``every=``.

A condition that counts counts the events that its callback handles, for each phase, over the callback's life; also
those that another condition holds back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from flowtrain.callback.callback import Condition
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError, is_a, whole_number

__all__ = ["After", "Before", "Counting", "Every", "EverySeconds", "Once", "When"]


class Counting(Condition):
    """Base of the conditions that count events, for each phase. A subclass calls `number` in `ready`, once."""

    def __init__(self, event_type: type[Event]) -> None:
        super().__init__(event_type)
        self._counts: dict[str, int] = {}

    def number(self, phase: Phase) -> int:
        """Count the event, and return the number it has, from 1."""
        count = self._counts[repr(phase)] = self._counts.get(repr(phase), 0) + 1
        return count

    def state_dict(self) -> dict[str, Any]:
        """Return the counts by phase."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._counts = dict(state["counts"])


class Every(Counting):
    """Let the n-th, 2n-th, ... event pass, counted for each phase.

    Args:
        event_type: The events that are counted.
        every: The n.

    Raises:
        UsageError: It is no whole number, or below 1.
    """

    def __init__(self, event_type: type[Event], every: int) -> None:
        super().__init__(event_type)
        self.every = whole_number("every", every)

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether it is a multiple of n."""
        return self.number(phase) % self.every == 0


class After(Counting):
    """Let all events but the first `n` pass, counted for each phase."""

    def __init__(self, event_type: type[Event], n: int) -> None:
        super().__init__(event_type)
        self.n = n

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether the first n are over."""
        return self.number(phase) > self.n


class Before(Counting):
    """Let the events before the `n`-th pass, counted for each phase."""

    def __init__(self, event_type: type[Event], n: int) -> None:
        super().__init__(event_type)
        self.n = n

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether the n-th is still to come."""
        return self.number(phase) < self.n


class When(Counting):
    """Let an event pass if a predicate says so.

    Args:
        event_type: The events that it decides about.
        predicate: Called with the number of the event, from 1 and for each phase, and the phase; returns a ``bool``.
    """

    def __init__(self, event_type: type[Event], predicate: Callable[[int, Phase], bool]) -> None:
        super().__init__(event_type)
        self.predicate = predicate

    def ready(self, phase: Phase) -> bool:
        """Count the event, and ask the predicate.

        Raises:
            UsageError: The predicate returned something else than ``True`` or ``False``.
        """
        answer = self.predicate(self.number(phase), phase)
        if not is_a(answer, bool):
            name = getattr(self.predicate, "__name__", repr(self.predicate))
            raise UsageError(f"The predicate {name} of when() returned {answer!r}. It returns True or False.")
        return answer


class Once(Condition):
    """Let an event pass until the handler has run once in that phase."""

    def __init__(self, event_type: type[Event]) -> None:
        super().__init__(event_type)
        self._over: list[str] = []

    def ready(self, phase: Phase) -> bool:
        """Tell whether the handler has yet to run in this phase."""
        return repr(phase) not in self._over

    def passed(self, phase: Phase) -> None:
        """Let no further event pass, now that the handler runs; another condition may have held it back before."""
        self._over.append(repr(phase))

    def state_dict(self) -> dict[str, Any]:
        """Return the phases in which the handler has run."""
        return {"over": list(self._over)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._over = list(state["over"])


class EverySeconds(Condition):
    """Let an event pass if enough time has gone by since the last one that passed; the first one passes.

    Args:
        event_type: The events that it decides about.
        seconds: How much time.
        clock: Returns the time in seconds.
    """

    def __init__(self, event_type: type[Event], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(event_type)
        self.seconds = seconds
        self.clock = clock
        self._next = float("-inf")

    def ready(self, phase: Phase) -> bool:
        """Look at the clock."""
        return self.clock() >= self._next

    def passed(self, phase: Phase) -> None:
        """Begin to wait, now that the handler runs; another condition may have kept it from running before."""
        self._next = self.clock() + self.seconds

    def state_dict(self) -> dict[str, Any]:
        """Return how many seconds are left to wait; the clock of another process says something else."""
        return {"left": max(0.0, self._next - self.clock())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Wait for what was left."""
        self._next = self.clock() + state["left"]
