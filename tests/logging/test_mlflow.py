"""MLflow: a real store in a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain.errors import LoggingError
from flowtrain.logging import File, Image, LoggerBackend, MLflowBackend, Run, Settings, Text, Value
from flowtrain.testing import BackendContract

STEP = ("Step", "TrainingPhase")


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow keep runs in a folder, without a database, and tell nobody."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def make(folder: Path) -> MLflowBackend:
    return MLflowBackend("digits", "a", tracking_uri=(folder / "mlruns").as_uri())


def runs(folder: Path) -> list[Any]:
    """The runs of the store, the newest first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    found: list[Any] = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
    return found


class TestContract(BackendContract):
    """`MLflowBackend` is a backend."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return make(folder)

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
        [run] = [run for run in runs(folder) if run.data.tags["flowtrain.run"] == "contract"]
        entries: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for key in run.data.metrics:
            group, _, name = key.rpartition("/")
            history = client.get_metric_history(run.info.run_id, key)
            entries[group, name] = [(metric.step, metric.value) for metric in history]
        return entries


def test_settings_are_parameters_and_files_are_artifacts(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    report = tmp_path / "report.html"
    report.write_text("<p>", "utf-8")
    backend = make(tmp_path)
    backend.open(Run("r"))
    logged = {"Settings": Settings({"model": {"width": 8}, "name": None}), "Text": Text("ü"), "File": File(report)}
    for name, loggable in {**logged, "Image": Image(torch.zeros(2, 2))}.items():
        backend.write(backend.encode(loggable, name, 3, STEP))
    backend.close()
    [run] = runs(tmp_path)
    assert run.data.params == {"model.width": "8", "name": "None"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a")
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    folder = Path(client.download_artifacts(run.info.run_id, "Step/TrainingPhase"))
    assert (folder / "Text" / "3.md").read_text("utf-8") == "ü"
    assert (folder / "File" / "3.html").read_text("utf-8") == "<p>"
    assert (folder / "Image" / "3.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_back_is_a_new_one_that_names_the_old(tmp_path: Path) -> None:
    backend = make(tmp_path)
    backend.open(Run("r"))
    backend.write(backend.encode(Settings({"lr": 0.1}), "Settings", 0, ("HyperParams",)))
    backend.write(backend.encode(Value(1), "Loss", 1, STEP))
    position = backend.flush()
    backend.write(backend.encode(Value(2), "Loss", 2, STEP))
    backend.flush()
    old = backend.run_id
    backend.restore(position)
    backend.close()
    found = {run.info.run_id: run for run in runs(tmp_path)}
    new = found[backend.run_id]
    assert len(found) == 2
    assert (new.data.tags["flowtrain.continues"], new.data.params) == (old, {"lr": "0.1"})
    assert new.data.metrics == {"Step/TrainingPhase/Loss": 1.0}
    assert (found[old].info.status, found[old].data.metrics) == ("KILLED", {"Step/TrainingPhase/Loss": 2.0})


def test_what_mlflow_refuses_is_a_logging_error(tmp_path: Path) -> None:
    backend = make(tmp_path)
    backend.open(Run("r"))
    backend.write(backend.encode(Value(1.0), "Loss", 1, STEP))
    shutil.rmtree(tmp_path / "mlruns")
    with pytest.raises(LoggingError, match=r"MLflowBackend\('digits', .*\) could not take 1 values, the first one St"):
        backend.flush()
    with pytest.raises(LoggingError, match=r"could not take 1 values"):
        backend.close()
    backend.close()


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(LoggingError, match=r"MLflowBackend needs mlflow, .* pip install 'flowtrain\[mlflow\]'"):
        MLflowBackend("digits").open(Run("r"))
