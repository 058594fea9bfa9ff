"""Checkpoint files: complete or absent, and written beside training."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from flowtrain import (
    CheckpointError,
    EpochEnd,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    load_weights,
    on,
)
from flowtrain.callback.view import CheckpointRequest
from flowtrain.callbacks import Checkpointer
from flowtrain.graph.executor import Mailbox
from flowtrain.testing import TinyModel, tiny_learner
from flowtrain.training.checkpoint.files import Writer, write_whole
from flowtrain.training.checkpoint.reading import target
from tests.support.programs import Programs


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path, points = tmp_path / "a.ckpt", list[tuple[str, bool]]()

    def write(file: IO[bytes]) -> None:
        file.write(b"new")

    write_whole(path, write, lambda at: points.append((at, path.exists())), "checkpoint")
    assert points == [("checkpoint begun", False), ("checkpoint written", False), ("checkpoint renamed", True)]
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_fails_leaves_the_file_that_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, fail, lambda point: None, "checkpoint")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


# --- the writer


KILLED = """
import os, sys
from pathlib import Path
import torch
from flowtrain.callbacks import Checkpointer
from flowtrain.testing import tiny_learner

def train(folder, point, number):
    learner = tiny_learner(Checkpointer(folder, keep_top_k=1, weights="safetensors"), n_batches=2)
    seen = []

    def reached(name):
        seen.append(name)
        if "removed" in seen and seen[seen.index("removed") + 1 :].count(point) == number:  # after start.ckpt
            os._exit(9)

    learner.loop.checkpoints.writer.reached = reached
    learner.fit(3)

torch.set_num_threads(1)
train(Path(sys.argv[1]) / "whole", "", 1)  # so that all that is imported late is there for the children
for number in (1, 2):
    for point in sys.argv[2:]:
        child = os.fork()  # each is a process that is killed; they share the import
        if not child:
            try:
                train(Path(sys.argv[1]) / f"{point} {number}", point, number)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, (point, number)
"""

POINTS = [
    f"{what} {point}"
    for what in ("checkpoint", "weights", "latest", "best")
    for point in ("begun", "written", "renamed")
] + ["removed"]

LIMITED = """
import resource, sys, warnings
warnings.simplefilter("error")
from flowtrain import CheckpointError
from flowtrain.callbacks import Checkpointer
from flowtrain.testing import tiny_learner
import torch

