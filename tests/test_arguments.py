"""Arguments that are refused where they are given, with their name, and not later or with an error of Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from flowtrain import CallbackError, FlowtrainError, TrainingPhase
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    DeviceStats,
    EarlyStopping,
    Freeze,
    GradNorm,
    HyperParameter,
    LearningRate,
    LearningRateMonitor,
    LogHistograms,
    LogVisualization,
    Profiler,
    ProgressBar,
    Recorder,
    SanityCheck,
    Scheduler,
    Setting,
    SmoothLoss,
    from_torch,
)
from flowtrain.callbacks.stopping import PQ, Patience, Threshold
from flowtrain.logging import CsvBackend, File, Image, JsonlBackend, TensorBoardBackend
from flowtrain.logging.files import read_file
from flowtrain.logging.pictures import pixels
from flowtrain.logging.values import settings
from flowtrain.testing import assert_equivalent, tiny_learner
from tests.support.untyped import untyped

JSONL = JsonlBackend("unused.jsonl")


def torchs() -> StepLR:
    return StepLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 2)


SWITCHES: list[Callable[..., object]] = [
    lambda value: EMA(buffers=value),
    lambda value: Freeze({"a": 1}, norms=value),
    lambda value: GradNorm(layers=value),
    lambda value: Checkpointer("unused", restore_best=value),
    lambda value: LogHistograms(JSONL, gradients=value),
    lambda value: Profiler("unused", record_shapes=value),
    lambda value: Profiler("unused", profile_memory=value),
    lambda value: Profiler("unused", with_stack=value),
    lambda value: JsonlBackend("unused.jsonl", append=value),
    lambda value: CsvBackend("unused.csv", append=value),
    lambda value: TensorBoardBackend("unused", append=value),
]


@pytest.mark.parametrize("make", SWITCHES)
def test_switches_are_true_or_false(make: Callable[..., object]) -> None:
    make(True)
    for value in ("no", 1, None):
        with pytest.raises(FlowtrainError, match=rf"^\w+\((\w+)={value!r}\): \1 is True or False\.$"):
            make(value)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: LogHistograms(JSONL, bins=0), "LogHistograms(): bins is a whole number, at least 1, got 0."),
    (lambda: LogHistograms(JSONL, every=0), "LogHistograms(): every is a whole number, at least 1, got 0."),
    (
        lambda: LogVisualization(print, JSONL, every=0),
        "LogVisualization(): every is a whole number, at least 1, got 0.",
    ),
    (
        lambda: LogVisualization(print, JSONL, name=""),
        "LogVisualization(name=''): name is a text that is not empty, as 'Mistakes'.",
    ),
    (lambda: SmoothLoss(untyped("x")), "SmoothLoss(beta='x'): beta is at least 0 and below 1, such as 0.98."),
    (lambda: EMA(True), "EMA(decay=True): decay is at least 0 and below 1, such as 0.999."),
    (
        lambda: from_torch(untyped(torchs()), 0.1),
        "from_torch() takes a function that makes the scheduler: from_torch(lambda optimizer: StepLR(optimizer, ...), "
        "0.1); got a StepLR.",
    ),
    (
        lambda: Scheduler({LearningRate: untyped(torchs())}),
        "A schedule is a function schedule(n) of the coming update, from 1, or a number; got a StepLR, which torch "
        "makes for an optimizer. Write from_torch(lambda optimizer: StepLR(optimizer, ...), 0.1).",
    ),
    (
        lambda: Scheduler({HyperParameter: 0.1}),
        f"Scheduler got {HyperParameter!r} where a hyperparameter belongs. Write Scheduler({{LearningRate: "
        "one_cycle(1e-3)}).",
    ),
    (
        lambda: Scheduler({Setting: 0.1}),
        f"Scheduler got {Setting!r} where a hyperparameter belongs. Write Scheduler({{LearningRate: "
        "one_cycle(1e-3)}).",
    ),
    (
        lambda: Freeze(untyped({1: 2})),
        "Freeze({1: 2}) takes a mapping from patterns of names to epochs: Freeze({'backbone.*': 2}) freezes for two "
        "epochs, and Freeze({'backbone.*': None}) for ever.",
    ),
    (
        lambda: Freeze({"a": (1, 1)}),
        "Freeze(): the number of epochs for 'a' is the pair (1, 1): the second number is larger than the first.",
    ),
    (lambda: JsonlBackend(untyped(None)), "JsonlBackend(path=None): path is a path, such as 'runs/a/log.jsonl'."),
    (lambda: JsonlBackend(untyped(b"x")), "JsonlBackend(path=b'x'): path is a path, such as 'runs/a/log.jsonl'."),
    (lambda: CsvBackend(untyped(3)), "CsvBackend(path=3): path is a path, such as 'runs/a/log.jsonl'."),
    (
        lambda: TensorBoardBackend(untyped(None)),
        "TensorBoardBackend(path=None): path is a path, such as 'runs/a/log.jsonl'.",
    ),
    (lambda: read_file(File(untyped(None))), "File(None): path is a path, such as 'runs/a/model.onnx'."),
    (
        lambda: Profiler("unused", activities=untyped(["cpu"])),
        "Profiler(activities=['cpu']): activities are torch.profiler.ProfilerActivity.CPU, .CUDA and others, in a "
        "list.",
    ),
    (
        lambda: ProgressBar(redraw=True),
        "ProgressBar(redraw=True): redraw is a number of seconds, at least 0, such as 0.2.",
    ),
    (
        lambda: settings(untyped(SimpleNamespace(lr=1))),
        "Settings(...) takes a mapping from names to values, and got namespace(lr=1). Write {'lr': 0.1}; for a "
        "Namespace vars(...), for a dataclass dataclasses.asdict(...).",
    ),
    (
        lambda: DeviceStats(measure=untyped(lambda: {"Watt": "x"})),
        "DeviceStats: measure() returned {'Watt': 'x'}; return numbers by name: {\"Watt\": 250.0}.",
    ),
    (
        lambda: assert_equivalent(untyped(tiny_learner), executors="serial"),
        "assert_equivalent(executors='serial'): write executors=['serial'].",
    ),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_arguments_that_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(FlowtrainError) as caught:
        make()
    assert str(caught.value) == text


def test_numbers_of_numpy_are_numbers() -> None:
    value: Any = np.float32(0.5)
    assert (EMA(value).decay, Patience(2, value).min_delta, Threshold(value).value) == (0.5, 0.5, 0.5)
    assert (SmoothLoss(value).beta, ProgressBar(redraw=value).redraw) == (0.5, 0.5)


def test_values_at_the_ends_of_the_range_end_no_training() -> None:
    for values in ([float("inf"), -float("inf")], [1e308, 1e308]):
        assert PQ(k=2).update(1.0, values) is None


def test_pictures_of_16_bits_and_sparse_ones() -> None:
    wide = np.array([[0, 7, 65535]], dtype=np.uint16)
    assert pixels(wide).flatten().tolist() == [0, 7, 255]
    assert pixels(torch.eye(2).to_sparse()).flatten().tolist() == [255, 0, 0, 255]
    assert Image(wide) is not None


class Chooses(torch.optim.SGD):
    """An optimizer that chooses its learning rate itself, as Adafactor of transformers."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch overloads it
        """Change nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None


def test_a_learning_rate_that_the_optimizer_chooses() -> None:
    learner = tiny_learner(LearningRateMonitor(), SanityCheck(), optimizer=Chooses, n_batches=2)
    learner.fit(1)
    assert not learner.cbstate.tracehistory[TrainingPhase].get("LearningRate")


def test_histograms_of_complex_parameters(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = torch.nn.Parameter(torch.tensor([3 + 4j]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.phase.abs()

    log = JsonlBackend(tmp_path / "log.jsonl")
    with tiny_learner(LogHistograms(log, every=1, bins=1), model=Net(), n_batches=1) as learner:
        learner.fit(1)
    text = (tmp_path / "log.jsonl").read_text("utf-8")
    assert '"name": "Weights/phase.abs"' in text
    assert '"counts": [1]' in text


def test_a_callback_is_found_by_itself() -> None:
    ema = EMA(0.5)
    learner = tiny_learner(ema, EarlyStopping(3))
    assert learner.get_callback(ema) is ema
    assert learner.get_callback(Recorder()) is None
    assert learner.remove_callback(ema) is ema
    with pytest.raises(CallbackError, match=r"^There is no callback <EMA>\. The learner has: EarlyStopping, "):
        learner.remove_callback(ema)


def test_the_averages_follow_the_dtype_of_the_model() -> None:
    ema = EMA(0.5)
    learner = tiny_learner(ema, n_batches=2)
    learner.fit(1)
    learner.model.double()
    batches = [(x.double(), y.double()) for x, y in learner.data[TrainingPhase]]
    learner.fit(1, data=batches)
    assert ema.averages["coeff"].dtype == torch.float64
