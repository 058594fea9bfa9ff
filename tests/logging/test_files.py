"""Files: complete records and complete files, and the errors if writing fails."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flowtrain import BatchEnd, Learner
from flowtrain.callbacks import Checkpointer, CustomCallback, LogMetrics
from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, File, JsonlBackend, LoggerBackend, Run, TensorBoardBackend, Value
from flowtrain.logging.files import (
    AppendingFile,
    FileBackend,
    not_open,
    process_rank,
    read_file,
    replace_file,
    unwritable,
)
from flowtrain.testing import tiny_learner
from tests.support.interrupts import interrupted
from tests.support.logs import log_records
from tests.support.programs import Programs


def lines(descriptor: int) -> int:
    return os.pread(descriptor, 1 << 16, 0).rfind(b"\n") + 1


def test_what_was_cut_off_is_dropped_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log"
    with AppendingFile(str(path), lines) as file:  # missing folders are made
        file.append(b"one\n")
        file.append(b"tw")
    with AppendingFile(str(path), lines) as file:
        assert file.size == 4
        file.append(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_truncating_goes_back_and_never_forth(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with AppendingFile(str(path), lines) as file:
        file.append(b"one\n")
        position = file.sync()
        file.append(b"two\n")
        file.truncate(position)
        file.append(b"three\n")
        with pytest.raises(
            LoggingError, match=r"has 10 bytes, and had 11 when the checkpoint was made: it is not the same"
        ):
            file.truncate(11)
    assert path.read_bytes() == b"one\nthree\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows deletes no file that is open")
def test_a_file_that_is_deleted_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    """The system takes records for such a file, which nobody can read."""
    path = tmp_path / "log"
    file = AppendingFile(str(path), lines)
    file.append(b"one\n")
    path.rename(tmp_path / "moved")  # its records are there
    assert file.sync() == 4
    (tmp_path / "moved").unlink()
    for end in (file.sync, file.close):
        with pytest.raises(LoggingError, match="log was deleted while it was open, so its 4 bytes are lost"):
            end()


def test_an_interrupt_leaves_whole_records_and_the_right_size(tmp_path: Path) -> None:
    """Python may raise Ctrl-C after any call; a record is then either written and counted, or neither."""
    path = tmp_path / "log"
    with AppendingFile(str(path), lines) as file:
        for raised in interrupted(lambda: file.append_all([b"one\n", b"two\n"]), "logging/files.py"):
            assert raised
            assert path.read_bytes() == b"one\ntwo\n" * (file.size // 8)
            assert file.size == path.stat().st_size
        assert file.size >= 8


def test_a_whole_file_replaces_the_one_before_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.png"
    replace_file(str(path), b"one")
    replace_file(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(LoggingError, match=r"a\.png/b cannot be written: .*\. Nothing of it is left\."):
        replace_file(str(path / "b"), b"three")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(LoggingError, match=r"folder cannot be written: Is a directory"):
        replace_file(str(tmp_path / "folder"), b"four")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["deep", "folder"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert read_file(File(tmp_path / "a")) == b"content"
    with pytest.raises(LoggingError, match=r"File\('.*b'\) cannot be read: No such file or directory\."):
        read_file(File(tmp_path / "b"))


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoggingError, match=r"file/log cannot be written: File exists: .*/file\. Log to a path in a"):
        AppendingFile(str(tmp_path / "file" / "log"), lines)
    with pytest.raises(LoggingError, match=r"^/dev/null is a device or a pipe, and a log is a file that is read again"):
        AppendingFile("/dev/null", lines)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoggingError, match=r"/pipe is a device or a pipe, .* Log to a file, or leave the backend out"):
        AppendingFile(str(tmp_path / "pipe"), lines)
    assert str(unwritable("x", OSError("odd"))) == (
        "x cannot be written: odd. Log to a path in a folder that you may write to."
    )


@pytest.mark.parametrize("path", ["", "a\0b", b"log", None, 3])
@pytest.mark.parametrize("kind", [JsonlBackend, CsvBackend, TensorBoardBackend])
def test_a_path_that_names_no_file_is_refused_when_it_is_given(kind: Any, path: Any) -> None:
    """An empty one would be the working directory, and one with a zero byte an error of the system much later."""
    with pytest.raises(LoggingError) as raised:
        kind(path)
    assert str(raised.value) == f"{kind.__name__}(path={path!r}): path is a path, such as 'runs/a/log.jsonl'."


ON_A_FULL_DISK = """
import resource, sys

from flowtrain.errors import LoggingError
from flowtrain.logging.files import AppendingFile

