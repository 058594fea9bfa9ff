"""Deferred callbacks end to end: the log and the callbacks' state are the serial ones, wherever they run.

Rules 20 to 23, 25 and 26, with the bundled callbacks that can be deferred and with drawn ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no annotations
import pytest
import torch

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import (
    LearningRate,
    LogHistograms,
    LogHyperParams,
    LogMetrics,
    LogTraces,
    LogVisualization,
    Metrics,
    Scheduler,
    Traces,
    one_cycle,
    throttle,
)
from flowtrain.execution import Executor
from flowtrain.logging import Image, JsonlBackend
from flowtrain.metrics import accuracy
from flowtrain.records import Run
from flowtrain.testing import assert_equivalent
from flowtrain_dask import DaskExecutor

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class Memory(JsonlBackend):
    """Keeps the lines that the file would get, without their clock time."""

    def __init__(self, name: str = "log") -> None:
        super().__init__(f"/memory/{name}")
        self.records: list[dict[str, Any]] = []

    def open(self, run: Run) -> None: ...

    def write(self, record: bytes) -> None:
        line = json.loads(record.lstrip(b"\0").split(b"\n")[0])
        del line["time"]
        self.records.append(line)

    def flush(self) -> int:
        return len(self.records)

    def restore(self, position: Any) -> None:
        del self.records[position:]

    def close(self) -> None: ...


class Sums(Callback):
    """Keeps a state that depends on every event and their order; grows a list, a dict and a tensor."""

    deferrable = True

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.by_phase: dict[str, int] = {}
        self.mean = torch.zeros(3)

    def state_access(self) -> Access:
        return {"batch.outputs": Read(), "batch.loss": Read(), "cbstate.history": Read()}

    @on(BatchEnd)
    def sum_up(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.mean = 0.9 * self.mean + 0.1 * learner.batch.outputs.mean(0)
        self.seen.append(float(learner.batch.loss) + learner.cbstate.history[phase].steps)
        self.by_phase[repr(phase)] = self.by_phase.get(repr(phase), 0) + 1


class Wrecker(torch.nn.Module):
    """Works in place wherever it can: on its inputs, on its activations, on a buffer that it gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.act = torch.nn.ReLU(inplace=True)
        self.last = torch.nn.Linear(8, 3)
        self.out = torch.zeros(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        y: torch.Tensor = self.last(self.act(self.first(x)))
        if not torch.is_grad_enabled():
            self.out.copy_(y)
            return self.out
        return y


class Reusing:
    """A loader that gives out one pair of tensors again and again, filled anew."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        inputs, targets = torch.empty(6, 4), torch.empty(6, dtype=torch.long)
        for _ in range(self.length):
            inputs.normal_(generator=generator)
            targets.random_(0, 3, generator=generator)
            yield inputs, targets


def picture(learner: LearnerView) -> Any:
    return {"in": Image(learner.batch.inputs), "wrong": Image(learner.batch.outputs.sigmoid())}


def mean_output(learner: LearnerView) -> torch.Tensor:
    result: torch.Tensor = learner.batch.outputs.mean()
    return result


def loggers() -> list[Callback]:
    """All bundled deferrable callbacks: three on one backend, the others each with their own."""
    shared = Memory()
    return [
        LogMetrics(shared),
        LogHistograms(shared, every=2, gradients=True, bins=4),
        throttle(LogMetrics(Memory("seldom")), BatchEnd, every=3),
        LogVisualization(picture, Memory("pictures"), every=2),
        LogVisualization(picture, shared, every=1, event_type=EpochEnd, phase_type=ValidationPhase),
        LogTraces(Memory("traces")),
        LogHyperParams(Memory("settings"), settings={"a": 1}),
        Sums(),
    ]


def learner_of(executor: Executor, callbacks: Callable[[], Sequence[Callback]] = loggers) -> Learner:
    return Learner(
        Wrecker(),
        torch.nn.functional.cross_entropy,
        data=(Reusing(1, 5), Reusing(2, 3)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[
            Metrics(accuracy),
            Traces({"Mean": mean_output}, TrainingPhase),
            Scheduler({LearningRate: one_cycle(0.1, length=40)}),
            *callbacks(),
        ],
        default_callbacks="quiet",
        executor=executor,
        core=TorchCore(device="cpu", clip_grad_norm=0.1),
    )


def fit_twice(learner: Learner) -> None:
    learner.fit(1)
    learner.fit(steps=7, validate_every=3)


def by_hand(learner: Learner) -> None:
    """Everything that runs batches outside of a fit."""
    learner.epoch(TrainingPhase)
    learner.flush()
    learner.validate()
    learner.step(ValidationPhase, next(iter(Reusing(3, 1))))
    learner.step(TrainingPhase, next(iter(Reusing(4, 1))))


def change_callbacks(learner: Learner) -> None:
    """Callbacks come and go between fits, on backends that stay; what was seen is not seen again."""
    learner.fit(1)
    late = Sums()
    late.name = "late"
    learner.add_callback(late)
    learner.fit(1)
    histograms = learner.remove_callback(LogHistograms)
    learner.epoch(TrainingPhase)
    learner.replace_callback(LogTraces(Memory("other traces")))
    learner.add_callback(histograms)
    learner.fit(1)


RUNS = [fit_twice, by_hand, change_callbacks]


@pytest.mark.parametrize("run", RUNS)
def test_threads_give_the_serial_log_and_state(run: Callable[[Learner], None]) -> None:
    """Rules 13, 20 to 23 and 26."""
    always = partial(DaskExecutor, parallel="always", workers=3)
    ways: list[Callable[[], Executor]] = [DaskExecutor, always, partial(DaskExecutor, defer=False)]
    assert_equivalent(learner_of, executors=ways, run=run, interleavings=2)


def test_processes_give_the_serial_log_and_state(dask_processes: Any) -> None:
    """Rules 13, 22, 25 and 26: the same code on workers, for all runs on one cluster."""
    for run in RUNS:
        assert_equivalent(
            learner_of, executors=[partial(DaskExecutor, dask_processes.address)], run=run, interleavings=0
        )
