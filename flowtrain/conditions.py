"""Conditions: when a callback handles an event. `throttle` attaches them, and so do arguments like ``every=``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flowtrain.callback import Condition
from flowtrain.events import Event
from flowtrain.phases import Phase

__all__ = ["Every", "EverySeconds"]


class Every(Condition):
    """Let the n-th, 2n-th, ... event pass, counted for each phase."""

    def __init__(self, event_type: type[Event], every: int) -> None:
        super().__init__(event_type)
        self.every = every
        self._counts: dict[str, int] = {}

    def ready(self, phase: Phase) -> bool:
        """Count the event, and tell whether it is a multiple of n."""
        count = self._counts[repr(phase)] = self._counts.get(repr(phase), 0) + 1
        return count % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counts by phase."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._counts = dict(state["counts"])


class EverySeconds(Condition):
    """Let an event pass if enough time has gone by since the last one that passed; the first one passes."""

    def __init__(self, event_type: type[Event], seconds: float) -> None:
        super().__init__(event_type)
        self.seconds = seconds
        self._next = float("-inf")

    def ready(self, phase: Phase) -> bool:
        """Look at the clock."""
        return time.monotonic() >= self._next

    def passed(self, phase: Phase) -> None:
        """Begin to wait, now that the handler runs; another condition may have kept it from running before."""
        self._next = time.monotonic() + self.seconds
