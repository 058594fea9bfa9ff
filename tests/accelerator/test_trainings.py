"""Training on the simulated device comes to the values of the CPU, to the bit, and the host does not wait for it."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import Access, BatchEnd, Callback, LearnerView, Phase, Read, TrainingPhase, on
from flowtrain.callbacks import Checkpointer, CustomCallback
from flowtrain.diagnostics.lr_finder import find_learning_rate
from tests.accelerator.simulated.machine import SCHEDULES, Machine, Schedule, Wait
from tests.accelerator.trainings import BATCHES, TRAININGS, Net, Training, batches, learner_of, outcome, train

ADVERSARIAL: tuple[Schedule, ...] = ("lazy", "side first", "main first", 1)
"""Each kind of schedule that is not what a program without streams does."""

ALL = ("the defaults", "deferred callbacks")
"""The trainings that are run under all schedules."""

CASES = [(name, each) for name in TRAININGS for each in (SCHEDULES if name in ALL else ADVERSARIAL)]


@cache
def on_the_cpu(name: str) -> dict[str, str]:
    return train(name, "cpu")


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_it_comes_to_the_values_of_the_cpu(machine: Machine, schedule: Schedule, name: str) -> None:
    machine.begin(schedule)
    assert train(name, "sim") == on_the_cpu(name)


# --- what the host waits for


def waits_of(training: Training, count: int, machine: Machine) -> tuple[Counter[Wait], list[int]]:
    """Return the waits of one epoch of training with so many batches, and the slack of the waits for events."""
    with learner_of(training, "sim") as learner:
        data = batches(count=count)
        learner.fit(1, data=data)  # states are made
        machine.wait_for_all()
        machine.forget_counts()
        learner.epoch(TrainingPhase, data)
        return Counter(machine.waits), list(machine.slack)


@pytest.mark.parametrize(
    "name", ["the defaults", "accumulation", "clipping", "bf16", "fp16", "metrics", "a progress bar", "EMA"]
)
def test_no_batch_makes_the_host_wait(machine: Machine, name: str) -> None:
    """Four more batches make the host wait for four more events, each with work queued behind it, and nothing else.

    The bar reads the loss of every third batch besides: it asks for one, shows it two batches later, and asks again.
    """
    machine.begin("lazy")
    few, before = waits_of(TRAININGS[name], 4, machine)
    many, slack = waits_of(TRAININGS[name], 8, machine)
    assert {kind: count - few[kind] for kind, count in many.items() if count != few[kind]} == {
        "event": 5 if name == "a progress bar" else 4
    }
    assert set(few) == {"event"}
    assert slack.count(0) == before.count(0), "only when the epoch is over is everything waited for"


def test_a_read_without_lag_waits_for_everything(machine: Machine) -> None:
    machine.begin("lazy")
    waits, _ = waits_of(TRAININGS["without lag"], 4, machine)
    assert waits["item"] == 4


@pytest.mark.parametrize("name", ["the defaults", "deferred callbacks"])
def test_copies_are_on_streams_of_their_own(machine: Machine, name: str) -> None:
    machine.begin("lazy")
    train(name, "sim")
    copies = {copy: {stream for stream, each in machine.ran if each == copy} for copy in ("copy to the device",)}
    with_copies = {stream for stream, each in machine.ran if each.startswith("copy to")}
    assert copies["copy to the device"] - {0}, "batches come on a side stream"
    assert len(with_copies - {0}) >= (2 if name == "deferred callbacks" else 1), "snapshots go on another one"


# --- random numbers, checkpoints


class Dropping(Net):
    """A network with dropout, whose random numbers are those of the device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("schedule", ["lazy", 1])
@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_a_resumed_training_draws_the_same_on_the_device(
    machine: Machine, schedule: Schedule, executor: str, tmp_path: Path
) -> None:
    machine.begin(schedule)
    dropping = Training(model=Dropping, executor=lambda: executor)
    with learner_of(dropping, "sim", [Checkpointer(tmp_path, monitor=None)]) as straight:
        straight.fit(2)
        expected = outcome(straight)
    torch.rand(5, device="sim")
    with learner_of(dropping, "sim", [Checkpointer(tmp_path / "again", monitor=None)]) as resumed:
        torch.manual_seed(77)
        resumed.fit(2, resume=tmp_path / "epoch-0001.ckpt")
        assert outcome(resumed) == expected
    with learner_of(dropping, "sim") as other:
        torch.manual_seed(77)
        other.fit(2)
        assert outcome(other) != expected, "the random numbers of the device count"


def test_a_checkpoint_of_the_cpu_goes_on_on_the_device(machine: Machine, tmp_path: Path) -> None:
    machine.begin("lazy")
    with learner_of(TRAININGS["the defaults"], "cpu", [Checkpointer(tmp_path, monitor=None)]) as first:
        first.fit(2)
        expected = outcome(first)
    with learner_of(TRAININGS["the defaults"], "sim", [Checkpointer(tmp_path / "again", monitor=None)]) as resumed:
        resumed.fit(2, resume=tmp_path / "epoch-0001.ckpt")
        assert outcome(resumed) == expected


class Drawing(Callback):
    """A deferrable callback that draws on the device."""

    deferrable = True

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd, TrainingPhase)
    def draw(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Draw a number of the device."""
        self.drawn.append(torch.rand((), device="sim").item())


def test_a_callback_that_draws_on_the_device_does_not_change_training(machine: Machine) -> None:
    machine.begin("lazy")
    found: list[Any] = []
    drawing = [Drawing(), Drawing()]
    for callbacks in ([drawing[0]], [drawing[1]], []):
        with learner_of(Training(model=Dropping), "sim", callbacks) as learner:
            learner.fit(1)
            found.append(outcome(learner))
    assert found[0] == found[1] == found[2]
    assert drawing[0].drawn == drawing[1].drawn
    assert len(set(drawing[0].drawn)) == BATCHES


# --- what works on copies


@pytest.mark.parametrize("schedule", ["lazy", 1])
def test_the_learning_rate_finder(machine: Machine, schedule: Schedule) -> None:
    machine.begin(schedule)
    found: list[Any] = []
    for device in ("cpu", "sim"):
        with learner_of(TRAININGS["the defaults"], device) as learner:
            before = outcome(learner)
            sweep = find_learning_rate(learner, start=1e-3, end=1.0, updates=12)
            assert outcome(learner) == before
            found.append((sweep.rates, sweep.losses, sweep.smoothed))
    assert found[0] == found[1]


def test_the_audit(machine: Machine) -> None:
    machine.begin("lazy")

    def look(view: LearnerView) -> None:
        view.batch.loss.item()

    found: list[Any] = []
    for device in ("cpu", "sim"):
        looking = CustomCallback(look, BatchEnd, TrainingPhase, {"batch.loss": Read()})
        with learner_of(TRAININGS["metrics"], device, [looking]) as learner:
            found.append([(each.operation, each.line, each.where, each.event) for each in learner.audit_syncs()])
    assert found[0] == found[1]
    assert [each[0] for each in found[0]] == [".item()"]


def test_evaluation_and_direct_steps(machine: Machine) -> None:
    machine.begin("lazy")
    found: list[Any] = []
    for device in ("cpu", "sim"):
        with learner_of(TRAININGS["the defaults"], device) as learner:
            learner.step(TrainingPhase, batches()[0])
            learner.validate()
            found.append((outcome(learner), learner.batch.loss.item(), learner.core.finite()))
    assert found[0] == found[1]
