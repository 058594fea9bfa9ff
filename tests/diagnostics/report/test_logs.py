"""The logs that a report reads: whole ones, cut-off ones, and those of several runs."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from flowtrain.callbacks import LogHyperParams, LogMetrics, LogTraces, Timer
from flowtrain.diagnostics.report.logs import Log, read_csv, read_jsonl, read_tensorboard
from flowtrain.logging import CsvBackend, JsonlBackend, Run, TensorBoardBackend, Value
from flowtrain.testing import tiny_learner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three logs of one run of 2 epochs of 4 batches."""
    folder = tmp_path_factory.mktemp("logs")
    backends = JsonlBackend(folder / "log.jsonl"), CsvBackend(folder / "log.csv"), TensorBoardBackend(folder / "board")
    settings = LogHyperParams(backends[0], settings={"batch size": 8, "net": {"width": [3, 4], "rate": 0.5}})
    with tiny_learner(Timer(), LogMetrics(*backends), LogTraces(backends[0]), settings, n_batches=4) as learner:
        learner.fit(2)
    return folder


def event_file(folder: Path, phase: str) -> Path:
    [path] = (folder / "board" / phase).iterdir()
    return path


def test_all_logs_of_a_run_have_the_same_series(folder: Path) -> None:
    lines, table = read_jsonl(folder / "log.jsonl", "log.jsonl"), read_csv(folder / "log.csv", "log.csv")
    board = read_tensorboard(event_file(folder, "TrainingPhase"), "board")
    for log in (lines, table, board):
        assert log.series["Step/TrainingPhase", "Loss"].steps == [*range(1, 9)]
        assert log.series["Epoch/TrainingPhase", "Loss"].steps == [1, 2]
        assert log.notes == []
    assert lines.series["Step/TrainingPhase", "Loss"].values == table.series["Step/TrainingPhase", "Loss"].values
    assert board.series["Step/TrainingPhase", "Loss"].values == pytest.approx(
        lines.series["Step/TrainingPhase", "Loss"].values
    )
    assert list(read_tensorboard(event_file(folder, "ValidationPhase"), "board").series) == [
        ("Step/ValidationPhase", "Loss"),
        ("Epoch/ValidationPhase", "Loss"),
    ]


def test_lines_have_settings_and_times(folder: Path) -> None:
    log = read_jsonl(folder / "log.jsonl", "log.jsonl")
    assert log.settings == {"batch size": "8", "net.width": "[3, 4]", "net.rate": "0.5"}
    times = log.series["Epoch/TrainingPhase", "Loss"].times
    assert len(times) == 2
    assert times == sorted(times)
    assert read_csv(folder / "log.csv", "log.csv").series["Epoch/TrainingPhase", "Loss"].times == []
    assert len(log.series["Step/TrainingPhase", "Time.Step"].values) == 8


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_is_cut_off_is_left_out_and_named(folder: Path, tmp_path: Path, cut: int) -> None:
    whole = (folder / "log.jsonl").read_bytes()
    lines = whole.splitlines()
    path = tmp_path / "log.jsonl"
    path.write_bytes(whole[:-cut] if cut > 1 else whole[:-2])
    log = read_jsonl(path, "log.jsonl")
    assert log.notes == [
        f"log.jsonl: line {len(lines)} is cut off or damaged, and left out; the other lines are shown."
    ]
    assert sum(len(points.values) for points in log.series.values()) == len(lines) - 2  # one has the settings


def test_damaged_lines_are_counted(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[7] = b"\xff\xfe\n", b'{"name": "Loss", "group": "Step/A", "step": "x", "kind": "Value"}\n'
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    assert read_jsonl(tmp_path / "log.jsonl", "a/log.jsonl").notes == [
        "a/log.jsonl: 2 lines, the first of them 4, are cut off or damaged, and left out; the other lines are shown."
    ]


@pytest.mark.parametrize("cut", [1, 4])
def test_a_row_that_is_cut_off_is_left_out_and_named(folder: Path, tmp_path: Path, cut: int) -> None:
    whole = (folder / "log.csv").read_text("utf-8")
    (tmp_path / "log.csv").write_text(whole[:-cut], "utf-8")
    log = read_csv(tmp_path / "log.csv", "log.csv")
    assert log.notes == [
        f"log.csv: row {len(whole.splitlines())} is cut off or damaged, and left out; the other rows are shown."
    ]
    assert len(log.series["Epoch/TrainingPhase", "Loss"].values) == 2


def test_an_event_file_that_is_cut_off_is_read_up_to_there(folder: Path, tmp_path: Path) -> None:
    path = event_file(folder, "TrainingPhase")
    cut = tmp_path / "TrainingPhase" / path.name
    cut.parent.mkdir()
    cut.write_bytes(path.read_bytes()[:-5])
    assert read_tensorboard(cut, "board").series["Step/TrainingPhase", "Loss"].steps == [*range(1, 9)]


def test_numbers_that_json_lacks_are_read(tmp_path: Path) -> None:
    record = {"name": "Loss", "group": "Step/TrainingPhase", "kind": "Value", "time": 1.0}
    lines = [json.dumps({**record, "step": step, "value": value}) for step, value in enumerate(["NaN", "-Infinity", 2])]
    (tmp_path / "log.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    points = read_jsonl(tmp_path / "log.jsonl", "log.jsonl").series["Step/TrainingPhase", "Loss"]
    assert list(map(str, points.values)) == ["nan", "-inf", "2.0"]


def test_of_several_runs_in_one_log_the_last_is_shown() -> None:
    log = Log("log.jsonl")
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.3), (1, 5.0), (2, 4.0)):
        log.add("HyperParams", "lr", step, value)
        log.add("Step/TrainingPhase", "Loss", step, value)
    log.add("Epoch/ValidationPhase", "Loss", 0, 1.0)
    log.add("Epoch/ValidationPhase", "Loss", 0, 2.0)  # a second evaluation, and no other run
    assert {key: points.values for key, points in log.finished([], "line").series.items()} == {
        ("HyperParams", "lr"): [5.0, 4.0],
        ("Step/TrainingPhase", "Loss"): [5.0, 4.0],
        ("Epoch/ValidationPhase", "Loss"): [1.0, 2.0],
    }
    assert log.notes == [
        "log.jsonl has the records of 2 runs, one after the other, since steps begin again; the last of them is shown."
    ]


def test_a_users_own_steps_may_go_back() -> None:
    log = Log("log.jsonl")
    for step in (3, 1):
        log.add("Mine", "x", step, 1.0)
    assert log.series["Mine", "x"].steps == [3, 1]
    assert log.finished([], "line").notes == []


def test_event_files_of_other_programs_have_their_tags(tmp_path: Path) -> None:
    with closing(TensorBoardBackend(tmp_path, by_phase=False)) as backend:
        backend.open(Run("0123456789ab"))
        backend.write(backend.encode(Value(1.0), "a/b", 1, ("Mine",)))
        backend.write(backend.encode(Value(1.0), "a/b", 1, ("Epoch", "TrainingPhase")))
    [path] = tmp_path.iterdir()
    assert list(read_tensorboard(path, "board").series) == [("Mine/a", "b"), ("Epoch/TrainingPhase", "a/b")]
