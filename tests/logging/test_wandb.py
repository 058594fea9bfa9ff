"""Weights & Biases, offline: the content of the files that ``wandb sync`` would upload."""

from __future__ import annotations

import gc
import importlib
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import EpochEnd, LearnerView, ValidationPhase
from flowtrain.callbacks import CustomCallback, LogMetrics
from flowtrain.errors import LoggingError
from flowtrain.logging import File, Histogram, Image, LoggerBackend, Run, Settings, Text, Value, WandbBackend
from flowtrain.testing import BackendContract, tiny_learner

STEP = ("Step", "TrainingPhase")
BLOCK = 32768  # https://github.com/google/leveldb/blob/main/doc/log_format.md, after W&B's own header of 7 bytes


def make(folder: Path) -> WandbBackend:
    return WandbBackend("digits", "a", folder=folder, mode="offline")


def complete(path: Path) -> list[Any]:
    """Return the messages in a file of W&B once its service has written the last one, shortly after the run's end."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.01)
    raise AssertionError(f"{path} does not end")


def records(path: Path) -> Iterator[Any]:
    """Return the messages in a file of W&B."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = messages.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def put(found: dict[str, Any], item: Any) -> None:
    """Add an item of W&B, which has a key or a path of keys."""
    *path, key = item.nested_key or [item.key]
    for part in path:
        found = found.setdefault(part, {})
    found[key] = json.loads(item.value_json)


