"""The trainings that are killed: each variant with all callbacks whose state and logs must be exact."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from flowtrain import Access, BatchEnd, Callback, Learner, LearnerView, Read, TorchCore, TrainingPhase, Write, on
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    LearningRate,
    LogHistograms,
    LogMetrics,
    Metrics,
    Scheduler,
    SmoothLoss,
    one_cycle,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.logging import CsvBackend, JsonlBackend, TensorBoardBackend, identity
from flowtrain.logging.backend import Value
from flowtrain.logging.records import log
from flowtrain.metrics import accuracy
from flowtrain_dask import DaskExecutor
from tests.support.resumed import Noisy

__all__ = ["EXECUTORS", "LOGS", "VARIANTS", "Variant", "prepare", "stateful", "train"]

LOGS = ("logs/metrics.jsonl", "logs/histograms.jsonl", "logs/late.jsonl", "logs/metrics.csv", "logs/board")
"""The logs of a training. The last one is a folder of TensorBoard."""

EXECUTORS: dict[str, Callable[[str], Executor]] = {
    "serial": lambda cluster: SerialExecutor(),
    "dask": lambda cluster: DaskExecutor(),
    "strands": lambda cluster: DaskExecutor(parallel="always"),
    "lanes": lambda cluster: DaskExecutor(defer="always"),
    "cluster": lambda cluster: DaskExecutor(cluster, defer="always", drain_timeout=120.0),
    "local": lambda cluster: DaskExecutor("local", defer="always", drain_timeout=120.0),
}
"""The executors, each made from the address of a cluster."""


@dataclass(frozen=True)
class Variant:
    """A training.

    Attributes:
        data: Makes the training data.
        fit: Trains or resumes.
        accumulate: The batches of an accumulation group.
    """

    data: Callable[[], Any]
    fit: Callable[[Learner], object]
    accumulate: int = 1


def epochs(number: int) -> Callable[[Learner], object]:
    return lambda learner: learner.fit(number, resume="auto")


def table() -> TensorDataset:
    x = torch.randn(44, 3, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :2] ** 2)


def stateful(**options: Any) -> Any:
    module: Any = importlib.import_module("torchdata.stateful_dataloader")  # an optional dependency
    return module.StatefulDataLoader(table(), 5, shuffle=True, **options)


def with_generator() -> Any:
    return DataLoader(table(), 5, sampler=RandomSampler(table(), generator=torch.Generator().manual_seed(5)))


VARIANTS = {
    "epochs": Variant(lambda: DataLoader(table(), 5, shuffle=True), epochs(4)),
    "accumulated": Variant(lambda: DataLoader(table(), 5, shuffle=True), epochs(4), accumulate=4),
    "generator": Variant(with_generator, epochs(4)),
    "augmented": Variant(lambda: DataLoader(Noisy(), 5, shuffle=True), epochs(8)),
    "workers": Variant(lambda: DataLoader(Noisy(), 5, shuffle=True, num_workers=2), epochs(3)),
    "persistent": Variant(
        lambda: DataLoader(table(), 5, shuffle=True, num_workers=2, persistent_workers=True), epochs(3)
    ),
    "stream": Variant(
        lambda: DataLoader(table(), 5, shuffle=True),
        lambda learner: learner.fit(steps=31, validate_every=7, resume="auto"),
    ),
    "steps": Variant(
        lambda: DataLoader(table(), 5, shuffle=True), lambda learner: learner.fit(steps=31, resume="auto")
    ),
    "own state": Variant(stateful, epochs(4)),
    "own state, workers": Variant(lambda: stateful(num_workers=2, persistent_workers=True), epochs(3)),
}


class Late(Callback):
    """Logs the loss of each batch; in a lane it is slower than training, so events wait whenever a fit ends."""

    deferrable = True

    def __init__(self, backend: JsonlBackend) -> None:
        self.backends = (backend,)
        self.count = 0

    def state_access(self) -> Access:
        return {"batch.loss": Read(), self.backends[0].resource: Write()}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]

    @on(BatchEnd, TrainingPhase)
    def record(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Log the loss."""
        self.count += 1
        if identity() is not None:
            time.sleep(0.01)
        log(self.backends, Value(learner.batch.loss), "Late", self.count, ("Step", repr(phase)))


def train(folder: Path, variant: Variant, executor: str, cluster: str) -> None:
    """Train or resume in a folder, and leave ``result.pt`` there.

    Args:
        folder: The folder.
        variant: The training.
        executor: The name of the executor.
        cluster: The address of a cluster.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    metrics, histograms = JsonlBackend(folder / LOGS[0]), JsonlBackend(folder / LOGS[1])
    callbacks = [
        Checkpointer(folder / "checkpoints", every_steps=3, keep_top_k=2),
        LogMetrics(metrics, CsvBackend(folder / LOGS[3]), TensorBoardBackend(folder / LOGS[4])),
        LogHistograms(histograms, every=4, gradients=True),
        Late(JsonlBackend(folder / LOGS[2])),
        Scheduler({LearningRate: one_cycle(0.01)}),
        Metrics(accuracy_of_sign),
        EMA(0.9),
        SmoothLoss(),
    ]
    with Learner(
        model,
        nn.functional.mse_loss,
        data=(variant.data(), DataLoader(table(), 11)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=callbacks,
        default_callbacks="quiet",
        executor=EXECUTORS[executor](cluster),
        core=TorchCore(device="cpu", accumulate=variant.accumulate, clip_grad_norm=1.0),
    ) as learner:
        variant.fit(learner)
        state = learner.cbstate
        series = {
            f"{name} {phase!r} {key}": list(each)
            for name in ("metrics_step", "metrics_epoch")
            for phase, by_name in getattr(state, name).items()
            for key, each in by_name.items()
        }
        result = {
            "parameters": learner.model.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "histories": {"history": repr(state.history), **series},
            "callbacks": {
                each.name: repr(each.state_dict()) for each in learner.callbacks if not isinstance(each, Checkpointer)
            },
            "generators": (torch.get_rng_state(), repr(random.getstate())),
        }
    torch.save(result, folder / "result.pt")


def accuracy_of_sign(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return accuracy(outputs, targets.argmax(1))


def prepare() -> list[str]:
    """Import what each forked process would import, which takes seconds; return the names of the variants that run."""
    for name in ("torch._dynamo", "distributed", "tensorboard", "flowtrain_dask.cluster.transport"):
        importlib.import_module(name)
    try:
        stateful()
    except ImportError:
        print("own state: skipped, torchdata is not installed", flush=True)
        return [name for name in VARIANTS if not name.startswith("own state")]
    return list(VARIANTS)
