"""MLflow, with a real store in a folder."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import Callback, CancelFittingException, EpochEnd, LearnerView, ValidationPhase
from flowtrain.callbacks import Checkpointer, CustomCallback, LogMetrics, once
from flowtrain.errors import LoggingError
from flowtrain.logging import (
    File,
    Image,
    JsonlBackend,
    LoggerBackend,
    MLflowBackend,
    Outcome,
    Run,
    Settings,
    Text,
    Value,
)
from flowtrain.testing import BackendContract, tiny_learner

STEP = ("Step", "TrainingPhase")


def make(folder: Path) -> MLflowBackend:
    return MLflowBackend("digits", "a", tracking_uri=(folder / "mlruns").as_uri())


def runs(folder: Path) -> list[Any]:
    """Return the runs of the store, the newest first."""
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
    # The whole folder: for a part of it, mlflow 3.0 looks in its default store, and makes that in the current folder.
    folder = Path(client.download_artifacts(run.info.run_id, "")) / "Step" / "TrainingPhase"
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


def test_old_metrics_are_sent_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that logs only epochs has its values in MLflow before it ends."""
    monkeypatch.setattr("flowtrain.logging.mlflow._PATIENCE", 0.0)
    backend = make(tmp_path)
    backend.open(Run("r"))
    for step in (1, 2):
        backend.write(backend.encode(Value(step / 2), "Loss", step, STEP))
    assert runs(tmp_path)[0].data.metrics == {"Step/TrainingPhase/Loss": 1.0}
    backend.close()


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


# --- how the run ended


def statuses(folder: Path) -> list[str]:
    """Return the status of every run, the newest first."""
    return [run.info.status for run in runs(folder)]


def stop_with(kind: type[BaseException]) -> Callback:
    def stop(learner: LearnerView) -> None:
        raise kind("stop")

    return CustomCallback(stop, EpochEnd, ValidationPhase)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (None, "FINISHED"),
        (CancelFittingException, "FINISHED"),
        (ValueError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
    ],
)
@pytest.mark.parametrize("way", ["close", "with", "dropped"])
def test_the_status_says_how_the_run_ended(
    failure: type[BaseException] | None, status: str, way: str, tmp_path: Path
) -> None:
    callbacks = [] if failure is None else [stop_with(failure)]
    learner = tiny_learner(LogMetrics(make(tmp_path)), *callbacks, n_batches=2)
    with suppress(ValueError, KeyboardInterrupt, SystemExit), learner if way == "with" else nullcontext():
        learner.fit(1)
    if way == "close":
        learner.close()
    elif way == "dropped":
        del learner, callbacks
        gc.collect()
    assert statuses(tmp_path) == [status]
    [run] = runs(tmp_path)
    assert run.data.metrics["Step/TrainingPhase/Loss"] > 0  # pending records were sent


def test_what_is_trained_last_decides(tmp_path: Path) -> None:
    """A failure counts no longer after a later successful fit; a later evaluation does not outweigh it."""
    failing = stop_with(ValueError)
    with tiny_learner(LogMetrics(make(tmp_path)), failing, n_batches=2) as learner:
        with suppress(ValueError):
            learner.fit(1)
        learner.remove_callback(CustomCallback)
        learner.validate()
        assert statuses(tmp_path) == ["RUNNING"]
    assert statuses(tmp_path) == ["FAILED"]
    with suppress(ZeroDivisionError), tiny_learner(LogMetrics(make(tmp_path)), n_batches=2) as learner:
        learner.fit(1)
        _ = 1 / 0
    assert statuses(tmp_path) == ["FAILED", "FAILED"]
    with tiny_learner(LogMetrics(make(tmp_path)), once(stop_with(ValueError), EpochEnd), n_batches=2) as learner:
        with suppress(ValueError):
            learner.fit(1)
        learner.fit(1)
    assert statuses(tmp_path) == ["FINISHED", "FAILED", "FAILED"]


