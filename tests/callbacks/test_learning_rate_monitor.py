"""LearningRateMonitor: which learning rates it records, and when."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    AccessError,
    Callback,
    EpochBegin,
    LearnerView,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UsageError,
    Write,
    on,
)
from flowtrain.callbacks import LearningRate, LearningRateMonitor, Scheduler, step
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import TinyModel, assert_equivalent, tiny_learner
from tests.support.phases import TwoModels
from tests.support.untyped import untyped


class Halve(Callback):
    """Halves the learning rate at every second update, in a handler of that update."""

    def __init__(self) -> None:
        self.updates = 0

    def state_access(self) -> Access:
        return {"optimizer.hyperparams": Write()}

    @on(UpdateBegin, TrainingPhase)
    def halve(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.updates += 1
        if self.updates % 2 == 0:
            for group in learner.optimizer.hyperparams:
                group["lr"] /= 2


def recorded(
    learner: Learner, phase: type[AbstractTrainingPhase] = TrainingPhase
) -> dict[str, list[tuple[int, float]]]:
    return {name: list(series) for name, series in learner.cbstate.tracehistory[phase].items()}


def test_a_rate_is_recorded_with_the_first_batch_that_uses_it() -> None:
    """Rule 7: the monitor stands first in the list and runs after the callbacks that write the rate."""
    learner = tiny_learner(LearningRateMonitor(), Halve(), n_batches=4)
    learner.fit(1)
    assert recorded(learner) == {"LearningRate": [(1, 0.1), (2, 0.05), (4, 0.025)]}


def test_with_accumulation_it_is_the_batch_that_updates() -> None:
    learner = tiny_learner(LearningRateMonitor(), n_batches=4, core=TorchCore(device="cpu", accumulate=3))
    learner.fit(1)
    assert recorded(learner) == {"LearningRate": [(3, 0.1)]}


def test_every_group_has_a_series() -> None:
    model = torch.nn.Linear(1, 1)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    learner = tiny_learner(LearningRateMonitor(), model=model, optimizer=torch.optim.SGD(groups, lr=0.1), n_batches=2)
    learner.fit(1)
    learner.optimizer.param_groups[1]["lr"] = torch.tensor(0.25)  # as capturable=True keeps it in torch
    learner.fit(1)
    assert recorded(learner) == {"LearningRate.0": [(1, 0.1)], "LearningRate.1": [(1, 0.5), (3, 0.25)]}


def test_beside_a_scheduler_it_records_what_that_sets() -> None:
    schedule = {LearningRate: step(0.4, every=2, gamma=0.5)}
    learner = tiny_learner(LearningRateMonitor(), Scheduler(schedule), n_batches=4)
    learner.fit(1)
    assert recorded(learner) == {"LearningRate": [(1, 0.4), (3, 0.2)]}
    assert [value for _, value in learner.cbstate.hyperparams["LearningRate"]] == [0.4, 0.4, 0.2, 0.2]


def two(*callbacks: Callback) -> Learner:
    return tiny_learner(
        *callbacks,
        model={"one": TinyModel(), "two": TinyModel()},
        optimizer={"one": partial(torch.optim.SGD, lr=0.1), "two": partial(torch.optim.SGD, lr=0.2)},
        data={TwoModels: [torch.ones(2, 1)] * 2},
    )


def test_several_optimizers_are_named() -> None:
    learner = two(LearningRateMonitor("one", "two"))
    learner.fit(1)
    assert recorded(learner, TwoModels) == {"LearningRate.one": [(1, 0.1)], "LearningRate.two": [(1, 0.2)]}


def test_a_wrong_name_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"LearningRateMonitor\(0.1\) takes names of optimizers. Write"):
        LearningRateMonitor(untyped(0.1))
    with pytest.raises(AccessError, match=r"optimizer has no 'onr'\. Did you mean 'one'\?"):
        two(LearningRateMonitor("onr"))


class Reset(Callback):
    """Resets the rate at the begin of an epoch."""

    def state_access(self) -> Access:
        return {"optimizer.hyperparams": Write()}

    @on(EpochBegin, TrainingPhase)
    def reset(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.optimizer.hyperparams[0]["lr"] = 0.1


def test_the_same_under_every_executor() -> None:
    def make(executor: Executor) -> Learner:
        return tiny_learner(LearningRateMonitor(), Halve(), Reset(), n_batches=3, executor=executor)

    assert_equivalent(make, executors=["dask"])
