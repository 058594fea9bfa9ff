"""The estimate of `what_if`: what it is made of, and that it orders callbacks as a real run does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    BatchEnd,
    Callback,
    ExecutorError,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    Write,
    on,
)
from flowtrain.graph.what_if import DeferredSavings, ParallelSavings, WhatIf
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor


class Waits(Callback):
    """Waits for some milliseconds at the end of each batch."""

    stochastic: bool | None = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(self.seconds)


class First(Waits):
    """Writes an entry of the batch."""

    @on(BatchEnd, TrainingPhase, access={"batch.first": Write()})
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(self.seconds)
        learner.batch.first = 1


class Second(Waits):
    """Reads that entry."""

    @on(BatchEnd, TrainingPhase, access={"batch.first": Read()})
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(self.seconds)


class Deferred(Waits):
    """The same, deferrable."""

    deferrable = True


class Draws(Deferred):
    """Draws random numbers, which no thread may."""

    stochastic: bool | None = None

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        torch.rand(1)


class Cheap(Deferred):
    """The same, and does nothing."""

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        pass


def estimated(folder: Path, executor: Any, *callbacks: Callback) -> tuple[Learner, WhatIf]:
    """Fit a learner with a timeline, and return it with the estimate of its executor."""
    learner = tiny_learner(*callbacks, n_batches=6, executor=executor, default_callbacks=False)
    learner.fit(1, timeline=folder / "timeline.json")
    found: WhatIf = learner.executor.what_if()  # type: ignore[attr-defined]  # the executors of flowtrain have it
    return learner, found


def at_batch_end(found: WhatIf) -> ParallelSavings:
    (one,) = (each for each in found.parallel if (each.event, each.phase) == ("BatchEnd", "TrainingPhase"))
    return one


def by_handler(found: WhatIf) -> dict[str, DeferredSavings]:
    return {each.handler: each for each in found.deferred}


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_the_longest_path_bounds_what_is_saved(tmp_path: Path, executor: str) -> None:
    chosen = DaskExecutor(workers=2, parallel="never") if executor == "dask" else executor
    learner, found = estimated(tmp_path, chosen, First(0.004), Second(0.004), Waits(0.003))
    with learner:
        event = at_batch_end(found)
        assert event.firings == 6
        assert event.path == ("First.wait", "Second.wait")
        assert event.critical >= 0.008
        assert event.serial == pytest.approx(event.critical + found_cost(learner, "Waits"))
        assert event.critical <= event.parallel < event.serial
        if found.workers >= 2 and executor == "dask":
            assert event.strands == (("First.wait", "Second.wait"), ("Waits.wait",)), "as the graph allows"
            assert event.saves == pytest.approx(event.serial - event.critical)


def found_cost(learner: Learner, name: str) -> float:
    drawing = learner.callbacks.draw(BatchEnd, TrainingPhase)
    (position,) = (at for at, label in enumerate(drawing.labels) if label == f"{name}.wait")
    return drawing.times[position]


def test_the_strands_are_those_of_a_run_in_parallel(tmp_path: Path) -> None:
    """The executor that runs in parallel spreads the handlers as the estimate says."""
    learner, found = estimated(
        tmp_path, DaskExecutor(workers=2, parallel="always"), First(0.004), Second(0.004), Waits(0.003)
    )
    with learner:
        text = learner.callbacks.explain()
    strands = " | ".join(", ".join(label.split(".")[0] for label in each) for each in at_batch_end(found).strands)
    assert f"[parallel: parallel='always'; strands: {strands}]" in text


def test_handlers_of_deferrable_callbacks(tmp_path: Path) -> None:
    learner, found = estimated(tmp_path, "serial", Deferred(0.004), Cheap(0.0), Draws(0.0), Waits(0.001))
    with learner:
        lanes = by_handler(found)
        assert set(lanes) == {"Deferred.wait", "Cheap.wait", "Draws.wait"}
        slow, cheap, draws = lanes["Deferred.wait"], lanes["Cheap.wait"], lanes["Draws.wait"]
        assert slow.in_place >= 0.004
        assert slow.handing_over is not None
        assert slow.saves == pytest.approx(slow.in_place - slow.handing_over)
        assert cheap.why_not == "a lane gains nothing below 200.0 µs"
        assert draws.handing_over is None
        assert draws.why_not.startswith("it may draw random numbers (rand in Draws.wait)")
        assert slow.saves > cheap.saves == draws.saves == 0


def test_a_handler_that_is_deferred_has_the_measured_cost_of_handing_over(tmp_path: Path) -> None:
    learner, found = estimated(tmp_path, DaskExecutor(defer="always"), Deferred(0.004), Waits(0.001))
    with learner:
        (slow,) = found.deferred
        assert slow.in_place >= 0.004, "in its lane"
        assert slow.handing_over == learner.callbacks.draw(BatchEnd, TrainingPhase).times[0]
        assert "Deferred.wait" in at_batch_end(found).strands[0], "it hands over on the training thread"


def test_one_worker_and_one_chain_save_nothing(tmp_path: Path) -> None:
    learner, found = estimated(tmp_path, DaskExecutor(workers=1), Waits(0.003), Waits(0.003))
    with learner:
        assert at_batch_end(found).why_not == "one worker"
    learner, found = estimated(tmp_path, DaskExecutor(workers=2), First(0.001), Second(0.001))
    with learner:
        assert at_batch_end(found).why_not == "one chain"
        assert str(found).endswith('Nothing is worth it: keep executor="serial".')


def test_after_a_change_of_callbacks_it_must_be_measured_again(tmp_path: Path) -> None:
    learner, _ = estimated(tmp_path, "serial", Waits(0.001), Waits(0.001))
    with learner:
        learner.add_callback(Cheap(0.0))
        with pytest.raises(UsageError, match="Measure them first"):
            learner.executor.what_if()  # type: ignore[attr-defined]  # as above


def test_draw_has_the_times_that_the_executor_has_measured(tmp_path: Path) -> None:
    executor = DaskExecutor(workers=2)
    with tiny_learner(
        Waits(0.003), Deferred(0.003), n_batches=8, executor=executor, default_callbacks=False
    ) as learner:
        plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
        assert executor.costs(plan) == {}
        learner.fit(1)
        assert executor.costs(plan)
        assert learner.callbacks.draw(BatchEnd, TrainingPhase).times == executor.costs(plan)


def test_an_executor_without_a_learner_or_closed() -> None:
    executor = DaskExecutor()
    with pytest.raises(ExecutorError, match="This DaskExecutor has no learner yet"):
        executor.what_if()
    executor.close()
    with pytest.raises(ExecutorError, match="closed"):
        executor.what_if()