class Grows(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.coeff = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("rest", torch.zeros(100_000))
    def forward(self, x):
        return self.coeff * x

learner = tiny_learner(Checkpointer(sys.argv[1]), model=Grows(), n_batches=2)
learner.fit(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    learner.fit(3)
except CheckpointError as error:
    print(error)
learner.load(sys.argv[1])
print(learner.cbstate.history)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Path:
    """Return a folder for each point of writing: its state after the process was killed there."""
    if not hasattr(os, "fork"):
        pytest.skip("the processes are forked")
    folder = tmp_path_factory.mktemp("killed")
    done = programs.run(KILLED, str(folder), *POINTS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_rule_28_a_killed_process_leaves_what_loads(killed: Path, point: str, number: int) -> None:
    """Rule 28: the files that ``latest`` and ``best`` name are complete, and every file with a checkpoint's name."""
    tmp_path = killed / f"{point} {number}"
    for file in tmp_path.glob("*.ckpt"):
        tiny_learner().load(file)
    for pointer in ("latest", "best"):
        if (tmp_path / pointer).exists():
            learner = tiny_learner(n_batches=2)
            learner.load(tmp_path / pointer)
            epochs = learner.cbstate.history[TrainingPhase].epochs
            assert target(tmp_path, pointer) == (f"epoch-{epochs:04d}.ckpt" if epochs else "start.ckpt")
    pointed = POINTS.index(point) >= POINTS.index("latest renamed")
    assert target(tmp_path, "latest") == ("start.ckpt", "epoch-0001.ckpt", "epoch-0002.ckpt")[number - 1 + pointed]
    resumed = tiny_learner(Checkpointer(tmp_path, keep_top_k=1), n_batches=2)
    resumed.fit(3, resume=tmp_path)
    whole = tiny_learner(n_batches=2)
    whole.fit(3)
    assert torch.equal(resumed.model.coeff, whole.model.coeff)
    assert sorted(each.name for each in tmp_path.iterdir() if "safetensors" not in each.name) == [
        "best", "epoch-0003.ckpt", "latest",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays(tmp_path: Path, programs: Programs) -> None:
    done = programs.run(LIMITED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    error, history = done.stdout.splitlines()
    assert error == (
        f"The checkpoint {tmp_path}/epoch-0002.ckpt could not be written: [Errno 27] File too large. The last "
        f"complete one is {tmp_path}/epoch-0001.ckpt. Make room, or choose another folder, and continue with "
        f"fit(..., resume=...)."
    )
    assert "TrainingPhase: Counts(epochs=1," in history
    assert sorted(each.name for each in tmp_path.iterdir()) == ["best", "epoch-0001.ckpt", "latest"]


class Gate:
    """Blocks the writer at a point until the test opens the gate.

    Args:
        learner: The learner whose writer it is.
        point: The point.
        first: How many times the writer passes the point before.
    """

    def __init__(self, learner: Learner, point: str, first: int = 0) -> None:
        self.left = first
        self.point, self.reached, self.open = point, threading.Event(), threading.Event()
        learner.loop.checkpoints.writer.reached = self.at

    def at(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if self.left >= 0:
                return
            self.reached.set()
            assert self.open.wait(60)


class Opens(Checkpointer):
    """Opens the gate after more training, and notes how many batches were trained before."""

    gate: Gate
    passed: bool = False

    @on(EpochEnd, TrainingPhase, access={})
    def let_through(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        if self.gate.reached.is_set():
            self.passed = not self.gate.open.is_set() or self.passed
            self.gate.open.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The writer is blocked until the next training epoch has ended, so waiting for it would never end."""
    callback = Opens(tmp_path)
    learner = tiny_learner(callback, n_batches=200)
    callback.gate = Gate(learner, "checkpoint begun", first=1)  # training waits for the first one, `start.ckpt`
    learner.fit(3)
    assert callback.passed
    assert target(tmp_path, "latest") == "epoch-0003.ckpt"


def test_one_is_written_at_a_time(tmp_path: Path) -> None:
    writer = Writer(Mailbox())
    open_now, at_work, most = threading.Event(), [], []

    def reached(point: str) -> None:
        if point == "checkpoint begun":
            at_work.append(point)
            most.append(len(at_work))
            assert open_now.wait(60)
        if point == "removed":
            at_work.pop()

    writer.reached = reached
    writer.submit(_contents(), CheckpointRequest(str(tmp_path / "1.ckpt")))
    threading.Timer(0.05, open_now.set).start()
    writer.submit(_contents(), CheckpointRequest(str(tmp_path / "2.ckpt")))
    writer.wait()
    assert most == [1, 1]
    assert target(tmp_path, "latest") == "2.ckpt"


def _contents(finite: bool = True) -> dict[str, Any]:
    return {"model": {"": {"w": torch.ones(1)}}, "loss module": {}, "finite": finite}


@pytest.mark.parametrize("good", [True, False])
def test_rule_28_only_what_is_finite_becomes_the_latest(good: bool, tmp_path: Path) -> None:
    """Rule 28: a checkpoint with NaN is written, with a warning, and `latest` does not name it."""
    mailbox = Mailbox()
    writer = Writer(mailbox)
    writer.submit(_contents(), CheckpointRequest(str(tmp_path / "1.ckpt")))
    (tmp_path / "0.ckpt").touch()
    request = CheckpointRequest(str(tmp_path / "2.ckpt"), best=True, remove=("1.ckpt", "0.ckpt"))
    writer.submit(_contents(good), request)
    writer.wait()
    assert torch.load(tmp_path / "2.ckpt")["finite"] == good
    assert target(tmp_path, "latest") == ("2.ckpt" if good else "1.ckpt")
    assert target(tmp_path, "best") == ("2.ckpt" if good else "")
    assert (tmp_path / "1.ckpt").exists() != good, "a checkpoint that a pointer names is kept"
    assert not (tmp_path / "0.ckpt").exists()
    if not good:
        message = r"2\.ckpt holds values that are not finite \(a parameter that is trained, .* that is 1\.ckpt\."
        with pytest.warns(RuntimeWarning, match=message):
            mailbox.empty()
    assert not mailbox.calls


def test_an_older_checkpoint_that_cannot_be_removed_is_no_failed_write(tmp_path: Path) -> None:
    mailbox = Mailbox()
    writer = Writer(mailbox)
    (tmp_path / "old.ckpt").mkdir()  # a folder, so that removing the file fails
    writer.submit(_contents(), CheckpointRequest(str(tmp_path / "new.ckpt"), remove=("old.ckpt",)))
    writer.wait()
    assert target(tmp_path, "latest") == "new.ckpt"
    with pytest.warns(RuntimeWarning, match=r"Of the older checkpoints old\.ckpt in .* not be removed: .* by hand"):
        mailbox.empty()


def test_an_error_surfaces_at_the_next_batch_boundary(tmp_path: Path) -> None:
    batches: list[int] = []

    class Breaks(Checkpointer):
        @on(EpochEnd, TrainingPhase, access={})
        def note(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            batches.append(1)

    learner = tiny_learner(Breaks(tmp_path), n_batches=500)
    learner.loop.checkpoints.writer.reached = _fail
    with pytest.raises(CheckpointError, match=r"epoch-0001\.ckpt could not be written: OSError|no space") as caught:
        learner.fit(100)
    assert len(batches) < 100
    assert isinstance(caught.value.__cause__, OSError)
    assert "There is no earlier checkpoint." in str(caught.value)
    learner.flush()  # the error is raised only once
    assert not list(tmp_path.iterdir())


def _fail(point: str) -> None:
    raise OSError("no space")


def test_an_error_of_the_last_checkpoint_surfaces_at_the_end_of_the_fit(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path), n_batches=1)
    learner.loop.checkpoints.writer.reached = _fail
    with pytest.raises(CheckpointError, match="could not be written: no space"):
        learner.fit(1)
    assert not any(thread.name == "flowtrain-checkpoint" for thread in threading.enumerate())


def test_weights_as_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    learner = tiny_learner(Checkpointer(tmp_path, weights="safetensors"))
    learner.fit(1)
    loaded = TinyModel()
    loaded.load_state_dict(safetensors.load_file(tmp_path / "epoch-0001.safetensors"))
    assert torch.equal(loaded.coeff, learner.model.coeff)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_weights_of_several_models_by_name(tmp_path: Path) -> None:
    models = {"one": torch.nn.Linear(1, 1), "two": torch.nn.Linear(1, 1)}
    states = {name: model.state_dict() for name, model in models.items()}
    torch.save({"format": "flowtrain checkpoint", "version": 1, "model": states}, tmp_path / "a.ckpt")
    found = load_weights(tmp_path / "a.ckpt")
    for name, model in models.items():
        model.load_state_dict(found[name])
