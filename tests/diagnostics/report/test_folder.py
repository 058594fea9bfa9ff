"""The runs in a folder: what is recognized, what belongs together, and what is damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowtrain import BatchEnd, TrainingPhase, UsageError
from flowtrain.callbacks import Checkpointer, LogHyperParams, LogMetrics, LogTraces, Metrics, Profiler, Timer
from flowtrain.diagnostics.report import folder as module
from flowtrain.diagnostics.report.folder import find_runs
from flowtrain.learner import Learner
from flowtrain.logging import CsvBackend, JsonlBackend, TensorBoardBackend
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import tiny_learner


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 2 epochs of 4 batches, with every kind of file."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    lines, table = JsonlBackend(folder / "log.jsonl"), CsvBackend(folder / "values.csv")
    logs = LogMetrics(lines, table, TensorBoardBackend(folder)), LogTraces(lines)
    files = LogHyperParams(lines, settings={"a": 1}), Checkpointer(folder / "checkpoints"), Profiler(folder / "traces")
    learner = tiny_learner(Timer(), Metrics(mean_absolute_error), *logs, *files, n_batches=4)
    with learner:
        learner.fit(2)
        learner.callbacks.draw(BatchEnd, TrainingPhase, to=folder / "batch.svg")
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "first"))


def test_every_kind_of_file_is_found_and_said(whole: Path) -> None:
    [run] = find_runs(whole)
    kinds = [(file.name, file.kind) for file in run.files]
    board = [str(path.relative_to(whole)) for path in sorted(whole.glob("*/events.*"))]
    assert kinds == [
        ("log.jsonl", "JSON lines"),
        ("values.csv", "CSV"),
        *((name, "event file") for name in board),
        ("traces/batch-000005.pt.trace.json", "trace"),
        ("batch.svg", "drawing"),
        ("checkpoints/epoch-0001.ckpt to epoch-0002.ckpt, 2 files", "checkpoint"),
    ]
    assert run.title == "first"
    assert run.notes == []
    assert run.series["Epoch/ValidationPhase", "MeanAbsoluteError"].steps == [1, 2]
    assert run.counts == {"TrainingPhase": (2, 8, 8), "ValidationPhase": (2, 8, 0)}
    assert run.settings["Settings"] == {"a": "1"}
    assert run.settings["Optimizer: SGD, group 0"]["lr"] == "0.1"
    assert run.versions["torch"] == torch.__version__
    assert "Checkpointer" in run.callbacks
    assert len(run.run) == 12
    assert [picture.title for picture in run.pictures] == ["BatchEnd, TrainingPhase"]
    spans = {each.title: each for each in run.spans}
    names = {name: count for name, count, _ in spans["Spans of the kind user_annotation"].rows}
    assert (names["ProfilerStep"], names["Optimizer.step#SGD.step"]) == (3, 3)


@pytest.mark.parametrize("suffix", ["*.jsonl", "*.csv", "*/events*Phase", "checkpoints/*"])
def test_each_source_alone_gives_the_metrics(copied: Path, suffix: str) -> None:
    kept = set(copied.glob(suffix))
    for path in copied.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    [run] = find_runs(copied)
    assert run.series["Epoch/TrainingPhase", "Loss"].steps == [1, 2]
    assert len(run.series["Step/TrainingPhase", "Loss"].values) == 8
    assert bool(run.versions) == (suffix == "checkpoints/*")


def test_a_log_that_is_longer_than_the_checkpoint_is_shown(copied: Path) -> None:
    more = {"name": "Loss", "group": "Epoch/TrainingPhase", "step": 3, "kind": "Value", "value": 0.5, "time": 1.0}
    with (copied / "log.jsonl").open("a") as file:
        file.write(f"{json.dumps(more)}\n")
    [run] = find_runs(copied)
    assert run.series["Epoch/TrainingPhase", "Loss"].steps == [1, 2, 3]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied: Path) -> None:
    newest = copied / "checkpoints" / "epoch-0002.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    [run] = find_runs(copied)
    [note] = run.notes
    assert note.startswith(f"{newest} cannot be read as a checkpoint:")
    assert note.endswith("Instead, " + str(copied / "checkpoints" / "epoch-0001.ckpt") + " is used, the one before it.")
    assert run.counts["TrainingPhase"] == (1, 4, 4)
    assert run.series["Epoch/TrainingPhase", "Loss"].steps == [1, 2], "the log has both"


def test_if_all_checkpoints_are_damaged_the_logs_are_shown(copied: Path) -> None:
    for path in (copied / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"PK\3\4 nothing")
    [run] = find_runs(copied)
    assert "cannot be read as a checkpoint" in run.notes[0]
    assert run.series["Epoch/TrainingPhase", "Loss"].steps == [1, 2]
    assert run.files[-1].note.startswith("no checkpoint here can be read: ")


def test_if_nothing_can_be_read_the_error_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    with pytest.raises(UsageError) as failure:
        find_runs(tmp_path)
    assert str(failure.value).startswith(f"No file of a run in {tmp_path} can be read. {tmp_path}/a.ckpt cannot be")


def test_a_trace_that_is_damaged_or_too_large_is_said(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = copied / "traces" / "batch-000005.pt.trace.json"
    trace.write_text('{"traceEvents": oh', "utf-8")
    [run] = find_runs(copied)
    [note] = run.notes
    assert note.startswith(f"traces/{trace.name} could not be read: '{trace}' has no trace events.")
    monkeypatch.setattr(module, "_LARGEST_TRACE", 4)
    [run] = find_runs(copied)
    assert run.files[-3].note == "0 MiB, too large for a table; open it with https://ui.perfetto.dev"


def test_a_timeline_shows_the_parts_of_a_batch_and_the_time_of_each_handler(tmp_path: Path) -> None:
    with tiny_learner(LogMetrics(CsvBackend(tmp_path / "a.csv")), n_batches=4) as learner:
        learner.fit(2, timeline=tmp_path / "timeline.json")
    [run] = find_runs(tmp_path)
    spans = {each.title: {name: count for name, count, _ in each.rows} for each in run.spans}
    assert list(spans)[:2] == ["Parts of a batch", "Handlers"]
    # Each epoch also waits once for data that do not come.
    assert spans["Parts of a batch"] == {"data": 20, "forward": 16, "loss": 16, "backward": 8, "update": 8}
    assert spans["Handlers"]["LogMetrics.log_step"] == 16
    assert [(file.name, file.kind) for file in run.files] == [("a.csv", "CSV"), ("timeline.json", "trace")]


def test_a_timeline_that_is_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    with tiny_learner(LogMetrics(CsvBackend(tmp_path / "a.csv")), n_batches=4) as learner:
        learner.fit(2, timeline=path)
    text = path.read_text("utf-8")
    path.write_text(text[: len(text) // 2], "utf-8")
    [run] = find_runs(tmp_path)
    assert run.notes == []
    assert run.spans[0].title == "Parts of a batch"


def trained(folder: Path, *, board: Path | None = None, epochs: int = 1) -> Learner:
    backends = [TensorBoardBackend(board)] if board is not None else []
    learner = tiny_learner(LogMetrics(CsvBackend(folder / "a.csv"), *backends), Checkpointer(folder), n_batches=2)
    with learner:
        learner.fit(epochs)
    return learner


def test_folders_beside_each_other_are_several_runs_the_newest_first(tmp_path: Path) -> None:
    trained(tmp_path / "old")
    trained(tmp_path / "new", epochs=2)
    runs = find_runs(tmp_path)
    assert [(run.title, run.counts["TrainingPhase"][0]) for run in runs] == [("new", 2), ("old", 1)]


def test_folders_of_one_run_are_one(tmp_path: Path) -> None:
    trained(tmp_path / "checkpoints", board=tmp_path / "board")
    [run] = find_runs(tmp_path)
    assert run.title == tmp_path.name
    assert {file.kind for file in run.files} == {"CSV", "checkpoint", "event file"}


def test_of_many_runs_the_newest_are_shown(tmp_path: Path) -> None:
    for number in range(module.SHOWN_RUNS + 2):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "a.csv").write_text("group,step,Loss\nEpoch/TrainingPhase,1,0.5\n", "utf-8")
    runs = find_runs(tmp_path)
    assert len(runs) == module.SHOWN_RUNS
    [note] = runs[0].notes
    assert note.startswith(f"{tmp_path} has 8 runs; the newest 6 are shown. Left out: run-")


def test_the_pictures_of_a_log_and_unknown_files_are_no_runs(copied: Path) -> None:
    inside = copied / "log.jsonl.files" / "Step"
    inside.mkdir(parents=True)
    (inside / "x.csv").write_text("group,step,Loss\n", "utf-8")
    (copied / "notes.txt").write_text("notes", "utf-8")
    (copied / "other.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", "utf-8")
    [run] = find_runs(copied)
    assert len(run.files) == 7


def test_pipes_and_links_to_nothing_are_no_files_of_a_run(copied: Path) -> None:
    os.mkfifo(copied / "pipe.json")
    (copied / "gone.ckpt").symlink_to(copied / "nowhere")
    [run] = find_runs(copied)
    assert (len(run.files), run.notes) == (7, [])


def without(folder: Path) -> Path:
    return folder / "no"


def a_file(folder: Path) -> Path:
    (folder / "log.jsonl").write_text("", "utf-8")
    return folder / "log.jsonl"


def with_others(folder: Path) -> Path:
    (folder / "notes.txt").write_text("notes", "utf-8")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without, "There is no folder {0}/no. Pass the folder of a run: the one that its logs are in."),
        (a_file, "{0}/log.jsonl is a file, and a report is of a folder. Pass its folder: {0}"),
        (
            with_others,
            "There is no run in {0}: it has no log of JsonlBackend, CsvBackend or TensorBoardBackend, and no "
            "checkpoint (it holds: notes.txt). Pass the folder that a callback of the run writes to.",
        ),
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UsageError) as failure:
        find_runs(make(tmp_path))
    assert str(failure.value) == message.format(tmp_path)