def runs(folder: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the configuration and the history of each run, by its id."""
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    files = [complete(path) for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")]
    for messages in sorted(files, key=began):
        config: dict[str, Any] = {}
        history: list[dict[str, Any]] = []
        for record in messages:
            for update in (*record.config.update, *record.run.config.update):
                put(config, update)
            if record.history.item:
                history.append({})
            for item in record.history.item:
                put(history[-1], item)
        [run] = [record.run for record in messages if record.WhichOneof("record_type") == "run"]
        found[run.run_id] = config, history
    return found


def began(messages: list[Any]) -> int:
    """Return when the run of these messages began, in nanoseconds."""
    found: int = next(r.run.start_time.ToNanoseconds() for r in messages if r.WhichOneof("record_type") == "run")
    return found


NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class TestContract(BackendContract):
    """`WandbBackend` is a backend; a run that continues others is read together with them."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return make(folder)

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        found = runs(folder)
        entries: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for item in [item for each in found for item in self.kept(each, found)]:
            group = "/".join(next(key for key in item if key.endswith("/step")).split("/")[:-1])
            for key, value in item.items():
                if isinstance(value, dict) or (isinstance(value, str) and value not in NOT_FINITE):
                    continue
                if key.startswith(f"{group}/") and key != f"{group}/step":
                    entries.setdefault((group, key.removeprefix(f"{group}/")), []).append(
                        (item[f"{group}/step"], float(value))
                    )
        return entries

    @staticmethod
    def kept(run: str, found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> list[dict[str, Any]]:
        """Return the history of a run up to the record at which a continuing run begins."""
        counts = [
            config["flowtrain"]["records"]
            for config, _ in found.values()
            if config.get("flowtrain", {}).get("continues") == run
        ]
        history = found[run][1]
        return history[: counts[0]] if counts else history


def test_every_kind_is_in_the_history(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>", "utf-8")
    backend = make(tmp_path)
    backend.open(Run("r"))
    backend.write(backend.encode(Settings({"lr": 0.1, "model": {"width": 8}}), "Settings", 0, ("HyperParams",)))
    logged = [Text("ü"), Image(torch.zeros(2, 3)), Histogram([0.0, 1.0, 1.0], bins=2), File(report), Value(0.5)]
    for loggable in logged:
        backend.write(backend.encode(loggable, type(loggable).__name__, 3, STEP))
    backend.close()
    [(config, history)] = runs(tmp_path).values()
    assert (config["lr"], config["model"]) == (0.1, {"width": 8})
    values = {key.rpartition("/")[2]: value for item in history for key, value in item.items()}
    assert (values["Text"], values["Value"], values["step"]) == ("ü", 0.5, 3)
    assert values["Histogram"]["values"] == [1, 2]
    assert (values["Image"]["width"], values["Image"]["height"]) == (3, 2)
    [kept] = (tmp_path / "wandb").glob("offline-run-*/files/Step/TrainingPhase/File/3/report.html")
    assert kept.read_text("utf-8") == "<p>"


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LoggingError, match=r"WandbBackend needs wandb, .* pip install 'flowtrain\[wandb\]'"):
        make(tmp_path).open(Run("r"))


def exit_codes(folder: Path) -> list[int]:
    """Return the exit code of every run."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    return [record.exit.exit_code for path in files for record in complete(path) if record.HasField("exit")]


@pytest.mark.parametrize(("failure", "code"), [(None, 0), (ValueError, 1), (KeyboardInterrupt, 255)])
@pytest.mark.parametrize("way", ["close", "dropped"])
def test_the_exit_code_says_how_the_run_ended(
    failure: type[BaseException] | None, code: int, way: str, tmp_path: Path
) -> None:
    def stop(learner: LearnerView) -> None:
        if failure is not None:
            raise failure("stop")

    learner = tiny_learner(LogMetrics(make(tmp_path)), CustomCallback(stop, EpochEnd, ValidationPhase), n_batches=2)
    with suppress(ValueError, KeyboardInterrupt):
        learner.fit(1)
    if way == "close":
        learner.close()
    del learner
    gc.collect()
    assert exit_codes(tmp_path) == [code]


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise ValueError", 1)])
def test_a_program_that_closes_nothing_says_how_it_ended_too(end: str, code: int, tmp_path: Path) -> None:
    program = f"""
import weakref
from flowtrain import EpochEnd, ValidationPhase
from flowtrain.callbacks import CustomCallback, LogMetrics
from flowtrain.logging import JsonlBackend, WandbBackend
from flowtrain.testing import tiny_learner

def stop(learner):
    {end or "pass"}

weakref.finalize(stop, int)  # as tempfile and others do: the hook of finalizers is older than that of wandb then
backends = WandbBackend("digits", folder={str(tmp_path)!r}, mode="offline"), JsonlBackend({str(tmp_path / "log")!r})
learner = tiny_learner(LogMetrics(*backends), CustomCallback(stop, EpochEnd, ValidationPhase), n_batches=2)
learner.fit(1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, exit_codes(tmp_path)) == (code, [code]), done.stderr
    assert "could not be closed" not in done.stderr
    assert "Connection lost" not in done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) >= 5


def run_of(folder: Path) -> Any:
    """Return the only run's own message."""
    [path] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    [run] = [record.run for record in complete(path) if record.WhichOneof("record_type") == "run"]
    return run


def test_entity_group_and_tags_are_those_of_the_user(tmp_path: Path) -> None:
    backend = WandbBackend("digits", "a", tmp_path, "offline", entity="team", group="sweep-3", tags=["baseline", "v2"])
    assert backend.sink == f"wandb:{tmp_path}:team/digits:a"
    backend.open(Run("r"))
    backend.close()
    run = run_of(tmp_path)
    assert (run.entity, run.project, run.display_name) == ("team", "digits", "a")
    assert (run.run_group, list(run.tags)) == ("sweep-3", ["baseline", "v2"])


def test_without_them_the_group_is_that_of_the_run(tmp_path: Path) -> None:
    backend = make(tmp_path)
    assert backend.sink == f"wandb:{tmp_path}:digits:a"
    backend.open(Run("r"))
    backend.close()
    run = run_of(tmp_path)
    assert (run.entity, run.run_group, list(run.tags)) == ("", "r", [])


@pytest.mark.parametrize("tags", ["baseline", ["a", ""], ["a" * 65], [3], 3, None], ids=repr)
def test_tags_that_are_no_list_of_texts(tags: Any) -> None:
    with pytest.raises(LoggingError) as caught:
        WandbBackend("digits", tags=tags)
    assert str(caught.value) == (
        f"WandbBackend(tags={tags!r}): tags is a list of texts, each of 1 to 64 characters: tags=['baseline', 'v2']."
    )
