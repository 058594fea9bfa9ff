# pyright: reportPrivateUsage=false
"""The lock of a folder of checkpoints, with real processes: alive, dying, stopped, dead and on another machine.

A predecessor is a program of its own: it trains into the folder until it is signalled, and says when it has begun.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import pytest

from flowtrain import BatchEnd, Callback, CheckpointError, LearnerView, TrainingPhase, on
from flowtrain.callbacks import Checkpointer, LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint import folder_lock, lock_file
from flowtrain.training.checkpoint.files import write_whole
from flowtrain.training.checkpoint.folder_lock import Folders
from flowtrain.training.checkpoint.lock_file import NAME, LockOwner, started, take
from tests.support.programs import Programs, Started, importing_the_same
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

PREDECESSOR = """
import sys, time
from pathlib import Path
from flowtrain import BatchEnd, Callback, FitEnd, TrainingPhase, on
from flowtrain.callbacks import Checkpointer, LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner

folder, dies_for = Path(sys.argv[1]), float(sys.argv[2])

class Trains(Callback):
    @on(BatchEnd, TrainingPhase)
    def wait(self, event, phase, learner):
        time.sleep(0.01)
        if not (folder.parent / "begun").exists():
            (folder.parent / "begun").touch()

    @on(FitEnd)
    def die(self, event, phase, learner):
        time.sleep(dies_for)

