"""No two callbacks write one series to one backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowtrain import BatchBegin, BatchEnd, Callback, EpochEnd, TrainingPhase, ValidationPhase
from flowtrain.callbacks import LogHistograms, LogHyperParams, LogMetrics, LogTraces, LogVisualization, Traces
from flowtrain.errors import LoggingError
from flowtrain.logging import JsonlBackend, Value
from flowtrain.testing import tiny_learner


def zero(learner: Any) -> Value:
    return Value(0)


def trace(name: str, event: Any = BatchEnd) -> Traces:
    return Traces({name: lambda learner: 0.0}, TrainingPhase, event, access={})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda one: [LogVisualization(zero, one), LogVisualization(zero, one, event_type=BatchBegin)],
            r"LogVisualization and LogVisualization#2 both write 'Zero' to JsonlBackend\(.*\), group Step: their "
            r"values would be mixed in one series\. Give one another name, as in LogVisualization\(f, backend, name='O",
        ),
        (lambda one: [LogMetrics(one), LogVisualization(zero, one, name="Loss")], r"LogMetrics and .* 'Loss'.* name="),
        (lambda one: [LogMetrics(one), LogMetrics(one)], r"write 'Loss' to .* Remove one, or give each a backend of"),
        (lambda one: [LogHistograms(one), LogHistograms(one, gradients=True)], r"both write 'Weights' to .*, group "),
        (lambda one: [LogHyperParams(one), LogHyperParams(one)], r"both write the entries of cbstate\.hyperparams to"),
        (lambda one: [trace("A"), LogTraces(one), LogTraces(one)], r"LogTraces and LogTraces#2 both write 'A' to"),
        (
            lambda one: [trace("Loss"), LogTraces(one), LogMetrics(one)],
            r"LogTraces and LogMetrics both write 'Loss' to .* Give the trace another name\.",
        ),
        (
            lambda one: [trace("A"), trace("A", BatchBegin)],
            r"Traces and Traces#2 both write 'A' to cbstate\.tracehistory: their .* Give the trace another name\.",
        ),
    ],
)
def test_one_series_has_one_writer(
    make: Callable[[JsonlBackend], list[Callback]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoggingError, match=message):
        tiny_learner(*make(JsonlBackend(tmp_path / "log")))


def test_what_is_not_the_same_series_is_fine(tmp_path: Path) -> None:
    """Other backends, phases, groups and names."""
    one, other = JsonlBackend(tmp_path / "one"), JsonlBackend(tmp_path / "other")
    callbacks = [
        LogMetrics(one), LogMetrics(other), trace("A"), trace("B"), LogTraces(one),
        LogVisualization(zero, one, every=1, phase_type=TrainingPhase),
        LogVisualization(zero, one, every=1, phase_type=ValidationPhase),
        LogVisualization(zero, one, every=1, event_type=EpochEnd),
        LogVisualization(zero, one, every=1, name="Another"),
        LogVisualization(zero, other, every=1),
    ]  # fmt: skip
    with tiny_learner(*callbacks, n_batches=1) as learner:
        learner.fit(1)
    assert (tmp_path / "one").read_text("utf-8").count('"Zero"') == 4
