"""Timelines under the executor of dask: hand-overs, lanes on threads and on a cluster, and the waits of training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, Learner, LearnerView, Phase, Read, TrainingPhase, on
from flowtrain.callbacks import Timeline
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor, Limits
from flowtrain_dask.cluster.transport import ClusterTransport
from flowtrain_dask.cluster.worker import Reply
from tests.support.dask_processes import DaskProcesses
from tests.support.traces import Slice, check_nested, slices_of


class Uploads(Callback):
    """A deferrable callback that takes a while."""

    deferrable = True
    stochastic = False
    seconds = 0.0

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def upload(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(self.seconds)


class Slow(Uploads):
    """Takes longer than a step."""

    seconds = 0.005


def trained(
    folder: Path, executor: DaskExecutor, *callbacks: Callback, batches: int = 6
) -> tuple[Learner, list[Slice]]:
    """Fit a learner for two epochs with a timeline; return the learner, which is closed, and the slices."""
    timeline = Timeline(folder / "timeline.json")
    with tiny_learner(*callbacks, timeline, n_batches=batches, executor=executor) as learner:
        learner.fit(2)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    return learner, slices


def of(slices: list[Slice], kind: str) -> list[Slice]:
    return [one for one in slices if one.kind == kind]


def test_a_deferred_handler_is_there_as_handed_over_and_in_its_lane(tmp_path: Path) -> None:
    learner, slices = trained(tmp_path, DaskExecutor(defer="always"), Uploads())
    handed, ran, batches = of(slices, "hand-over"), of(slices, "deferred"), of(slices, "lane")
    assert [one.name for one in handed] == ["Uploads.upload"] * 12
    assert [one.name for one in ran] == ["Uploads.upload"] * 12
    assert not [one for one in of(slices, "handler") if one.name == "Uploads.upload"]
    steps = [one for one in of(slices, "batch") if one.args["phase"] == "TrainingPhase"]
    assert all(one.within(step) for one, step in zip(handed, steps, strict=True))
    assert {(one.process[:6], one.thread) for one in (*ran, *batches)} == {("rank 0", "lane Uploads")}
    assert sum(int(one.name.split()[0]) for one in batches) == 12
    assert all(any(one.within(batch) for batch in batches) for one in ran)
    assert all(before.begin <= after.begin for before, after in zip(handed, ran, strict=True)), "an event runs later"
    assert learner.callbacks.draw(BatchEnd, TrainingPhase).times.keys() == {0, 1, 2}


def test_a_lane_that_is_full_and_a_flush_name_who_made_training_wait(tmp_path: Path) -> None:
    executor = DaskExecutor(defer="always", limits=Limits(pending=1))
    _, slices = trained(tmp_path, executor, Slow())
    stalls = of(slices, "stall")
    full = [one for one in stalls if one.name == "lane Slow is full"]
    assert full
    assert {one.args["callback"] for one in full} == {"Slow"}
    assert {one.thread for one in stalls} == {"training"}
    assert executor.report().stalled == pytest.approx(sum(one.end - one.begin for one in full) * 1e-6, rel=0.01)
    assert "waits for lane Slow" in {one.name for one in stalls}


class Late(Uploads):
    """Takes longer for an event than one look of a flush lasts."""

    seconds = 0.6


def test_one_wait_for_a_lane_is_one_wait_in_the_timeline(tmp_path: Path) -> None:
    learner = tiny_learner(Late(), n_batches=1, executor=DaskExecutor(defer="always"))
    learner.fit(1, timeline=tmp_path / "timeline.json")
    learner.close()
    [wait] = [one for one in slices_of(tmp_path / "timeline.json") if one.name == "waits for lane Late"]
    assert wait.end - wait.begin > 0.3e6


def test_the_events_of_a_lane_on_a_cluster_are_in_the_call_of_their_batch(
    tmp_path: Path, dask_processes: DaskProcesses
) -> None:
    executor = DaskExecutor(dask_processes.address, defer="always")
    _, slices = trained(tmp_path, executor, Uploads())
    ran, batches = of(slices, "deferred"), of(slices, "lane")
    assert len(ran) == 12
    assert {one.thread for one in (*ran, *batches)} == {"lane Uploads"}
    workers = {f"worker {one.args['worker']}" for one in batches}
    assert {one.process for one in ran} == workers
    assert all(name.startswith("worker tcp://") for name in workers)
    assert all(any(one.within(batch) for batch in batches) for one in ran), "on the clock of the training process"


def test_lanes_are_not_timed_without_a_timeline(tmp_path: Path) -> None:
    executor = DaskExecutor(defer="always")
    with tiny_learner(Uploads(), n_batches=3, executor=executor) as learner:
        learner.fit(1, timeline=tmp_path / "a.json")
        learner.fit(1)
        plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
        assert learner.callbacks.measured.count(plan) == 3, "the batches of the first fit"
        assert "not fired yet" not in executor.explain(plan)
        (lane,) = executor.report().lanes
        assert lane.done == 6


def shifted(*calls: tuple[int, tuple[int, int], int]) -> list[int]:
    """Return by how much the times of each reply of a worker are shifted.

    Args:
        calls: When the call was sent, the span of the worker by its own clock, and when the reply was received.
    """
    transport: Any = ClusterTransport.__new__(ClusterTransport)
    transport._shifts = {}
    found = []
    for sent, span, received in calls:
        reply = Reply("done", address="tcp://a", times=[(span[0], span[1])], span=span)
        ((begin, end),) = transport._on_own_clock(reply, sent, received)
        assert sent <= begin <= end <= received
        found.append(begin - span[0])
    return found


def test_the_clock_of_a_worker_is_shifted_by_its_quickest_call_and_within_each_call() -> None:
    # The clock of the worker is 1,000 ahead. A call that travels 10 each way tells it exactly.
    assert shifted((100, (1110, 1120), 130)) == [-1000]
    # One that waits 90 before the worker begins tells it with an error of 40, until a quicker one has come.
    slow, quick = (100, (1190, 1200), 210), (300, (1310, 1320), 330)
    assert shifted(slow) == [-1040]
    assert shifted(slow, quick, slow) == [-1040, -1000, -1000]
    # The clock of a worker that is started anew is another one: the bounds of the call hold.
    assert shifted(quick, (400, (5000, 5010), 430)) == [-1000, -4580]