log = LogMetrics(JsonlBackend(folder.parent / "log.jsonl"))
tiny_learner(Checkpointer(folder), log, Trains()).fit(10_000, resume="auto")
"""


class Cut(Callback):
    """End the fit as a batch system does."""

    def __init__(self, batches: int = 1) -> None:
        self.left = batches

    @on(BatchEnd, TrainingPhase)
    def count(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def predecessor(folder: Path, programs: Programs, dies_for: float = 0.0) -> Generator[Started]:
    """Give a process that trains into the folder, and appends what it prints to the file ``output`` beside it."""
    log = folder.parent / "output"
    process = programs.start(PREDECESSOR, str(folder), str(dies_for), log=log)
    try:
        wait_for((folder.parent / "begun").exists)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(60)
        process.close()


@contextmanager
def child(folder: Path) -> Generator[subprocess.Popen[str]]:
    """Give such a process that is a child of this one, which asks for its result at the end only."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREDECESSOR, str(folder), "0"],
        env=importing_the_same(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for((folder.parent / "begun").exists)
        yield process
    finally:
        process.kill()
        process.communicate()


def everything(place: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, but for those that the living owner writes."""
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def of_elsewhere(folder: Path, silence: float, **changed: object) -> None:
    """Write the lock file of a process on another machine, with its last sign of life some seconds ago."""
    folder.mkdir(exist_ok=True)
    owner = {"host": "node17", "machine": "", "process": 4711, "started": "1", "since": 1.8e9, "token": "theirs"}
    (folder / NAME).write_text(json.dumps({**owner, **changed}))
    os.utime(folder / NAME, (time.time() - silence, time.time() - silence))


@pytest.mark.slow
def test_a_second_process_is_refused_and_changes_nothing(tmp_path: Path, programs: Programs) -> None:
    with predecessor(tmp_path / "run", programs) as first:
        first.send_signal(signal.SIGSTOP)  # so that the comparison sees the second process alone
        wait_for(lambda: Path(f"/proc/{first.pid}/stat").read_text().split()[2] == "T")
        before = everything(tmp_path)
        learner = tiny_learner(Checkpointer(tmp_path / "run"), LogMetrics(JsonlBackend(tmp_path / "log.jsonl")))
        with pytest.raises(CheckpointError) as caught:
            learner.fit(2)
        assert everything(tmp_path) == before
        assert len(learner.history.rows) == 0
        since = re.search(r"since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", str(caught.value))
        assert since is not None
        assert str(caught.value) == (
            f"The folder {(tmp_path / 'run').resolve()} is in use by another run: process {first.pid} on "
            f"{os.uname().nodename}, {since[0]}. Two runs in one folder would replace each other's checkpoints and mix "
            f"their logs. Nothing has been changed. That process is stopped by a signal: continue it (kill -CONT "
            f"{first.pid}) or end it (kill -KILL {first.pid}), or give this run a folder of its own. fit(..., "
            f"resume='auto') waits up to 90 s for a run that is ending."
        )


@pytest.mark.slow
def test_a_fit_that_resumes_waits_for_a_predecessor_that_still_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, programs: Programs
) -> None:
    log = LogMetrics(JsonlBackend(tmp_path / "log.jsonl"))
    learner = tiny_learner(Checkpointer(tmp_path / "run"), log, Cut(5))
    with learner, predecessor(tmp_path / "run", programs, dies_for=3) as first:
        first.send_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            learner.fit(10_000, resume="auto")
        first.wait(60)
        assert "KeyboardInterrupt: training was interrupted by SIGTERM" in (tmp_path / "output").read_text()
    assert "is in use by process" in caplog.text
    assert "waiting up to 90 s for it to end" in caplog.text
    assert_whole_log(tmp_path, learner.cbstate.history[TrainingPhase].steps)


@pytest.mark.slow
def test_a_killed_predecessor_is_followed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with child(tmp_path / "run") as first:
        wait_for((tmp_path / "run" / "latest").exists)
        first.kill()
        wait_for(lambda: not started(first.pid))  # its parent, this process, has not asked for its result
        assert (tmp_path / "run" / NAME).exists()
        log = LogMetrics(JsonlBackend(tmp_path / "log.jsonl"))
        with tiny_learner(Checkpointer(tmp_path / "run"), log, Cut(5)) as learner, pytest.raises(KeyboardInterrupt):
            learner.fit(10_000, resume="auto")
    assert not caplog.records
    assert not (tmp_path / "run" / NAME).exists()
    assert_whole_log(tmp_path, learner.cbstate.history[TrainingPhase].steps)


def assert_whole_log(place: Path, steps: int) -> None:
    """Check that the log has the loss of each step once, in order."""
    records = map(json.loads, (place / "log.jsonl").read_text().splitlines())
    losses = [each["step"] for each in records if (each["group"], each["name"]) == ("Step/TrainingPhase", "Loss")]
    assert losses == list(range(1, steps + 1))


@pytest.mark.slow
def test_of_three_processes_at_once_one_trains(tmp_path: Path, programs: Programs) -> None:
    program = """
import sys
from pathlib import Path
from flowtrain import CheckpointError
from flowtrain.testing import tiny_learner
from flowtrain.callbacks import Checkpointer
from tests.support.waiting import wait_for
folder, name = Path(sys.argv[1]), sys.argv[2]
learner = tiny_learner(Checkpointer(folder / "run"))
(folder / f"ready {name}").touch()
wait_for((folder / "go").exists)
try:
    learner.fit(20)
    end = "trained"
except CheckpointError as error:
    end = "refused" if "in use by another run" in str(error) else str(error)
(folder / f"{end} {name}").touch()
wait_for((folder / "end").exists)
"""
    names = ["a", "b", "c"]
    started = [programs.start(program, str(tmp_path), name, log=tmp_path / f"output {name}") for name in names]
    try:
        wait_for(lambda: len([*tmp_path.glob("ready *")]) == 3)
        (tmp_path / "go").touch()
        wait_for(lambda: len([*tmp_path.glob("trained *"), *tmp_path.glob("refused *")]) == 3)
    finally:
        (tmp_path / "end").touch()
        for each in started:
            each.wait(60)
            each.close()
    assert [*tmp_path.glob("trained *")]  # one after the other is well too
    assert (tmp_path / "run" / "latest").read_text() == "epoch-0020.ckpt\n"
    assert [(tmp_path / f"output {name}").read_text() for name in names] == ["", "", ""]


def test_an_owner_on_another_machine_lives_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    of_elsewhere(tmp_path, silence=50)
    before = everything(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        tiny_learner(Checkpointer(tmp_path)).fit(1)
    assert everything(tmp_path) == before
    assert str(caught.value).partition("since ")[0] == (
        f"The folder {tmp_path} is in use by another run: process 4711 on node17, "
    )
    assert str(caught.value).endswith(
        "Nothing has been changed. Wait until that process has ended (one that is dead counts as ended 60 s after its "
        "last sign of life, the time of .in-use), or give this run a folder of its own. fit(..., resume='auto') waits "
        "up to 90 s for a run that is ending."
    )


@pytest.mark.parametrize("text", [None, "", '{"host": 3', '{"other": 1}', "[]"])
def test_an_owner_on_another_machine_that_was_silent_for_a_minute_is_dead(tmp_path: Path, text: str | None) -> None:
    of_elsewhere(tmp_path, silence=61)
    if text is not None:  # a damaged file has an owner that nobody knows
        (tmp_path / NAME).write_text(text)
        with pytest.raises(CheckpointError, match="is in use by another run: a process that is not named in it"):
            tiny_learner(Checkpointer(tmp_path)).fit(1)
        os.utime(tmp_path / NAME, (time.time() - 61, time.time() - 61))
    tiny_learner(Checkpointer(tmp_path)).fit(1)
    assert sorted(os.listdir(tmp_path)) == ["best", "epoch-0001.ckpt", "latest"]


@pytest.mark.parametrize("changed", [{"started": "another time"}, {"process": 2**22 + 1}])
def test_the_number_of_a_dead_process_may_be_that_of_another(tmp_path: Path, changed: dict[str, object]) -> None:
    owner = LockOwner.here()
    here = {"host": owner.host, "machine": owner.machine, "process": os.getpid(), "started": owner.started}
    of_elsewhere(tmp_path, silence=0, **{**here, **changed})
    tiny_learner(Checkpointer(tmp_path)).fit(1)
    assert sorted(os.listdir(tmp_path)) == ["best", "epoch-0001.ckpt", "latest"]


def test_waiting_ends_with_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.6)
    of_elsewhere(tmp_path, silence=0)
    with pytest.raises(CheckpointError, match=r"since .*\. It did not end within 0\.6 s\. Two runs"):
        tiny_learner(Checkpointer(tmp_path)).fit(1, resume="auto")


def test_waiting_can_be_interrupted(tmp_path: Path) -> None:
    of_elsewhere(tmp_path, silence=0)
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        tiny_learner(Checkpointer(tmp_path)).fit(1, resume="auto")
    assert os.listdir(tmp_path) == [NAME]


class Meanwhile(Callback):
    """Do something in the first batch."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    @on(BatchEnd, TrainingPhase)
    def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        do, self.do = self.do, lambda: None
        do()


def test_a_process_that_lost_its_folder_writes_nothing_more(tmp_path: Path) -> None:
    taken = Meanwhile(lambda: of_elsewhere(tmp_path, silence=0))
    with pytest.raises(CheckpointError) as caught:
        tiny_learner(Checkpointer(tmp_path), taken).fit(3)
    assert {NAME} <= set(os.listdir(tmp_path)) <= {NAME, "latest", "start.ckpt"}  # the last two in time, or not
    assert json.loads((tmp_path / NAME).read_text())["host"] == "node17"
    assert f"Another run has taken over the folder {tmp_path}: process 4711 on node17, since " in str(caught.value)
    assert f"This process (process {os.getpid()} on " in str(caught.value)


def test_a_process_that_lost_its_folder_notices_it_before_its_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.01)
    monkeypatch.setattr(folder_lock, "_beating", [])

    def act() -> None:
        """Take the folder over, and wait until the owner has noticed it."""
        lock = folder_lock._held[str(tmp_path)]
        wait_for(lambda: (tmp_path / NAME).stat().st_mtime > lock.owner.since + 0.05)
        of_elsewhere(tmp_path, silence=0)
        wait_for(lambda: lock.lost)

    seen: list[int] = []
    counting = Meanwhile(lambda: seen.append(1))
    with pytest.raises(CheckpointError, match="Another run has taken over the folder"):
        tiny_learner(Checkpointer(tmp_path), Meanwhile(act), counting, n_batches=50).fit(1)
    assert seen == [1]


def test_a_lock_file_that_is_removed_is_written_again(tmp_path: Path) -> None:
    found: list[str] = []

    class Looks(Callback):
        """Remove the lock in the first epoch, and look for it in the third."""

        @on(BatchEnd, TrainingPhase)
        def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            found.append("there" if (tmp_path / NAME).exists() else "gone")
            if len(found) == 1:
                (tmp_path / NAME).unlink()

    tiny_learner(Checkpointer(tmp_path), Looks(), n_batches=1).fit(4)
    assert found[0] == found[3] == "there"
    assert NAME not in os.listdir(tmp_path)


def test_two_learners_of_a_process_take_turns(tmp_path: Path) -> None:
    first, second = tiny_learner(Checkpointer(tmp_path)), tiny_learner(Checkpointer(tmp_path))
    first.fit(1)
    second.fit(2, resume=tmp_path)
    first.fit(3, resume=tmp_path)
    assert (tmp_path / "latest").read_text() == "epoch-0003.ckpt\n"

    inner = Meanwhile(lambda: second.fit(1))
    with pytest.raises(CheckpointError) as caught:
        tiny_learner(Checkpointer(tmp_path), inner).fit(4, resume=tmp_path)
    assert str(caught.value) == (
        f"Another learner of this process trains into the folder {tmp_path}, and the two would replace each other's "
        f"checkpoints. Nothing has been changed. Wait until its fit has ended, or give this run a folder of its own."
    )


def test_a_learner_may_follow_one_whose_events_still_wait(tmp_path: Path) -> None:
    first, second = Folders(print), Folders(print)
    first.hold([tmp_path, tmp_path / "other"], waits=False)
    with pytest.raises(CheckpointError, match="Another learner of this process trains into the folder"):
        second.hold([tmp_path], waits=False)
    first.idle()
    second.hold([tmp_path], waits=False)
    first.release()
    assert os.listdir(tmp_path) == [NAME]
    second.release()
    assert os.listdir(tmp_path) == []


def test_a_fit_that_is_refused_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint that is complete"):
        tiny_learner(Checkpointer(tmp_path / "new")).fit(1, resume=tmp_path / "new")
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint that is complete"):
        tiny_learner(Checkpointer(tmp_path / "old")).fit(1, resume=tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"]


def test_the_file_of_a_process_that_died_before_it_had_the_lock_is_removed(tmp_path: Path) -> None:
    """A process may be killed between the two: its file has no other name then."""
    alive, dead, elsewhere, damaged = (tmp_path / f"{NAME}.{name}.tmp" for name in ("a", "b", "c", "d"))
    here = LockOwner.here()
    alive.write_text(json.dumps(asdict(here)))
    dead.write_text(json.dumps(asdict(replace(here, started="0"))))
    elsewhere.write_text(json.dumps(asdict(replace(here, host="node17"))))
    damaged.write_text('{"host": ')
    for path in (elsewhere, damaged):
        os.utime(path, (0, 0))
    assert take(tmp_path, replace(here, token="e")) is None
    assert sorted(os.listdir(tmp_path)) == [NAME, alive.name]


def test_a_fit_that_fails_gives_its_folder_back(tmp_path: Path) -> None:
    def fail() -> None:
        """Fail."""
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        tiny_learner(Checkpointer(tmp_path), Meanwhile(fail)).fit(1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "start.ckpt"]


def test_of_two_folders_none_is_kept_if_one_is_in_use(tmp_path: Path) -> None:
    of_elsewhere(tmp_path / "b", silence=0)
    with pytest.raises(CheckpointError, match="in use by another run"):
        tiny_learner(Checkpointer(tmp_path / "a"), Checkpointer(tmp_path / "b")).fit(1)
    assert os.listdir(tmp_path) == ["b"]


def test_a_forked_child_neither_owns_nor_removes_the_lock(tmp_path: Path) -> None:
    seen: list[int] = []

    def fork() -> None:
        """Have a child try to train into the folder and end."""
        child = os.fork()
        if not child:
            try:
                tiny_learner(Checkpointer(tmp_path)).fit(1)
            except CheckpointError as error:
                os._exit(7 if f"process {os.getppid()} on" in str(error) else 8)
            os._exit(9)
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    tiny_learner(Checkpointer(tmp_path), Meanwhile(fork)).fit(1)
    assert seen == [7]
    assert sorted(os.listdir(tmp_path)) == ["best", "epoch-0001.ckpt", "latest"]


def test_writes_of_one_file_at_the_same_time_are_whole(tmp_path: Path) -> None:
    """A requeued job and its predecessor used one temporary file for both."""
    inner: list[str] = []

    def write(file: IO[bytes], text: bytes, then: Callable[[], None]) -> None:
        file.write(text[:3])
        then()
        file.write(text[3:])

    path = tmp_path / "latest"

    def other() -> None:
        """Write the same file meanwhile."""
        write_whole(path, lambda file: write(file, b"second", lambda: None), lambda point: None, "latest")
        inner.append(path.read_text())

    write_whole(path, lambda file: write(file, b"first!", other), lambda point: None, "latest")
    assert (inner, path.read_text()) == (["second"], "first!")


def test_a_file_system_without_links_and_locks_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        """Refuse, as a file system does that has no such thing."""
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(lock_file, "_SETTLE", 0.01)
    first, second = Folders(print), Folders(print)
    first.hold([tmp_path], waits=False)
    with pytest.raises(CheckpointError):
        second.hold([tmp_path], waits=False)
    first.release()
    of_elsewhere(tmp_path, silence=0)
    with pytest.raises(CheckpointError, match="node17"):
        second.hold([tmp_path], waits=False)
    of_elsewhere(tmp_path, silence=61)
    second.hold([tmp_path], waits=False)
    assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    second.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_is_read_only_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"^Checkpointer cannot write into the folder .*: .*Permission denied"):
        tiny_learner(Checkpointer(tmp_path)).fit(1)


def test_a_folder_is_made_only_when_nothing_is_wrong_with_the_call(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path / "run"))
    learner.close()
    with pytest.raises(Exception, match="closed learner"):
        learner.fit(1)
    assert os.listdir(tmp_path) == []
