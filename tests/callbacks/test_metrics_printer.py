"""MetricsPrinter: prints one readable line for each epoch."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    BatchBegin,
    Callback,
    CancelEpochException,
    CancelFittingException,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Checkpointer, Metric, Metrics, MetricsPrinter, Recorder
from flowtrain.callbacks.metrics_printer import rate_text
from flowtrain.testing import tiny_learner
from tests.support.clock import Clock, Tick
from tests.support.console import printed


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def output(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Yield the output of rich's console, once as a file and once as a terminal."""
    with printed(40, terminal=request.param) as written:
        yield written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def constant(value: float) -> Any:
    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        return value

    return metric


def printing(*callbacks: Callback, metrics: Metrics, n_batches: int = 2) -> Any:
    return tiny_learner(*callbacks, metrics, MetricsPrinter(), n_batches=n_batches)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            partial(CancelFittingException, "[red]Enough."),
            "[red]Enough. (raised in Stop.stop at (BatchBegin, TrainingPhase), epoch 1, batch 1)",
        ),
        (partial(CancelFittingException, "Enough in epoch 1."), "Enough in epoch 1."),
        (
            CancelFittingException,
            "CancelFittingException, raised in Stop.stop at (BatchBegin, TrainingPhase), epoch 1, batch 1",
        ),
        (partial(CancelEpochException, "Not the fit."), ""),
        (partial(ValueError, "An error is raised."), ""),
        (
            partial(KeyboardInterrupt, "Stopped by hand"),
            "Stopped by hand (in TrainingPhase, epoch 1, batch 1)",
        ),
    ],
)
def test_the_reason_why_a_fit_was_stopped(make: Callable[[], BaseException], line: str, output: io.StringIO) -> None:
    class Stop(Callback):
        @on(BatchBegin, TrainingPhase)
        def stop(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            raise make()

    with suppress(ValueError, KeyboardInterrupt):
        printing(Stop(), metrics=Metrics(Metric(constant(1.0), name="A", phase=TrainingPhase))).fit(1)
    found = [each for each in output.getvalue().splitlines() if not each.startswith("epoch   1  ValidationPhase")]
    assert found == ([line] if line else [])


def test_one_plain_line_for_each_epoch(output: io.StringIO, clock: Clock) -> None:
    """A line that is longer than the terminal and holds brackets, which rich reads as markup, is printed unchanged."""
    large = Metric(constant(1234567.0), name="B", phase=ValidationPhase)
    metrics = Metrics(Metric(constant(0.123456), name="[bold]A"), large)
    learner = printing(Tick(clock, 1.25), metrics=metrics)
    learner.fit(2)
    train = [value for _, value in learner.cbstate.metrics_epoch[TrainingPhase]["Loss"]]
    valid = [value for _, value in learner.cbstate.metrics_epoch[ValidationPhase]["Loss"]]
    assert output.getvalue().splitlines() == [
        f"epoch   1  TrainingPhase     Loss {train[0]:.4g}  [bold]A 0.1235  2.50 s",
        f"epoch   1  ValidationPhase   Loss {valid[0]:.4g}  [bold]A 0.1235  B 1.235e+06  2.50 s",
        f"epoch   2  TrainingPhase     Loss {train[1]:.4g}  [bold]A 0.1235  2.50 s",
        f"epoch   2  ValidationPhase   Loss {valid[1]:.4g}  [bold]A 0.1235  B 1.235e+06  2.50 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "batch_size", "end"),
    [
        (0.001, 4, "0.00 s  3,333 samples/s"),
        (0.01, 4, "0.03 s  333 samples/s"),
        (1.0, 4, "3.00 s  3.33 samples/s"),
        (100.0, 4, "0:05:00  0.0333 samples/s"),
        (2500.0, 4, "2:05:00  0.00133 samples/s"),
        (1.0, 16, "1.00 s  10 samples/s"),
    ],
)
def test_the_time_and_the_throughput_of_an_epoch(
    seconds: float, batch_size: int, end: str, output: io.StringIO, clock: Clock
) -> None:
    """The last batch of 10 samples is smaller."""
    data = TensorDataset(torch.ones(10, 1), torch.ones(10, 1))
    tiny_learner(Tick(clock, seconds), MetricsPrinter(), data=DataLoader(data, batch_size)).fit(2)
    assert [re.split("  Loss [^ ]+  ", line)[1] for line in output.getvalue().splitlines()] == [end] * 2


def test_the_rest_of_an_epoch_has_the_time_and_the_throughput_of_the_rest(
    output: io.StringIO, clock: Clock, tmp_path: Path
) -> None:
    """A fit that resumes within an epoch has not measured the time of the batches before the checkpoint."""

    def learner() -> Learner:
        data = DataLoader(TensorDataset(torch.ones(40, 1), torch.ones(40, 1)), 4)
        saves = Checkpointer(tmp_path, every_steps=7)
        return tiny_learner(Tick(clock, 2.0), saves, MetricsPrinter(), data=data)

    learner().fit(steps=7)
    output.truncate(0)
    learner().fit(steps=10, resume=tmp_path)
    assert output.getvalue().split()[-4:] == ["6.00", "s", "2", "samples/s"]


def test_an_epoch_that_recorded_nothing_prints_nothing(output: io.StringIO) -> None:
    class Cancel(Callback):
        epochs = 0

        @on(BatchBegin, TrainingPhase)
        def cancel(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
            self.epochs += 1
            if self.epochs == 3:  # this cancels the first batch of the second epoch
                raise CancelEpochException("no")

    learner = printing(Cancel(), metrics=Metrics())
    learner.epoch(TrainingPhase)
    learner.epoch(TrainingPhase)
    learner.epoch(TrainingPhase)
    assert [line[:9] for line in output.getvalue().splitlines()] == ["epoch   1", "epoch   3"]


def test_all_metrics_share_a_line(output: io.StringIO) -> None:
    metrics = Metrics(Metric(constant(1.0), name="One"), Metric(constant(2), name="Two"))
    learner = tiny_learner(MetricsPrinter(), metrics, n_batches=2)
    learner.epoch(ValidationPhase)
    [line] = output.getvalue().splitlines()
    assert "  One 1" in line
    assert "  Two 2" in line
    assert line.count("Loss") == 1


def test_without_metrics_the_error_names_them() -> None:
    message = r"Add flowtrain\.callbacks\.Metrics, which provides cbstate\.metrics_epoch"
    with pytest.raises(MissingStateError, match=message):
        tiny_learner(Recorder(), MetricsPrinter(), default_callbacks=False)


def test_quiet_prints_nothing_at_all(capfd: pytest.CaptureFixture[str]) -> None:
    learner = tiny_learner(Metrics(Metric(constant(1.0), name="One")))
    learner.fit(2)
    learner.validate()
    assert capfd.readouterr() == ("", "")


def test_by_default_it_prints_to_standard_output(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    learner = tiny_learner(default_callbacks=True, n_batches=2)
    learner.fit(1)
    output, errors = capfd.readouterr()
    assert [line[:28] for line in output.splitlines()] == [
        "epoch   1  TrainingPhase    ",
        "epoch   1  ValidationPhase  ",
    ]
    assert errors == ""
    assert output.replace("\n", "").isprintable()


def test_the_rate_is_that_of_all_ranks() -> None:
    assert rate_text(300, 2.0, 1) == ["150 samples/s"]
    assert rate_text(300, 2.0, 4) == ["600 samples/s"]
    assert rate_text(None, 2.0, 4) == []
