"""JSON lines: valid JSON for every loggable, files in a folder beside the log, and complete lines after a crash."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowtrain.errors import LoggingError
from flowtrain.logging import File, Histogram, Image, JsonlBackend, LoggerBackend, Run, Settings, Text, Value
from flowtrain.testing import BackendContract

STEP = ("Step", "TrainingPhase")


class TestContract(BackendContract):
    """`JsonlBackend` is a backend."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return JsonlBackend(folder / "runs" / "log.jsonl")

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        for line in lines(folder / "runs" / "log.jsonl"):
            if line["kind"] == "Value":
                found[line["group"], line["name"]].append((line["step"], float(line["value"])))
        return found


def test_a_record_is_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 5.25)
    record = JsonlBackend(tmp_path / "log").encode(Value(torch.tensor(0.5)), "Loss", 3, STEP)
    assert record == (
        b'{"name": "Loss", "group": "Step/TrainingPhase", "step": 3, "kind": "Value", "value": 0.5, "time": 5.25}\n'
    )


names = st.text(st.characters(codec="utf-8"), max_size=8)


@given(names, st.lists(names, min_size=1, max_size=3), st.integers(0, 10**9), st.floats() | st.integers())
def test_the_line_of_a_number_is_what_the_standard_library_writes(
    name: str, group: list[str], step: int, value: float
) -> None:
    line = JsonlBackend("log").encode(Value(value), name, step, tuple(group))
    found = json.loads(line)
    written = value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    wanted = {"name": name, "group": "/".join(group), "step": step, "kind": "Value", "value": written}
    assert line == json.dumps({**wanted, "time": found["time"]}).encode() + b"\n"


def test_a_number_of_any_size_is_a_number() -> None:
    assert plain(JsonlBackend("log").encode(Value(10**400), "Name", 1, STEP))["value"] == 10**400


def test_every_kind_is_valid_json(tmp_path: Path) -> None:
    """JSON has no NaN, which Python's reader accepts; here it refuses NaN and the infinities."""
    loggables = [
        Value(float("nan")),
        Value(float("-inf")),
        Text('"quoted"\n\u2028'),
        Histogram([0.0, 1.0, 1.0, 2.0, float("nan")], bins=2),
        Settings({"lr": float("inf"), "path": Path("data"), "layers": (1, torch.tensor(2))}),
    ]
    backend = JsonlBackend(tmp_path / "log")
    values = [plain(backend.encode(each, "Name", 1, STEP))["value"] for each in loggables]
    assert values == [
        "NaN",
        "-Infinity",
        '"quoted"\n\u2028',
        {"edges": [0.0, 1.0, 2.0], "counts": [1, 3], "left_out": 1},
        {"lr": "Infinity", "path": "data", "layers": [1, 2]},
    ]
    assert float(values[0]) != float(values[0])
    assert float(values[1]) == -float("inf")


def test_files_lie_beside_and_are_there_before_their_line(tmp_path: Path) -> None:
    source = tmp_path / "report.html"
    source.write_text("<p>", "utf-8")
    backend = JsonlBackend(tmp_path / "a" / "log.jsonl")
    backend.open(Run("r"))
    for loggable, name in ((Image(torch.zeros(2, 2)), "In/../x"), (File(source), "Report")):
        backend.write(backend.encode(loggable, name, 7, STEP))
    backend.close()
    image, report = lines(tmp_path / "a" / "log.jsonl")
    assert image["value"] == "log.jsonl.files/Step/TrainingPhase/In/%2E%2E/x/7.png"
    assert (tmp_path / "a" / image["value"]).read_bytes().startswith(b"\x89PNG")
    assert report["value"] == "log.jsonl.files/Step/TrainingPhase/Report/7.html"
    assert (tmp_path / "a" / report["value"]).read_text("utf-8") == "<p>"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st' + b"x" * 100_000)
    backend = JsonlBackend(path, append=True)
    backend.open(Run("r"))
    backend.close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_position_that_the_file_does_not_reach_is_refused(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log.jsonl")
    backend.open(Run("r", resumed=True))
    with pytest.raises(LoggingError, match=r"log\.jsonl has 0 bytes, and had 10 when the checkpoint was made: it is"):
        backend.restore(10)
    backend.close()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoggingError, match=r"File\('nowhere\.txt'\) cannot be read: No such file"):
        JsonlBackend(tmp_path / "log").encode(File("nowhere.txt"), "Report", 1, STEP)


def lines(path: Path) -> list[dict[str, Any]]:
    return [plain(line) for line in path.read_bytes().splitlines()]


def plain(line: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return found


def test_unfinished_pictures_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """Only a run that is resumed looks for them."""
    folder = tmp_path / "log.jsonl.files" / "Step" / "Picture"
    folder.mkdir(parents=True)
    for name in ("1.png", "2.png.34.tmp", "notes.tmp"):
        (folder / name).touch()
    for resumed, left in ((False, ["1.png", "2.png.34.tmp", "notes.tmp"]), (True, ["1.png", "notes.tmp"])):
        backend = JsonlBackend(tmp_path / "log.jsonl")
        backend.open(Run("a", resumed=resumed))
        backend.close()
        assert sorted(each.name for each in folder.iterdir()) == left
