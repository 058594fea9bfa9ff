"""``flowtrain replay``: what it prints, its exit status, and arguments that name nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowtrain import record
from flowtrain.callbacks import LogMetrics
from flowtrain.diagnostics.report.command import main
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from tests.support.logs import log_records

PLOTS = """
from flowtrain.callbacks import LogMetrics
from flowtrain.logging import JsonlBackend

def again():
    return LogMetrics(JsonlBackend("again.jsonl"))

class Mine(LogMetrics):
    def __init__(self):
        super().__init__(JsonlBackend("mine.jsonl"))

made = Mine()
number = 3
def wrong(): return 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, which has a recording and a module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # puts ``sys.path`` back, to which the program adds the folder
    name = f"plots_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(PLOTS, "utf-8")
    callback = record(LogMetrics(JsonlBackend("a.jsonl")), to="a.recording")
    with tiny_learner(callback, n_batches=2) as learner:
        learner.fit(2)
    return tmp_path


def test_a_callback_is_replayed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, log in ("again", "again.jsonl"), ("Mine", "mine.jsonl"):
        assert main(["replay", "a.recording", f"plots_{folder.name}:{name}"]) == 0
        assert capsys.readouterr() == ("a.recording: 12 of 12 events were replayed\n", "")
        assert log_records(folder / log) == log_records(folder / "a.jsonl")
    (folder / "again.jsonl").unlink()
    chosen = ["--event", "EpochEnd", "--from", "4", "--to", "11"]
    assert main(["replay", "a.recording", f"plots_{folder.name}:again", *chosen]) == 0
    assert capsys.readouterr().out == "a.recording: 2 of 12 events were replayed\n"
    assert len(log_records(folder / "again.jsonl")) == 2


def test_without_a_callback_the_recording_is_described(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "a.recording"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "a.recording: flowtrain.callbacks.log_metrics:LogMetrics",
        "  log_step (BatchEnd, Phase) reads cbstate.metrics_step",
        "  log_epoch (EpochEnd, Phase) reads cbstate.metrics_epoch",
        "  4 events of log_step (BatchEnd, Phase) in TrainingPhase: numbers 1 to 8",
    ]


def test_a_recording_that_is_cut_off_is_replayed_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "a.recording"
    path.write_bytes(path.read_bytes()[:-5])
    assert main(["replay", "a.recording", f"plots_{folder.name}:again"]) == 1
    out, err = capsys.readouterr()
    assert out == "a.recording: 11 of 11 events were replayed\n"
    assert err.startswith("flowtrain replay: a.recording is cut off in frame 13, at byte ")
    assert main(["replay", "a.recording"]) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plots", "'plots' names no object in a module. Write plots:MyPlot"),
        ("no.such:thing", "There is no module 'no'"),
        ("HERE:nothing", "There is no 'nothing' in HERE"),
        ("HERE:wrong", "HERE:wrong is 4, which is no Callback"),
    ],
)
def test_names_of_nothing(name: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"plots_{folder.name}"
    assert main(["replay", "a.recording", name.replace("HERE", here)]) == 1
    assert capsys.readouterr().err.startswith(f"flowtrain replay: {message.replace('HERE', here)}")


def test_a_file_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "b.recording"]) == 1
    assert capsys.readouterr().err == "flowtrain replay: b.recording cannot be read: No such file or directory.\n"