with AppendingFile(sys.argv[1], lambda descriptor: 0) as file:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    file.append_all([b"one\\n"])
    try:
        file.append_all([b"two\\n", b"three\\n", b"4\\n"])
    except LoggingError as error:
        print(error, flush=True)
"""


def test_a_file_is_closed_once(tmp_path: Path) -> None:
    """An interrupt may come after a file was closed, and before its owner has forgotten it."""
    file = AppendingFile(str(tmp_path / "log"), lines)
    file.close()
    file.close()


@pytest.mark.filterwarnings("ignore:The run of the checkpoint logged to:UserWarning")  # and this one does not
@pytest.mark.skipif(os.name == "nt", reason="Windows deletes no file that is open")
def test_a_fit_whose_logs_are_deleted_ends_at_its_next_checkpoint(tmp_path: Path) -> None:
    checkpoints, logs = tmp_path / "checkpoints", tmp_path / "logs"

    def learner(log: str, after: int) -> Learner:
        """Return a learner of which the logs are deleted after some batches."""
        left = iter(range(after - 1))

        def delete(learner: Any) -> None:
            if next(left, None) is None and logs.exists():
                shutil.rmtree(logs)

        logging = LogMetrics(JsonlBackend(logs / log), TensorBoardBackend(logs / f"{log} board"))
        return tiny_learner(Checkpointer(checkpoints, every_steps=5), logging, CustomCallback(delete, BatchEnd))

    one = learner("first", 12)
    with pytest.raises(LoggingError, match="first was deleted while it was open") as caught, one:
        one.fit(1)
    assert "board" in str(caught.value.__notes__)
    assert (checkpoints / "latest").read_text() == "step-00000010.ckpt\n"
    with (
        pytest.raises(LoggingError, match="it is not the same file, or has been cut"),
        learner("first", 99) as again,
    ):
        again.fit(1, resume=checkpoints)
    with learner("second", 99) as resumed:
        resumed.fit(1, resume=checkpoints)  # the log begins at the checkpoint
    steps = [each["step"] for each in log_records(logs / "second") if each["group"] == "Step/TrainingPhase"]
    assert steps[0] == 11


def test_of_records_that_do_not_all_fit_as_many_are_kept_as_do(tmp_path: Path, programs: Programs) -> None:
    path = tmp_path / "log"
    done = programs.run(ON_A_FULL_DISK, str(path))
    assert done.returncode == 0, done.stderr
    assert "a record of 6 bytes cannot be written: File too large. The file keeps the 8 bytes before it" in done.stdout
    assert path.read_bytes() == b"one\ntwo\n"


# --- backends that write one file


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


@pytest.mark.parametrize("kind", [CsvBackend, JsonlBackend, TensorBoardBackend])
def test_a_path_with_the_rank_in_it_is_written_by_every_rank(kind: type[FileBackend], tmp_path: Path) -> None:
    """The sink has the same name on every rank, because the ranks compare what they write."""
    backend = kind(tmp_path / "log-{rank}")
    assert (backend.per_rank, kind(tmp_path / "log").per_rank) == (True, False)
    assert (backend.path, backend.sink) == (str(tmp_path / "log-0"), str(tmp_path / "log-{rank}"))
    backend.open(Run("a", rank=1))
    backend.write(backend.encode(Value(1), "Loss", 1, STEP))
    assert backend.flush()
    backend.close()
    assert (tmp_path / "log-0").exists()


def test_a_subclass_that_writes_in_its_own_way_gets_every_record(tmp_path: Path) -> None:
    """The number of calls of its `write` must not depend on the executor."""
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


@pytest.mark.parametrize("kind", [CsvBackend, JsonlBackend, TensorBoardBackend])
def test_a_second_run_is_told_when_its_fit_begins(kind: type[FileBackend], tmp_path: Path) -> None:
    """Nothing has been trained then. A run that resumes, or has a path of its own, or says it, is told nothing."""

    def made(path: str, **arguments: bool) -> Learner:
        return tiny_learner(LogMetrics(kind(tmp_path / path, **arguments)), Checkpointer(tmp_path / "run"), n_batches=2)

    made("log").fit(1)
    made("log").fit(2, resume=tmp_path / "run")
    made("log").fit(3, resume="auto")
    learner, batches = made("log"), list[int]()
    learner.add_callback(CustomCallback(lambda learner: batches.append(1), BatchEnd))
    text = r"log already has .* of another run or of a killed .*: its records come .* Write fit\(\.\.\., resume="
    with pytest.raises(UserWarning, match=text):
        learner.fit(1)
    assert batches == []
    shutil.rmtree(tmp_path / "run")
    made("log", append=True).fit(1)
    shutil.rmtree(tmp_path / "run")
    made("other").fit(1)


@pytest.mark.parametrize("kind", [CsvBackend, JsonlBackend, TensorBoardBackend])
def test_a_run_that_resumes_is_told_of_records_that_its_checkpoint_does_not_know(
    kind: type[FileBackend], tmp_path: Path
) -> None:
    """The checkpoint has the position in one log, and knows nothing of the other, which has records of another run."""

    def made(*paths: str, **arguments: bool) -> Learner:
        logs = [LogMetrics(kind(tmp_path / path, **arguments)) for path in paths]
        return tiny_learner(*logs, Checkpointer(tmp_path / "run"), n_batches=2)

    made("own").fit(1)
    tiny_learner(LogMetrics(kind(tmp_path / "other")), n_batches=2).fit(1)
    with pytest.raises(UserWarning, match=r"other already has .* of another run or of a killed process, and this "):
        made("own", "other").fit(2, resume=tmp_path / "run")
    made("own", "new").fit(2, resume=tmp_path / "run")
    made("own", "new", "other", append=True).fit(3, resume=tmp_path / "run")


@pytest.mark.parametrize("kind", [CsvBackend, JsonlBackend])
@pytest.mark.parametrize("content", [b"a note", b"a note\nwithout an end", b"\xff\xfe\n1"])
def test_a_file_of_another_program_is_refused_and_stays_as_it_is(
    kind: type[FileBackend], content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "log").write_bytes(content)
    for append in (False, True):
        with (
            pytest.warns(UserWarning, match="of another run") if not append else nullcontext(),
            pytest.raises(LoggingError, match=rf"no (table|file) of a {kind.__name__}, .*file has not been changed"),
        ):
            kind(tmp_path / "log", append=append).open(Run("r"))
    assert (tmp_path / "log").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"gro", b"group,step,Lo", b'{"name": "Los'])
def test_what_a_killed_process_has_begun_to_write_is_removed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(content)
    backend = (JsonlBackend if content.startswith(b"{") else CsvBackend)(tmp_path / "log", append=True)
    backend.open(Run("r"))
    backend.close()
    assert (tmp_path / "log").read_bytes() == (b"" if content.startswith(b"{") else b"group,step\n")


def test_a_row_of_another_run_gets_no_cell_of_this_one(tmp_path: Path) -> None:
    """Both rows have the same group and step, also after the second run has resumed from before its first row."""

    def logged(run: Run, value: float, position: Any = None) -> Any:
        backend = CsvBackend(tmp_path / "a.csv", append=True)
        backend.open(run)
        if position is not None:
            backend.restore(position)
        before = backend.flush()
        backend.write(backend.encode(Value(value), "Loss", 1, ("Epoch", "TrainingPhase")))
        backend.close()
        return before

    logged(Run("one"), 0.5)
    begun = logged(Run("two"), 0.25)
    rows = ["group,step,Loss", "Epoch/TrainingPhase,1,0.5", "Epoch/TrainingPhase,1,0.25"]
    assert (tmp_path / "a.csv").read_text("utf-8").splitlines() == rows
    logged(Run("two", resumed=True), 0.25, begun)
    assert (tmp_path / "a.csv").read_text("utf-8").splitlines() == rows


@pytest.mark.parametrize("kind", [CsvBackend, JsonlBackend, TensorBoardBackend])
def test_records_of_another_run_are_noticed(kind: type[FileBackend], tmp_path: Path) -> None:
    """A second run in one file is nearly always a mistake, and neither loses a record nor goes unsaid."""

    def used(run: Run, **arguments: bool) -> None:
        backend = kind(tmp_path / "log", **arguments)
        for _ in range(2):  # the same run may close the backend and open it again
            backend.open(run)
            backend.write(backend.encode(Value(0.5), "Loss", 1, ("Step", "TrainingPhase")))
            backend.close()

    used(Run("one"))
    used(Run("one", resumed=True))
    before = sorted((each.name, each.read_bytes()) for each in tmp_path.glob("**/*") if each.is_file())
    text = rf"log already has .* of another run.*resume=.*{kind.__name__}\(\.\.\., append=True\)"
    with pytest.warns(UserWarning, match=text):
        used(Run("other"))
    with pytest.raises(UserWarning, match=text):  # where warnings are errors, nothing has been opened
        kind(tmp_path / "log").open(Run("third"))
    used(Run("third"), append=True)
    used(Run("fourth", rank=1))
    after = {each.name: each.read_bytes() for each in tmp_path.glob("**/*") if each.is_file()}
    assert all(after[name].startswith(content) for name, content in before)


def test_the_rank_of_another_program_silences_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all of these
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "silver")
    assert process_rank() == 0
    for name in variables:
        monkeypatch.setenv(name, "3")
    assert process_rank() == 3
