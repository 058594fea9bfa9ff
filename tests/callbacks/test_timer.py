"""Timer: which time each of its series measures, with a clock that the test moves."""

from __future__ import annotations

import pytest

from flowtrain import (
    BatchBegin,
    BatchCancelled,
    Callback,
    CancelBatchException,
    CancelFittingException,
    LearnerView,
    LossBegin,
    Phase,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Timer
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import assert_equivalent, tiny_batches, tiny_learner
from tests.support.clock import Clock
from tests.support.untyped import untyped


class SlowLoader:
    """A loader that takes two seconds for each batch, and one second to end."""

    def __init__(self, clock: Clock, n_batches: int) -> None:
        self.clock = clock
        self.n_batches = n_batches

    def __iter__(self) -> object:
        for batch in tiny_batches(n_batches=self.n_batches):
            self.clock.now += 2
            yield batch
        self.clock.now += 1


class Works(Callback):
    """Takes five seconds in each step, and cancels some batches."""

    def __init__(self, clock: Clock, cancels: dict[int, type[Exception]] | None = None) -> None:
        self.clock = clock
        self.cancels = cancels or {}
        self.batches = 0

    @on(LossBegin, TrainingPhase)
    def work(self, event: LossBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.clock.now += 5
        self.batches += 1
        if self.batches in self.cancels:
            raise self.cancels[self.batches]("on purpose")

    @on(BatchCancelled)
    def clean_up(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        self.clock.now += 0.5


def timed(cancels: dict[int, type[Exception]] | None = None, n_batches: int = 3) -> tuple[Learner, Clock]:
    clock = Clock()
    learner = tiny_learner(Works(clock, cancels), Timer(clock), data=SlowLoader(clock, n_batches))
    return learner, clock


def series(learner: Learner, name: str) -> list[tuple[int, float]]:
    return list(learner.cbstate.tracehistory[TrainingPhase][name])


@pytest.mark.cpu_only("with prefetch the first wait for data is one for two batches")
def test_data_and_steps_and_epochs() -> None:
    learner, _ = timed()
    learner.fit(2)
    assert series(learner, "Time.Data") == [(step, 2.0) for step in range(1, 7)]
    assert series(learner, "Time.Step") == [(step, 5.0) for step in range(1, 7)]
    assert series(learner, "Time.Epoch") == [(3, 22.0), (6, 22.0)]


@pytest.mark.cpu_only("with prefetch the first wait for data is one for two batches")
def test_a_cancelled_batch_is_in_the_epoch_alone() -> None:
    learner, _ = timed({2: CancelBatchException})
    learner.fit(1)
    assert series(learner, "Time.Data") == [(1, 2.0), (2, 2.0)]
    assert series(learner, "Time.Step") == [(1, 5.0), (2, 5.0)]
    assert series(learner, "Time.Epoch") == [(2, 22.5)]


@pytest.mark.cpu_only("with prefetch the first wait for data is one for two batches")
def test_an_epoch_that_is_broken_off_has_no_time() -> None:
    learner, clock = timed({2: CancelFittingException})
    learner.fit(1)
    assert "Time.Epoch" not in learner.cbstate.tracehistory[TrainingPhase]
    clock.now += 1000  # time between epochs belongs to no epoch
    learner.step(TrainingPhase, tiny_batches()[0])
    assert series(learner, "Time.Data") == [(1, 2.0)]
    assert series(learner, "Time.Step") == [(1, 5.0), (2, 5.0)]


def test_phases_are_apart() -> None:
    clock = Clock()
    learner = tiny_learner(
        Works(clock),
        Timer(clock),
        data={TrainingPhase: SlowLoader(clock, 1), ValidationPhase: SlowLoader(clock, 2)},
    )
    learner.fit(1)
    assert series(learner, "Time.Epoch") == [(1, 8.0)]
    assert list(learner.cbstate.tracehistory[ValidationPhase]["Time.Epoch"]) == [(2, 5.0)]


def test_the_clock_must_be_callable() -> None:
    with pytest.raises(UsageError, match=r"Timer\(clock=1.0\): clock is a function that returns seconds"):
        Timer(untyped(1.0))


class Counting(Callback):
    """A callback that may run at the same time as the timer."""

    @on(BatchBegin)
    def count(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None: ...


def test_the_same_under_every_executor() -> None:
    """Rule 13: the number of calls of the clock is compared, since times differ from run to run."""

    def make(executor: Executor) -> Learner:
        calls = iter(range(10_000))
        return tiny_learner(Counting(), Timer(lambda: next(calls)), n_batches=3, executor=executor)

    assert_equivalent(make, executors=["dask"], ignore=[])
