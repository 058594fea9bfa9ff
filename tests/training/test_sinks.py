"""Sinks: when the backends of a learner's callbacks are opened, flushed, restored and closed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from flowtrain.callback.callback import Callback
from flowtrain.callbacks import LogHyperParams, LogMetrics
from flowtrain.errors import LoggingError
from flowtrain.graph.held_backends import backends_of
from flowtrain.graph.nodes import Node
from flowtrain.logging import CsvBackend, JsonlBackend, Run, Value
from flowtrain.testing import tiny_learner
from flowtrain.training.sinks import Sinks
from tests.support.interrupts import interrupted
from tests.support.logs import log_steps
from tests.support.programs import Programs
from tests.support.untyped import untyped

STEP = ("Step", "TrainingPhase")


def write(backend: JsonlBackend, step: int) -> None:
    backend.write(backend.encode(Value(step), "Loss", step, STEP))


def nodes(callback: Callback) -> list[Node]:
    return [Node(callback, type(callback).__name__, 0, (), {}, (), backends_of(callback))]


def test_two_backends_on_one_file_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    one, other = JsonlBackend(tmp_path / "log"), CsvBackend(tmp_path / "link" / "log")
    with pytest.raises(LoggingError, match=r"LogMetrics logs to JsonlBackend\(.*\) and LogHyperParams to CsvBackend\("):
        tiny_learner(LogMetrics(one), LogHyperParams(other))
    assert not (tmp_path / "log").exists()
    learner = tiny_learner(LogMetrics(one), LogHyperParams(one, settings={"a": 1}), n_batches=1)
    learner.fit(1)
    learner.close()
    assert log_steps(tmp_path / "log") == [0, 1, 1, 1, 1]


def test_what_is_no_backend_is_named() -> None:
    class Custom(Callback):
        backends: Any = ("log.jsonl",)

    with pytest.raises(LoggingError, match=r"Custom logs to 'log\.jsonl', which is no LoggerBackend\. Write Custom\("):
        tiny_learner(Custom())


def test_a_folder_that_cannot_be_written_ends_the_fit_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("", "utf-8")
    learner = tiny_learner(LogMetrics(JsonlBackend(tmp_path / "runs" / "log.jsonl")))
    with pytest.raises(
        LoggingError, match=r"log\.jsonl cannot be written: (Not a directory|File exists: .*/runs)\. Log"
    ) as caught:
        learner.fit(1)
    assert caught.value.__notes__[0].startswith("raised when JsonlBackend(")
    assert caught.value.__notes__[0].endswith("of LogMetrics was opened")
    assert learner.cbstate.history == {}
    learner.close()


ON_A_FULL_DISK = """
import resource, sys

from flowtrain import LoggingError
from flowtrain.callbacks import LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner

learner = tiny_learner(LogMetrics(JsonlBackend(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    learner.fit(1)
except LoggingError as error:
    print(error, *error.__notes__, sep="\\n", flush=True)
learner.close()
"""


def test_a_full_disk_says_what_is_kept(tmp_path: Path, programs: Programs) -> None:
    """In a separate process, a limit on the size of files stands for a full disk."""
    path = tmp_path / "log.jsonl"
    done = programs.run(ON_A_FULL_DISK, str(path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"log\.jsonl: a record of \d+ bytes cannot be written: File too large\. ", done.stdout)
    assert "raised when 'Loss' of Step/TrainingPhase, step " in done.stdout
    assert "raised in LogMetrics.log_step at (BatchEnd, TrainingPhase)" in done.stdout
    kept = log_steps(path)
    assert kept == list(range(1, len(kept) + 1))
    assert f"The file keeps the {os.path.getsize(path)} bytes before it, all of them whole" in done.stdout


def test_flush_gives_positions_that_restore_goes_back_to(tmp_path: Path) -> None:
    """Rule 28: positions belong to sinks, whichever callbacks hold them; a backend without one is left unchanged."""
    one, new = JsonlBackend(tmp_path / "one"), JsonlBackend(tmp_path / "new")
    sinks = Sinks()
    sinks.use(nodes(LogMetrics(one)))
    sinks.open()
    write(one, 1)
    positions = sinks.flush()
    write(one, 2)
    sinks.close()
    again = Sinks()
    again.use(nodes(LogMetrics(JsonlBackend(tmp_path / "one"), new)))
    again.restore(Run(sinks.run.id, resumed=True), positions)
    assert (again.run.id, again.run.resumed) == (sinks.run.id, True)
    write(new, 3)
    again.close()
    assert (log_steps(tmp_path / "one"), log_steps(tmp_path / "new")) == ([1], [3])


def test_a_run_that_cannot_be_gone_on_with_is_not_gone_on_with(tmp_path: Path) -> None:
    """Rule 28: a refused restore changes nothing, so later training is not logged as part of that run."""
    backend = JsonlBackend(tmp_path / "log")
    sinks = Sinks()
    sinks.use(nodes(LogMetrics(backend)))
    before = sinks.run
    with pytest.raises(LoggingError):
        sinks.restore(Run("other", resumed=True), {backend.sink: 10_000})
    assert sinks.run is before
    with pytest.raises(LoggingError, match="is not open"):
        write(backend, 1)


def test_callbacks_that_leave_close_their_backends(tmp_path: Path) -> None:
    first, second = JsonlBackend(tmp_path / "log"), JsonlBackend(tmp_path / "log")
    sinks = Sinks()
    sinks.use(nodes(LogMetrics(first)))
    sinks.open()
    sinks.use(nodes(LogMetrics(second)))
    with pytest.raises(LoggingError, match="is not open"):
        write(first, 1)
    sinks.open()
    write(second, 2)
    sinks.close()
    assert log_steps(tmp_path / "log") == [2]


def test_every_backend_is_closed_whatever_another_raises(tmp_path: Path) -> None:
    class Broken(JsonlBackend):
        def close(self) -> None:
            super().close()
            raise OSError("broken")

    broken, fine = Broken(tmp_path / "a"), JsonlBackend(tmp_path / "b")
    sinks = Sinks()
    sinks.use(nodes(LogMetrics(broken, fine)))
    untyped(broken).close = lambda: None  # `open` closes first
    sinks.open()
    del broken.close
    with pytest.raises(OSError, match="broken") as caught:
        sinks.close()
    assert caught.value.__notes__ == [f"raised when {broken!r} of LogMetrics was closed"]
    with pytest.raises(LoggingError, match="is not open"):
        write(fine, 1)


def test_a_sink_that_cannot_be_closed_does_not_stop_half_of_a_change(tmp_path: Path) -> None:
    """Rule 11: the failure is raised after the callbacks and their backends have both been replaced."""

    class Broken(JsonlBackend):
        def close(self) -> None:
            super().close()
            if self.broken:
                raise OSError("broken")

        broken = False

    backend = Broken(tmp_path / "a")
    learner = tiny_learner(LogMetrics(backend))
    learner.fit(1)
    written = log_steps(tmp_path / "a")
    backend.broken = True
    with pytest.raises(OSError, match="broken"):
        learner.remove_callback(LogMetrics)
    assert learner.get_callback(LogMetrics) is None
    learner.fit(1)
    assert log_steps(tmp_path / "a") == written != []


class Known(JsonlBackend):
    """Knows whether it is open, and has no file."""

    is_open = False

    def open(self, run: Run) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


def test_an_interrupt_leaves_no_backend_open_that_closing_the_sinks_does_not_close(tmp_path: Path) -> None:
    """An interrupt between the opening and the note of it left the file open; one before closing, all of them."""
    backends = [Known(tmp_path / "a"), Known(tmp_path / "b")]
    used = [node for backend in backends for node in nodes(LogMetrics(backend))]

    def use() -> None:
        sinks.use(used)
        sinks.open()
        sinks.use(used[:1])
        sinks.close()

    sinks = Sinks()
    for _ in interrupted(use, "training/sinks.py"):
        sinks.close()
        assert [backend.is_open for backend in backends] == [False, False]
        sinks.use(used)
        sinks.open()
        assert [backend.is_open for backend in backends] == [True, True]
        sinks.close()
        assert [backend.is_open for backend in backends] == [False, False]
        sinks = Sinks()
        sinks.use(used)
        sinks.open()  # the backends are free for another learner
        sinks.close()


TRAINED_IN_A_CHILD = """
import os, sys
from flowtrain.callbacks import LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner

class Told(JsonlBackend):
    def ended(self, outcome):
        print("ended", outcome, flush=True)

    def close(self):
        super().close()
        print("closed", flush=True)

learner = tiny_learner(LogMetrics(Told(sys.argv[1])), n_batches=1)
child = os.fork()
if not child:
    learner.fit(1)
else:
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_process_that_trains_closes_the_backends_that_it_opened(tmp_path: Path, programs: Programs) -> None:
    """A learner is made, its process forks, and the child trains and ends without closing the learner."""
    done = programs.run(TRAINED_IN_A_CHILD, str(tmp_path / "log.jsonl"))
    assert done.stdout.split()[-3:] == ["ended", "finished", "closed"], done.stderr


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowtrain.training.sinks.process_rank", lambda: 1)
    learner = tiny_learner(LogMetrics(JsonlBackend(tmp_path / "log")))
    learner.fit(1)
    learner.close()
    assert not list(tmp_path.iterdir())


def test_positions_move_with_the_checkpoint(tmp_path: Path) -> None:
    """A sink moves with the checkpoint if it lies at the same place relative to it; a sink at its old place stays."""
    backends = [JsonlBackend(tmp_path / "b" / "log"), JsonlBackend(tmp_path / "same"), CsvBackend(tmp_path / "b" / "c")]
    sinks = Sinks()
    sinks.use(nodes(LogMetrics(*backends)))
    was = {str(tmp_path / "a" / "log"): 1, str(tmp_path / "same"): 2, "tracker:7": 3}
    before, here = str(tmp_path / "a" / "kept"), str(tmp_path / "b" / "kept")
    with pytest.warns(
        UserWarning, match=r"logged to tracker:7, and the learner does not.* New records go to CsvBackend\(.*c'\)"
    ):
        found = sinks.relocated_positions(was, before, here)
    assert found == {str(tmp_path / "b" / "log"): 1, str(tmp_path / "same"): 2}
