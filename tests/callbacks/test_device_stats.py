"""DeviceStats: which numbers it records and when, and that they are numbers of this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import pytest
import torch

from flowtrain import TrainingPhase, UsageError, ValidationPhase
from flowtrain.callbacks import DeviceStats
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import assert_equivalent, tiny_batches, tiny_learner


class Numbered:
    """A measurement that returns 0, 1, 2, ..."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count()

    def __call__(self) -> Mapping[str, float]:
        return {"Watt": float(next(self._numbers))}


def test_every_nth_batch_of_each_phase_over_the_life_of_the_callback() -> None:
    stats = DeviceStats(every=3, measure=Numbered())  # the constructor measured 0 to learn the names
    learner = tiny_learner(stats, data=(tiny_batches(n_batches=4), tiny_batches(n_batches=2)))
    learner.fit(2)
    assert list(learner.cbstate.tracehistory[TrainingPhase]["Device.Watt"]) == [(3, 1.0), (6, 2.0)]
    assert list(learner.cbstate.tracehistory[ValidationPhase]["Device.Watt"]) == [(3, 3.0)]
    resumed = DeviceStats(every=3, measure=Numbered())
    resumed.load_state_dict({"counts": {"TrainingPhase": 8}})  # of early checkpoints; the condition has the count now
    resumed.conditions[0].load_state_dict(stats.conditions[0].state_dict())
    learner.replace_callback(resumed)
    learner.epoch(TrainingPhase)  # batches 9 to 12
    assert list(learner.cbstate.tracehistory[TrainingPhase]["Device.Watt"])[2:] == [(9, 1.0), (12, 2.0)]


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_memory_of_this_process_in_mebibytes() -> None:
    stats = DeviceStats(every=1)
    before = stats.measure()
    held = torch.ones(64, 1024, 1024 // 4)  # 64 MiB, written so that they are allocated
    after = stats.measure()
    assert 60 < after["Memory"] - before["Memory"] < 100
    assert after["MemoryPeak"] >= after["Memory"] - 1
    assert held.numel()


def test_the_share_of_the_processor_is_of_the_time_since_the_last_record() -> None:
    stats = DeviceStats(every=1)
    stats.measure()
    assert stats.measure()["Cpu"] >= 0
    assert set(stats.names) == set(stats.measure())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_of_the_gpu() -> None:
    stats = DeviceStats(every=1)
    before = stats.measure()["CudaMemory"]
    held = torch.ones(64, 1024, 1024 // 4, device="cuda")
    assert stats.measure()["CudaMemory"] - before == 64
    assert stats.measure()["CudaReserved"] >= 64 <= stats.measure()["CudaPeak"]
    assert held.is_cuda


@pytest.mark.parametrize("every", [0, 2.0, True])
def test_every_is_a_positive_whole_number(every: Any) -> None:
    with pytest.raises(UsageError, match=r"DeviceStats\(\): every is a whole number, at least 1, got "):
        DeviceStats(every=every)


@pytest.mark.parametrize("found", [{}, [1.0], {1: 2.0}])
def test_a_measure_that_means_nothing(found: Any) -> None:
    with pytest.raises(UsageError, match=r"return numbers by name: \{\"Watt\": 250.0\}"):
        DeviceStats(measure=lambda: found)
    with pytest.raises(UsageError, match="measure is a function"):
        DeviceStats(measure=found)


def test_other_names_than_at_first() -> None:
    found = {"Watt": 1.0}
    learner = tiny_learner(DeviceStats(every=1, measure=lambda: dict(found)), n_batches=1)
    found["Celsius"] = 40.0
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    assert str(caught.value).startswith(
        "DeviceStats: measure() returned ['Celsius', 'Watt'], and ['Watt'] at first; return the same names at every "
        "call."
    )


def test_the_same_under_every_executor() -> None:
    def make(executor: Executor) -> Learner:
        return tiny_learner(DeviceStats(every=2, measure=Numbered()), n_batches=4, executor=executor)

    assert_equivalent(make, executors=["dask"])
