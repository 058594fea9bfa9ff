"""All bundled callbacks: each declares what it touches, comes to the serial result, and says so in its docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import flowtrain.callbacks
from flowtrain import (
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelFittingException,
    EpochEnd,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.access import Path as StatePath
from flowtrain.callback.access import declare
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    DeviceStats,
    EarlyStopping,
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
    Timer,
    Traces,
    one_cycle,
    reduce_on_plateau,
)
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.logging import JsonlBackend, Value
from flowtrain.testing import assert_equivalent, record_access, tiny_learner

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


class Ends(Callback):
    """End training in the middle of a validation batch, or of a training batch.

    The dry run leaves out callbacks that write nothing, so it says that it does.
    """

    def __init__(self, phase: type[Phase]) -> None:
        self.phase = phase

    @on(LossBegin, access={"cbstate.purpose": Write()})
    def end(self, event: LossBegin, phase: Phase, learner: LearnerView) -> None:
        if isinstance(phase, self.phase):
            raise CancelFittingException("on purpose")


@dataclass(frozen=True)
class Case:
    """How a callback is looked at.

    Attributes:
        make: Makes it, in a folder, and after it those that it needs.
        options: Of the learner.
        unseen: The handlers that declare more than a dry run sees, with the reason.
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
    "GradNorm": Case(lambda _: (GradNorm(layers=True),), unseen={"record_layers": "the model names the layers"}),
    "LogHistograms": Case(lambda folder: (LogHistograms(backend(folder), every=1),), placed=("backends",)),
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
    "ProgressBar": Case(lambda _: (ProgressBar(redraw=0, report=0),), placed=("_drawn", "_next")),
    "Recorder": Case(
        lambda _: (flowtrain.callbacks.Recorder(),),
        unseen={"keep_updates": "no batch is cancelled after its update", "keep_last_updates": FILLED},
    ),
    "SanityCheck": Case(
        lambda _: (flowtrain.callbacks.SanityCheck(),), unseen={"check": "random numbers are put back in it"}
    ),
    "Scheduler": Case(lambda _: (Scheduler({LearningRate: reduce_on_plateau(0.05)}),)),
    "StopOnNaNLoss": Case(lambda _: (flowtrain.callbacks.StopOnNaNLoss(),), {"lossfn": not_a_number}),
    "Timer": Case(lambda _: (Timer(iter(range(10_000)).__next__),), placed=("clock",)),
    "Traces": Case(lambda _: (twice(),)),
}


def case_of(kind: type[Callback]) -> Case:
    return CASES.get(kind.__name__) or Case(lambda _: (kind(),))


def seen(kind: type[Callback], folder: Path) -> dict[str, dict[StatePath, Read | Write]]:
    """Return what each handler was seen to touch, in a fit that ends normally and in two that do not."""
    case = case_of(kind)
    found: dict[str, dict[StatePath, Read | Write]] = {}
    for ends in ((), (Ends(TrainingPhase),), (Ends(ValidationPhase),)):
        subject, *others = case.make(folder)
        recording = record_access(subject, *others, *ends, **case.options)
        for name, declaration in recording.handlers.items():
            for path, kind_of in declaration:
                known = found.setdefault(name, {})
                known[path] = Write() if Write() in (kind_of, known.get(path)) else kind_of
            found.setdefault(name, {})
    return found


def plain(declaration: Mapping[StatePath, Read | Write]) -> dict[StatePath, Read | Write]:
    """Leave out whether a read is optional: what was there when it was read does not show that it is."""
    return {path: Write() if isinstance(kind, Write) else Read() for path, kind in declaration.items()}


def test_every_case_is_one_of_a_bundled_callback() -> None:
    assert set(CASES) <= {kind.__name__ for kind in KINDS}
    assert len(KINDS) >= 23


@pytest.mark.filterwarnings("ignore:The loss is NaN")
@pytest.mark.parametrize("kind", KINDS)
def test_what_each_handler_declares_is_what_it_touches(kind: type[Callback], tmp_path: Path) -> None:
    """Rule 3, and exactly: less is refused, and more would order or refuse what is independent."""
    subject, *_ = case_of(kind).make(tmp_path)
    found, shared = seen(kind, tmp_path), subject.state_access()
    unseen = case_of(kind).unseen
    for _, handler in subject.handlers():
        name = handler.attribute
        declared = plain(dict(declare(shared if handler.access is None else handler.access, kind.__name__)))
        touched = plain(found.get(name, {}))
        if name in unseen:
            assert touched != declared, f"{name} is seen after all: take it out of CASES"
            assert all(any(path[:length] in declared for length in range(len(path) + 1)) for path in touched), name
        else:
            assert declared == touched, name


class Clip(Callback):
    """Writes gradients, and the inputs at the events before."""

    @on(BatchBegin, TrainingPhase, access={"batch.inputs": Write()})
    def augment(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.inputs = learner.batch.inputs + 0.0

    @on(BackwardEnd, TrainingPhase, access={"batch.grads": Write()})
    def clip(self, event: BackwardEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.grads["coeff"].clamp_(-1, 1)


@pytest.mark.parametrize("turn", [1, -1])
def test_all_of_them_go_together_whatever_the_order_of_the_list(turn: int, tmp_path: Path) -> None:
    """Rule 5 finds no conflict and no circle between them, also with all of ``batch`` declared where it can be."""
    callbacks: dict[str, Callback] = {"Clip": Clip()}
    for kind in KINDS:
        for callback in case_of(kind).make(tmp_path / kind.__name__):
            callbacks.setdefault(type(callback).__name__, callback)
    more = (
        LogVisualization(shown, backend(tmp_path / "step"), every=1),
        LogVisualization(shown, backend(tmp_path / "epoch"), every=1, event_type=EpochEnd, name="AtTheEnd"),
        Traces({"Loss": loss_of}, TrainingPhase),
    )
    learner = tiny_learner(*[*callbacks.values(), *more][::turn], n_batches=3)
    learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].steps == 3
    assert learner.stopped is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_serial_one(kind: type[Callback], tmp_path: Path) -> None:
    """Rule 13, for all of them."""
    case = case_of(kind)
    runs = iter(range(100))

    def make(executor: Executor) -> Learner:
        return tiny_learner(*case.make(tmp_path / str(next(runs))), n_batches=3, executor=executor)

    ignored = [f"callbacks.{kind.__name__}.{name}" for name in case.placed]
    assert_equivalent(make, executors=["dask"], interleavings=2, ignore=ignored)


@pytest.mark.parametrize("kind", KINDS)
def test_the_docstring_says_what_it_reads_and_writes_and_runs_after_and_costs_and_has_an_example(
    kind: type[Callback],
) -> None:
    text = inspect.getdoc(kind) or ""
    for wanted in (r"\breads?\b", r"\bwrites?\b", r"\bruns? after\b", r"\bcosts?\b", r">>> "):
        assert re.search(wanted, " ".join(text.split()), re.IGNORECASE), f"{kind.__name__} does not say {wanted}"
