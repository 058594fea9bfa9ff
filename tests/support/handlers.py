"""Callbacks that run functions of the test, a plan with them, and the threads that an executor starts for the plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from flowtrain import BatchBegin, BatchEnd, Callback, Event, FitEnd, LearnerView, Phase, TrainingPhase, on
from flowtrain.graph.plan import Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState

TIMEOUT = 20.0
"""Seconds after which a test that waits for another thread has failed."""


class Does(Callback):
    """Calls functions of the test when a batch begins and ends, and when a fit ends; subclasses give more types."""

    def __init__(self, act: Callable[[LearnerView], object], after: Sequence[type[Callback]] = ()) -> None:
        self.act = act
        self.after = tuple(after)

    def run_after(self) -> tuple[type[Callback], ...]:
        return self.after

    @on(BatchEnd)
    def batch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act(learner)

    @on(BatchBegin)
    def begin(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act(learner)

    @on(FitEnd)
    def fit(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act(learner)


class A(Does): ...


class B(Does): ...


class C(Does): ...


def nothing(learner: LearnerView) -> None: ...


def plan_of(*callbacks: Callback) -> Plan:
    """Return the plan of the end of a training batch."""
    return Callbacks(callbacks, LearnerState()).plan(BatchEnd, TrainingPhase)


def own_threads() -> list[threading.Thread]:
    """Return the running threads of the executor's pool.

    `threading.enumerate` also lists threads that never started, because an interrupt came at their start.
    """
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("flowtrain-dask")]
    return [thread for thread in threads if thread.is_alive()]
