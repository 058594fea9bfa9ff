"""A device that has no memory left, or fails in the middle of training: clear errors, and nothing stays open."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    BackwardBegin,
    BatchBegin,
    BatchEnd,
    CoreError,
    EpochBegin,
    Event,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    StepContext,
    TrainingPhase,
    UpdateBegin,
    ValidationPhase,
)
from flowtrain.callbacks import CustomCallback, LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain_dask import DaskExecutor
from tests.accelerator.simulated.backend import Device
from tests.accelerator.simulated.machine import DeviceFailure, Machine
from tests.accelerator.trainings import BATCHES, TRAININGS, Deferred, Training, batches, learner_of, outcome, sums_of


class Large(torch.nn.Module):
    """A network whose forward pass, loss or backward pass takes much memory, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(20, 3)
        self.wide = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x.repeat(self.wide, 1).relu().reshape(self.wide, -1, 20).mean(0))
        return found


def test_out_of_memory_says_in_which_part_and_what_helps(simulated: Device) -> None:
    with learner_of(Training(model=Large), "sim") as learner:
        learner.fit(1)
        learner.model.wide = 2000
        simulated.memory.limit = simulated.memory.nbytes + 1_000_000
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2560000 bytes") as raised:
            learner.fit(1)
        assert raised.value.__notes__[-1] == (
            "the device ran out of memory in the forward pass, with inputs of Tensor of shape (16, 20), float32. These "
            "need less: smaller batches with TorchCore(accumulate=2), which trains on as many samples in an update; "
            "precision='bf16'; callbacks that keep nothing of a batch (flowtrain.testing.leaks finds the others). The "
            "learner can be used again; the error holds the memory of this batch, so leave its `except` block first."
        )
        assert "in TrainingPhase, epoch 2, batch 1" in raised.value.__notes__
        del raised
        learner.model.wide = 1
        learner.fit(1)
        assert learner.stopped is None


def filling(simulated: Device, event: type[Event], phase: type[Phase] = TrainingPhase) -> CustomCallback:
    """Return a callback after which the device has memory for one number and no more."""

    def fill(view: LearnerView) -> None:
        simulated.memory.limit = simulated.memory.nbytes + 64

    return CustomCallback(fill, event, phase, {})


def note_of(learner: Learner, train: Callable[[], object]) -> str:
    """Train until the device has no memory left; return the note that says where that was."""
    with pytest.raises(torch.OutOfMemoryError) as raised:
        train()
    [found] = [note for note in raised.value.__notes__ if note.startswith("the device ran out of memory in ")]
    assert found.endswith(
        "The learner can be used again; the error holds the memory of this batch, so leave its `except` block first."
    )
    return str(found).partition(". ")[0]


INPUTS = ", with inputs of Tensor of shape (16, 20), float32"
ON_THE_WAY = "the loader, or on a batch's way to the device"


@pytest.mark.parametrize(
    ("after", "prefetch", "where"),
    [
        (EpochBegin, None, ON_THE_WAY),
        (EpochBegin, False, ON_THE_WAY),
        (BatchBegin, None, "the forward pass" + INPUTS),
        (LossBegin, None, "the loss" + INPUTS),
        (BackwardBegin, None, "the backward pass" + INPUTS),
        (UpdateBegin, None, "the update" + INPUTS),
    ],
)
def test_out_of_memory_in_each_part(simulated: Device, after: type[Event], prefetch: bool | None, where: str) -> None:
    with learner_of(TRAININGS["the defaults"], "sim", [filling(simulated, after)], prefetch=prefetch) as learner:
        assert note_of(learner, lambda: learner.fit(1)) == f"the device ran out of memory in {where}"
        simulated.memory.limit = None
        learner.remove_callback("CustomCallback")
        learner.fit(1)
        assert learner.stopped is None
        assert learner.core.finite()


def test_out_of_memory_in_validation(simulated: Device) -> None:
    training = TRAININGS["the defaults"]
    with learner_of(training, "sim", [filling(simulated, LossBegin, ValidationPhase)]) as learner:
        assert note_of(learner, learner.validate) == f"the device ran out of memory in the loss{INPUTS}"