def test_a_failed_run_that_is_resumed_finishes(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    with (
        suppress(ValueError),
        tiny_learner(LogMetrics(make(tmp_path)), Checkpointer(checkpoints), n_batches=2) as learner,
    ):
        learner.fit(1)
        learner.add_callback(stop_with(ValueError))
        learner.fit(1)
    assert statuses(tmp_path) == ["FAILED"]
    with tiny_learner(LogMetrics(make(tmp_path)), Checkpointer(checkpoints), n_batches=2) as learner:
        learner.fit(3, resume=checkpoints)
    # The failed run has records from after the checkpoint, so the resumed fit gets a new run.
    assert sorted(statuses(tmp_path)) == ["FAILED", "FINISHED"]


def test_a_run_that_failed_where_it_is_resumed_is_the_same_run(tmp_path: Path) -> None:
    backend = make(tmp_path)
    position: Any = None
    ends: list[tuple[bool, Outcome | None, str]]
    ends = [(False, "failed", "FAILED"), (True, "killed", "KILLED"), (True, None, "FINISHED")]
    for resumed, outcome, status in ends:
        backend.open(Run("r", resumed=resumed))
        assert statuses(tmp_path) == ["RUNNING"]
        if resumed:
            backend.restore(position)
        position = backend.flush()
        if outcome is not None:
            backend.ended(outcome)
        backend.close()
        assert statuses(tmp_path) == [status]


class Old(JsonlBackend):
    """A backend written before `ended` existed: its `close` takes no argument."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        super().close()


def test_a_backend_that_does_not_ask_is_closed_as_ever(tmp_path: Path) -> None:
    backend = Old(tmp_path / "log.jsonl")
    with suppress(ValueError), tiny_learner(LogMetrics(backend), stop_with(ValueError)) as learner:
        learner.fit(1)
    assert backend.closed == 2  # `open` closes the run that is open


def has_server() -> bool:
    try:
        return bool(importlib.metadata.version("mlflow"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not has_server(), reason="the server is in the package mlflow, of 300 MB")
def test_a_real_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    with (tmp_path / "out").open("w") as out:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, (tmp_path / "out").read_text()
                assert time.monotonic() < deadline, (tmp_path / "out").read_text()
                time.sleep(0.2)
        for failing, status in (([], "FINISHED"), ([stop_with(ValueError)], "FAILED")):
            backend = MLflowBackend("digits", tracking_uri=f"http://127.0.0.1:{port}")
            with suppress(ValueError), tiny_learner(LogMetrics(backend), *failing, n_batches=3) as learner:
                learner.fit(1)
            run = mlflow_client(backend).get_run(backend.run_id)
            assert run.info.status == status
            history = mlflow_client(backend).get_metric_history(backend.run_id, "Step/TrainingPhase/Loss")
            assert [metric.step for metric in history] == [1, 2, 3]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def mlflow_client(backend: MLflowBackend) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=backend.tracking_uri)


def test_tags_are_those_of_the_user_also_in_the_run_that_continues(tmp_path: Path) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    backend = MLflowBackend("digits", tracking_uri=uri, tags={"dataset": "v2", "mlflow.note.content": "A try."})
    backend.open(Run("r"))
    backend.write(backend.encode(Value(1), "Loss", 1, STEP))
    position = backend.flush()
    backend.write(backend.encode(Value(2), "Loss", 2, STEP))
    backend.close()
    again = MLflowBackend("digits", tracking_uri=uri, tags={"dataset": "v3"})
    again.open(Run("r", resumed=True))  # the earlier run, whose tag is replaced
    assert [run.data.tags["dataset"] for run in runs(tmp_path)] == ["v3"]
    again.restore(position)
    again.close()
    tags = {run.info.run_id: run.data.tags for run in runs(tmp_path)}
    assert len(tags) == 2
    assert {each["dataset"] for each in tags.values()} == {"v3"}
    assert tags[backend.run_id]["mlflow.note.content"] == "A try."
    assert tags[again.run_id]["flowtrain.continues"] == backend.run_id


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["a"], "MLflowBackend(tags=['a']): tags is a mapping of texts: tags={'dataset': 'v2'}."),
        ({"a": 1}, "MLflowBackend(tags={'a': 1}): tags is a mapping of texts: tags={'dataset': 'v2'}."),
        ({"": "a"}, "MLflowBackend(tags={'': 'a'}): tags is a mapping of texts: tags={'dataset': 'v2'}."),
        (
            {"flowtrain.run": "a"},
            "MLflowBackend(tags={'flowtrain.run': 'a'}): 'flowtrain.run' is set by flowtrain, which finds its runs by "
            "it. Give the tag another name.",
        ),
    ],
    ids=repr,
)
def test_tags_that_mlflow_would_not_take(tags: Any, message: str) -> None:
    with pytest.raises(LoggingError) as caught:
        MLflowBackend("digits", tags=tags)
    assert str(caught.value) == message
