"""Every bundled callback, with the other callbacks and the options that a learner needs to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import flowtrain.callbacks
from flowtrain import BatchEnd, Callback, LearnerView, Read, TrainingPhase
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    DeviceStats,
    EarlyStopping,
    GarbageCollect,
    GradNorm,
    LearningRate,
    LogHistograms,
    LogHyperParams,
    LogMetrics,
    LogTraces,
    LogVisualization,
    Metrics,
    ProgressBar,
    Scheduler,
    Timeline,
    Timer,
    Traces,
    one_cycle,
    reduce_on_plateau,
)
from flowtrain.logging import JsonlBackend, Value

KINDS = [
    kind
    for kind in (getattr(flowtrain.callbacks, name) for name in flowtrain.callbacks.__all__)
    if isinstance(kind, type) and issubclass(kind, Callback)
]


def loss_of(learner: LearnerView) -> float:
    return float(learner.batch.loss)


def shown(learner: LearnerView) -> Value:
    return Value(loss_of(learner))


def bias(outputs: Any, targets: Any) -> Any:
    return (outputs - targets).mean()


def not_a_number(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).mean() * float("nan")


@dataclass(frozen=True)
class Case:
    """How the tests build and run one callback.

    Attributes:
        make: Makes the callback for a folder, followed by the callbacks that it needs.
        options: Arguments of the learner.
        unseen: The handlers that declare more than a dry run observes, each with the reason.
        placed: The attributes that hold a folder, a clock or an open file.
    """

    make: Callable[[Path], tuple[Callback, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    unseen: Mapping[str, str] = field(default_factory=dict)
    placed: tuple[str, ...] = ()


def backend(folder: Path) -> JsonlBackend:
    return JsonlBackend(folder / "log.jsonl")


def twice() -> Traces:
    return Traces({"Twice": loss_of}, TrainingPhase, access={"batch.loss": Read()})


def cycle() -> Scheduler:
    return Scheduler({LearningRate: one_cycle(0.1)})


PUT_BACK = "it writes only what a failure has kept from being put back"
FILLED = "no accumulation group is left unfilled at the end of the epoch"
CASES: dict[str, Case] = {
    "Checkpointer": Case(lambda folder: (Checkpointer(folder),), placed=("folder",)),
    "CustomCallback": Case(lambda _: (CustomCallback(loss_of, BatchEnd, access={"batch.loss": Read()}),)),
    "DeviceStats": Case(lambda _: (DeviceStats(1, lambda: {"Watt": 250.0}),)),
    "EMA": Case(
        lambda _: (flowtrain.callbacks.EMA(0.5),),
        unseen={"begin_training": PUT_BACK, "end_fit": PUT_BACK, "take_in_last": FILLED, "take_in_cancelled": FILLED},
    ),
    "EarlyStopping": Case(lambda _: (EarlyStopping(patience=5),)),
    "Freeze": Case(
        lambda _: (flowtrain.callbacks.Freeze({"coeff": 0}),),
        unseen=dict.fromkeys(("begin_fit", "begin_epoch"), "its only parameter is never frozen"),
    ),
    "GarbageCollect": Case(lambda _: (GarbageCollect(1),)),
    "GradNorm": Case(lambda _: (GradNorm(layers=True),), unseen={"record_layers": "the model names the layers"}),
    "LogHistograms": Case(
        lambda folder: (LogHistograms(backend(folder), every=1, gradients=True),), placed=("backends",)
    ),
    "LogHyperParams": Case(lambda folder: (LogHyperParams(backend(folder)), cycle()), placed=("backends",)),
    "LogMetrics": Case(lambda folder: (LogMetrics(backend(folder)),), placed=("backends",)),
    "LogTraces": Case(lambda folder: (LogTraces(backend(folder)), twice()), placed=("backends",)),
    "LogVisualization": Case(
        lambda folder: (LogVisualization(shown, backend(folder), every=1, access={"batch.loss": Read()}),),
        placed=("backends",),
    ),
    "Metrics": Case(lambda _: (Metrics(bias),)),
    "ModelSummary": Case(
        lambda _: (flowtrain.callbacks.ModelSummary(),), unseen={"show": "random numbers are put back in it"}
    ),
    "MetricsPrinter": Case(lambda _: (flowtrain.callbacks.MetricsPrinter(),), placed=("_begun",)),
    "ProgressBar": Case(
        lambda _: (ProgressBar(redraw=0, report=0),),
        unseen={"advance": "other callbacks say which metrics they monitor"},
        placed=("_begun", "_drawn", "_next"),
    ),
    "Profiler": Case(
        lambda folder: (flowtrain.callbacks.Profiler(folder, wait=0, active=1),),
        unseen=dict.fromkeys(("begin", "step", "end"), "the resource keeps it on the training thread"),
        placed=("folder", "files"),
    ),
    "Recorder": Case(
        lambda _: (flowtrain.callbacks.Recorder(),),
        unseen={"keep_updates": "no batch is cancelled after its update", "keep_last_updates": FILLED},
    ),
    "SWA": Case(
        lambda _: (flowtrain.callbacks.SWA(1),),
        {"model": torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))},
        unseen={
            "begin_training": PUT_BACK,
            "end_fit": PUT_BACK,
            "swap_in": "random numbers are put back in it",
            "take_in_cancelled": FILLED,
        },
    ),
    "SanityCheck": Case(
        lambda _: (flowtrain.callbacks.SanityCheck(),), unseen={"check": "random numbers are put back in it"}
    ),
    "Scheduler": Case(lambda _: (Scheduler({LearningRate: reduce_on_plateau(0.05)}),)),
    "StopOnNaNLoss": Case(lambda _: (flowtrain.callbacks.StopOnNaNLoss(),), {"lossfn": not_a_number}),
    "Timeline": Case(lambda folder: (Timeline(folder / "timeline.json"),), placed=("path", "files")),
    "Timer": Case(lambda _: (Timer(iter(range(10_000)).__next__),), placed=("clock",)),
    "Traces": Case(lambda _: (twice(),)),
}


def case_of(kind: type[Callback]) -> Case:
    return CASES.get(kind.__name__) or Case(lambda _: (kind(),))
