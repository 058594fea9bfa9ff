"""What the backends of one file have in common."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, JsonlBackend, LoggerBackend, Run, TensorBoardBackend, Value
from flowtrain.logging.files import FileBackend, not_open

STEP = ("Step", "TrainingPhase")


@pytest.mark.parametrize("kind", [CsvBackend, JsonlBackend, TensorBoardBackend])
def test_one_place_has_one_sink_however_it_is_written(
    kind: type[FileBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    ways: list[str | Path] = ["real/log", "./real/log", "real/../real/log", tmp_path / "link" / "log", "link/log"]
    assert {kind(way).sink for way in ways} == {os.path.realpath(tmp_path / "real" / "log")}


def test_a_path_means_the_same_after_the_working_folder_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backend = JsonlBackend("log")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    backend.open(Run("a"))
    backend.close()
    assert (tmp_path / "log").exists()
    assert not (tmp_path / "other" / "log").exists()


def test_a_copy_leaves_behind_what_is_open_and_does_not_write(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    backend.open(Run("a"))
    record = backend.encode(Value(1), "Loss", 1, STEP)
    copy: LoggerBackend = pickle.loads(pickle.dumps(backend))
    with pytest.raises(
        LoggingError, match=r"JsonlBackend\('.*log'\) is not open\. A learner opens the backends that its"
    ):
        copy.write(record)
    backend.write(record)
    backend.close()
    assert (tmp_path / "log").read_bytes() == record
    assert "call open(Run(id)) first" in str(not_open(copy))


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    backend.open(Run("a", rank=1))
    backend.write(backend.encode(Value(1), "Loss", 1, STEP))
    assert backend.flush() is None
    backend.restore(None)
    backend.close()
    assert not (tmp_path / "log").exists()


def test_a_subclass_that_writes_in_its_own_way_gets_every_record(tmp_path: Path) -> None:
    """In place and deferred: how often its `write` is called must not depend on the executor."""
    found: list[bytes] = []

    class Watched(JsonlBackend):
        def write(self, record: bytes) -> None:
            found.append(record)
            super().write(record)

    backend = Watched(tmp_path / "log.jsonl")
    backend.open(Run("r"))
    backend.write_all([b'{"step": 1}\n', b'{"step": 2}\n'])
    backend.close()
    assert found == [b'{"step": 1}\n', b'{"step": 2}\n']
    assert (tmp_path / "log.jsonl").read_bytes() == b"".join(found)
