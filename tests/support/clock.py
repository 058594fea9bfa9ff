"""A clock that only the test moves."""

from __future__ import annotations

from flowtrain import BatchBegin, Callback, LearnerView, Phase, on


class Clock:
    """A clock: each call returns the time that the test has set, in seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Tick(Callback):
    """A callback that moves a clock by some seconds at each batch."""

    def __init__(self, clock: Clock, seconds: float = 1.0) -> None:
        self.clock = clock
        self.seconds = seconds

    @on(BatchBegin)
    def tick(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        self.clock.now += self.seconds
