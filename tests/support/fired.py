"""A learner that records the events that it fires, callbacks that raise at an event, and a phase of a user."""

from __future__ import annotations

import re
from typing import Any

from flowtrain import BatchBegin, Callback, Event, Learner, LearnerView, Phase, TrainingPhase, on
from flowtrain.callback.phases import AbstractValidationPhase
from flowtrain.testing import tiny_batches, tiny_learner


class OODPhase(AbstractValidationPhase):
    """A validation phase on out-of-distribution data."""


class Watch(Callback):
    """Records every event with its phase."""

    def __init__(self) -> None:
        self.log: list[tuple[Event, Phase]] = []

    @on(Event)
    def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.log.append((event, phase))

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event, _ in self.log]


class Raise(Callback):
    """Raises once, at the n-th firing of an event."""

    def __init__(self, event_type: type[Event], exception: BaseException, nth: int = 1) -> None:
        self.event_type, self.exception, self.left = event_type, exception, nth

    @on(Event)
    def maybe(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if type(event) is self.event_type:
            self.left -= 1
            if not self.left:
                raise self.exception


class CancelAt(Callback):
    """Raises in the given batches, counted from 1 over the whole training."""

    def __init__(self, cancels: dict[int, type[Exception]]) -> None:
        self.cancels = cancels
        self.batches = 0

    @on(BatchBegin, TrainingPhase)
    def cancel(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.batches += 1
        if self.batches in self.cancels:
            raise self.cancels[self.batches]("on purpose")


def watched(*callbacks: Callback, n_batches: int = 2, **options: Any) -> tuple[Watch, Learner]:
    """Return a learner with one training phase and no default callbacks, and the list of the events that it fires."""
    watch = Watch()
    chosen: dict[str, Any] = {"data": tiny_batches(n_batches=n_batches), "default_callbacks": False, **options}
    return watch, tiny_learner(watch, *callbacks, **chosen)


def short(names: list[str]) -> str:
    """Return only the events that begin and end, abbreviated: ``F( E( B( B) E) F)``, with x for a cancelled one."""
    found = (re.fullmatch("(Fit|Epoch|Batch)(Begin|End|Cancelled)", name) for name in names)
    marks = {"Begin": "(", "End": ")", "Cancelled": "x"}
    return " ".join(match[1][0] + marks[match[2]] for match in found if match)
