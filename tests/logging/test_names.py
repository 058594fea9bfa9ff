"""Names that a tracker does not accept."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain.callbacks import LogMetrics, Metric, Metrics
from flowtrain.errors import LoggingError
from flowtrain.logging import (
    CsvBackend,
    File,
    Image,
    JsonlBackend,
    LoggerBackend,
    MLflowBackend,
    Run,
    Settings,
    TensorBoardBackend,
    Text,
    Value,
    WandbBackend,
    log,
)
from flowtrain.logging.names import Names
from flowtrain.testing import tiny_learner

STEP = ("Step", "TrainingPhase")
NAMES = [
    "mAP@50", "mAP_50", "mAP%50", "top-5 (%)", "a//b", "../x", "/abs", "b/..", "c/.", "d/", " ", "step", "group", "a *",
    "line\nbreak", "Verlust \u00e4\u00f6", "smile \U0001f600", "half \ud800", "x" * 400, "x" * 401,
]  # fmt: skip


def test_names_are_cleaned_and_kept_apart() -> None:
    names = Names(r"[^\w\-. :/]", 24)
    wanted = {
        "Loss": "Loss", "mAP@50": "mAP_50", "mAP_50": "mAP_50_2", "mAP%50": "mAP_50_3", "mAP@50_2": "mAP_50_2_2",
        "a//b": "a/_/b", "../x": "_/x", "/abs": "_/abs", "a/..": "a/_", "": "_", "a.b": "a.b", "\u00e4": "\u00e4",
        "x" * 25: "x" * 20, "x" * 26: "x" * 20 + "_2", "y" * 19 + "/" + "y" * 9: "y" * 19, "\u00e4" * 13: "\u00e4" * 10,
    }  # fmt: skip
    assert {name: names.of(name) for name in wanted} == wanted
    assert {name: names.of(name) for name in wanted} == wanted, "a name is cleaned in the same way each time"
    again = Names(r"[^\w\-. :/]", 24)
    again.restore(names.given)
    assert again.of("mAP%50") == "mAP_50_3"
    assert again.of("mAP#50") == "mAP_50_4"


def backends(folder: Path) -> list[LoggerBackend]:
    return [
        CsvBackend(folder / "v.csv"),
        JsonlBackend(folder / "v.jsonl"),
        TensorBoardBackend(folder / "tensorboard"),
        MLflowBackend("digits", "a", tracking_uri=(folder / "mlruns").as_uri()),
        WandbBackend("digits", folder=folder, mode="offline"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_no_name_ends_training(number: int, tmp_path: Path) -> None:
    """Any name can be logged, and no file is written outside of the backend's folder."""
    backend = backends(tmp_path / "runs")[number]
    file = tmp_path / "runs" / "file.txt"
    file.parent.mkdir()
    file.write_text("hello", "utf-8")
    backend.open(Run("r"))
    for step, name in enumerate(NAMES):
        for what in (Value(step), Image(torch.zeros(3, 2, 2)), File(file), Text("hello")):
            if isinstance(what, backend.accepts):
                log(backend, what, name, step, STEP)
    if isinstance(backend, MLflowBackend):
        log(backend, Settings({"lr@0": 1, "lr_0": 2, "../x": 3}), "Settings", 0, STEP)
    backend.close()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_mlflow_calls_them(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    backend = backends(tmp_path)[3]
    assert isinstance(backend, MLflowBackend)
    with tiny_learner(
        LogMetrics(backend), Metrics(*(Metric(half, name) for name in ("mAP@50", "mAP_50", "top 5 (%)"))), n_batches=2
    ) as learner:
        learner.fit(1)
    found = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri()).get_run(backend.run_id).data.metrics
    of_epoch = {key for key in found if key.startswith("Epoch/TrainingPhase/")}
    prefix = "Epoch/TrainingPhase/"
    assert of_epoch == {prefix + name for name in ("Loss", "mAP_50", "mAP_50_2", "top 5 ___")}


def half(outputs: Any, targets: Any) -> float:
    return 0.5


def test_a_resumed_run_calls_them_the_same(tmp_path: Path) -> None:
    """Names stay the same, even if the resumed run logs them in another order; old positions lack names."""
    backend = backends(tmp_path)[3]
    backend.open(Run("r"))
    log(backend, Value(1), "mAP_50", 1, STEP)
    position = json.loads(json.dumps(backend.flush()))
    backend.close()
    for kept, name in ((position, "mAP_50_2"), ({"run": position["run"], "metrics": position["metrics"]}, "mAP_50")):
        again = backends(tmp_path)[3]
        again.open(Run("r", resumed=True))
        again.restore(kept)
        log(again, Value(2), "mAP@50", 2, STEP)
        assert again.flush()["metrics"].keys() == {"Step/TrainingPhase/mAP_50", f"Step/TrainingPhase/{name}"}
        again.restore(kept)
        again.close()


def test_columns_of_a_table_stay_what_they_are(tmp_path: Path) -> None:
    """A value with the name of the step's column does not overwrite the step."""
    backend = CsvBackend(tmp_path / "v.csv")
    backend.open(Run("r"))
    for name, value in {"step": 0.5, "group": 0.25, "step_": 0.75, "Loss": 1.0}.items():
        log(backend, Value(value), name, 7, STEP)
    backend.close()
    with open(tmp_path / "v.csv", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row == {
        "group": "Step/TrainingPhase", "step": "7", "step_": "0.5", "group_": "0.25", "step__": "0.75", "Loss": "1.0",
    }  # fmt: skip


def test_half_a_character(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    backend.open(Run("r"))
    log(backend, Value(1), "half \ud800", 1, STEP)
    backend.close()
    assert json.loads((tmp_path / "log").read_text("utf-8"))["name"] == "half ?"


def test_an_empty_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoggingError, match=r"was given the name ''"):
        log(JsonlBackend(tmp_path / "log"), Value(1), "", 1, STEP)