class Own(TrainingPhase):
    """A phase with a step of its own."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw[0]):
            raw[0].to("sim")


def test_out_of_memory_in_the_step_of_a_user(simulated: Device) -> None:
    with learner_of(TRAININGS["the defaults"], "sim", [filling(simulated, BatchBegin)], prefetch=False) as learner:
        note = note_of(learner, lambda: learner.epoch(Own(), batches()))
        assert note == f"the device ran out of memory in the step of Own{INPUTS}"


def test_out_of_memory_in_the_snapshot_of_a_deferred_callback(simulated: Device) -> None:
    training = TRAININGS["deferred callbacks"]
    filler = filling(simulated, BatchEnd)
    with learner_of(replace(training, callbacks=(lambda: filler, Deferred)), "sim") as learner:
        note = note_of(learner, lambda: learner.fit(1))
        assert note == f"the device ran out of memory in a handler of a callback{INPUTS}"
        simulated.memory.limit = None
        learner.remove_callback("CustomCallback")
        learner.fit(1)
        assert len(sums_of(learner)) == BATCHES


def test_the_memory_of_a_failed_batch_is_given_back(simulated: Device) -> None:
    with learner_of(Training(model=Large), "sim", lag=0) as learner:
        learner.fit(1)
        gc.collect()
        before = simulated.memory.nbytes
        simulated.memory.limit = before + 1_000_000
        learner.model.wide = 2000
        with pytest.raises(torch.OutOfMemoryError):
            learner.fit(1)
        learner.model.wide, simulated.memory.limit = 1, None
        learner.fit(1)
        gc.collect()
        assert simulated.memory.nbytes <= before + 5000


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("flowtrain")}


@pytest.mark.parametrize("executor", ["serial", "dask"])
@pytest.mark.parametrize("after", [60, 130, 200])
def test_a_device_that_fails_in_the_middle(machine: Machine, tmp_path: Path, executor: str, after: int) -> None:
    machine.begin("lazy")
    log = JsonlBackend(tmp_path / "log.jsonl")
    before = own_threads()
    training = Training(executor=partial(DaskExecutor, parallel="never") if executor == "dask" else lambda: "serial")
    learner = learner_of(training, "sim", [Deferred(), LogMetrics(log)])
    machine.fail_after(after)
    with pytest.raises(RuntimeError, match="The device has failed: the device was told to fail at") as raised:
        learner.fit(20)
    assert any("epoch" in note for note in raised.value.__notes__)
    with suppress(DeviceFailure):  # what waits in a lane is on the device that has failed
        learner.close()
    assert learner.closed
    assert own_threads() <= before
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_number_that_no_device_has() -> None:
    with pytest.raises(CoreError) as raised:
        learner_of(TRAININGS["the defaults"], "sim:7")
    assert str(raised.value).startswith(
        "device='sim:7' cannot be used: there is no sim device with this number. This process has: 'cpu', 'sim:0'. "
        "Write one of these, or leave device= out."
    )


def test_a_precision_that_the_device_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.get_device_module("sim"), "get_amp_supported_dtype", lambda: [torch.bfloat16])
    with pytest.raises(CoreError) as raised:
        learner_of(TRAININGS["fp16"], "sim")
    text = str(raised.value)
    assert text.startswith("precision='fp16' cannot be used on sim: ")
    assert text.endswith(" Use one of these there: 'fp32', 'bf16'.")
    learner_of(TRAININGS["bf16"], "sim").close()


def test_a_handler_that_runs_out_of_memory_is_named(simulated: Device) -> None:
    def fill(view: LearnerView) -> None:
        torch.zeros(10**7, device="sim")

    with learner_of(TRAININGS["the defaults"], "sim", [CustomCallback(fill, BatchEnd, TrainingPhase, {})]) as learner:
        simulated.memory.limit = 10**7
        with pytest.raises(torch.OutOfMemoryError) as raised:
            learner.fit(1)
        assert any("CustomCallback" in note for note in raised.value.__notes__)
        assert "the device ran out of memory in a handler of a callback, with inputs" in raised.value.__notes__[-1]
        simulated.memory.limit = None
        learner.remove_callback("CustomCallback")
        learner.fit(1, data=batches(count=BATCHES))
        assert outcome(learner)
