"""LogMetrics: the log holds the values of the recorded series."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from flowtrain import (
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TrainingPhase,
    on,
)
from flowtrain.callbacks import LogMetrics, LogTraces, Metrics, Recorder, Traces, throttle
from flowtrain.errors import LoggingError
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.logging import CsvBackend, JsonlBackend, TensorBoardBackend
from flowtrain.testing import assert_equivalent, record_access, tiny_learner
from tests.support.logs import log_fields


def logged(path: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for group, name, step, value in log_fields(path, "group", "name", "step", "value"):
        found[group, name].append((step, value))
    return found


def series(learner: Learner) -> dict[tuple[str, str], list[tuple[int, float]]]:
    return {
        (f"{kind}/{phase!r}", name): list(each)
        for kind, by_phase in (("Step", learner.cbstate.metrics_step), ("Epoch", learner.cbstate.metrics_epoch))
        for phase, names in by_phase.items()
        for name, each in names.items()
    }


def test_the_log_is_the_series(tmp_path: Path) -> None:
    def bias(outputs: Any, targets: Any) -> Any:
        return (outputs - targets).mean()

    path = tmp_path / "log.jsonl"
    with tiny_learner(LogMetrics(JsonlBackend(path)), Metrics(bias), n_batches=3) as learner:
        learner.fit(2)
    assert logged(path) == series(learner)
    assert [step for step, _ in logged(path)["Step/TrainingPhase", "Bias"]] == [1, 2, 3, 4, 5, 6]


def test_a_batch_without_a_value_logs_none(tmp_path: Path) -> None:
    class Skip(Callback):
        @on(BatchBegin, TrainingPhase)
        def skip(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
            raise CancelBatchException

    path = tmp_path / "log.jsonl"
    with tiny_learner(LogMetrics(JsonlBackend(path)), Skip(), n_batches=2) as learner:
        learner.fit(1)
    assert set(logged(path)) == {("Step/ValidationPhase", "Loss"), ("Epoch/ValidationPhase", "Loss")}


def test_throttled(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with tiny_learner(throttle(LogMetrics(JsonlBackend(path)), BatchEnd, every=3), n_batches=7) as learner:
        learner.fit(1)
    assert [step for step, _ in logged(path)["Step/TrainingPhase", "Loss"]] == [3, 6]


def test_it_goes_on_where_its_state_says() -> None:
    """Rule 28: a value that was logged before the checkpoint is not logged again."""
    backend = JsonlBackend("nowhere")
    first = LogMetrics(backend)
    first._seen["Step/TrainingPhase/Loss"] = 3  # pyright: ignore[reportPrivateUsage]  # as three batches leave it
    second = LogMetrics(backend)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict() == {"seen": {"Step/TrainingPhase/Loss": 3}}


def test_what_it_declares_is_what_it_touches(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    callback = LogMetrics(backend)
    backend.open(tiny_learner().loop.sinks.run)
    found = record_access(callback)
    declared = {handler.attribute: dict(handler.access or {}) for _, handler in callback.handlers()}
    assert declared == {
        "log_step": {"cbstate.metrics_step": Read()},
        "log_epoch": {"cbstate.metrics_epoch": Read()},
    }
    assert "cbstate.metrics_step" in str(found)
    assert callback.deferrable
    backend.close()


def test_without_metrics_the_message_says_who_makes_them(tmp_path: Path) -> None:
    with pytest.raises(MissingStateError, match=r"metrics_epoch, .* Add flowtrain\.callbacks\.Metrics"):
        tiny_learner(Recorder(), LogMetrics(JsonlBackend(tmp_path / "log")), default_callbacks=False)


@pytest.mark.parametrize(
    ("backends", "message"),
    [
        ((), r"LogMetrics\(\) has no backend to log to\. Write LogMetrics\(TensorBoardBackend\(\"runs/a\"\)\)\."),
        (("log",), r"LogMetrics logs to 'log', which is no LoggerBackend\. Write LogMetrics\("),
        ((JsonlBackend,), r"LogMetrics logs to <class '.*JsonlBackend'>, which is no LoggerBackend\. Write Jsonl"),
    ],
)
def test_mistakes(backends: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LoggingError, match=message):
        LogMetrics(*backends)
    twice = JsonlBackend("log")
    with pytest.raises(LoggingError, match=r"was given JsonlBackend\(.*\) twice, and would log everything twice"):
        LogMetrics(twice, twice)


def test_serial_and_dask_give_one_log(tmp_path: Path) -> None:
    """Rules 6 and 13: several callbacks write to several backends in the same order under both executors."""
    runs = iter(range(100))
    folders: list[Path] = []

    def make(executor: Executor) -> Learner:
        folders.append(tmp_path / str(next(runs)))
        backends = JsonlBackend(folders[-1] / "l"), CsvBackend(folders[-1] / "c"), TensorBoardBackend(folders[-1] / "t")
        traces = Traces({"Twice": lambda learner: 2 * learner.batch.loss}, TrainingPhase)
        return tiny_learner(LogMetrics(*backends), LogTraces(*backends[:2]), traces, executor=executor, n_batches=3)

    placed = ["callbacks.LogMetrics.backends", "callbacks.LogTraces.backends"]  # each run has a folder of its own
    assert_equivalent(make, executors=["dask"], interleavings=2, ignore=placed)
    serial, *others = (logged(folder / "l") for folder in folders)
    tables = {(folder / "c").read_bytes() for folder in folders}
    assert all(other == serial for other in others)
    assert len(folders) == 4
    assert len(tables) == 1
    assert len(serial["Step/TrainingPhase", "Loss"]) == len(serial["Step/TrainingPhase", "Twice"]) == 6
