"""Checkpointer: runs that go back to an earlier checkpoint of their folder, and abandon the later ones."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from flowtrain import (
    BatchEnd,
    Callback,
    CheckpointError,
    EpochBegin,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    load_weights,
    on,
)
from flowtrain.callbacks import Checkpointer
from flowtrain.testing import tiny_learner
from tests.support.checkpoints import files, pointer
from tests.support.logs import log_records
from tests.support.programs import Programs
from tests.support.scores import scored


@pytest.mark.parametrize("how", ["resumed", "loaded"])
def test_the_best_is_one_that_this_run_counts(how: str, tmp_path: Path) -> None:
    """A run that goes back to epoch 3 abandons the later epochs, one of which was the best, with its first checkpoint.

    Until then `latest` names the checkpoint that it went back to, in case that the run is killed.
    """

    def made(*scores: float) -> Learner:
        keep = Checkpointer(tmp_path, monitor="Score", mode="min", restore_best=True)
        return tiny_learner(scored(*scores), keep, n_batches=1)

    made(0.5, 0.3, 0.4, 0.35, 0.2).fit(5)
    learner = made(0.35)
    assert pointer(tmp_path, "best") == "5"
    seen: list[str] = []

    class Looks(Callback):
        @on(EpochBegin, TrainingPhase)
        def look(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            seen.extend([pointer(tmp_path, "best"), pointer(tmp_path, "latest"), *files(tmp_path)])

    learner.add_callback(Looks())
    if how == "resumed":
        learner.fit(4, resume=tmp_path / "epoch-0003.ckpt")
    else:
        learner.load(tmp_path / "epoch-0003.ckpt")
        learner.fit(1)
    plain = tiny_learner(n_batches=1)
    plain.fit(2)
    assert seen == ["2", "3", "1", "2", "3", "4", "5"]
    assert files(tmp_path) == ["1", "2", "3", "4"]
    assert (pointer(tmp_path, "best"), pointer(tmp_path, "latest")) == ("2", "4")
    assert torch.equal(learner.model.coeff, plain.model.coeff)
    assert torch.equal(load_weights(tmp_path)["coeff"], plain.model.coeff)
    learner.load(tmp_path / "best")
    assert learner.cbstate.history[TrainingPhase].epochs == 2


class Killed(Callback):
    """Ends a fit with an error when its first training epoch begins, as a kill would before the next checkpoint."""

    @on(EpochBegin, TrainingPhase)
    def end(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        raise RuntimeError("killed")


def test_rule_28_a_run_that_went_back_and_was_killed_continues_its_own_branch(tmp_path: Path) -> None:
    """A fit that continued from epoch 5 of the abandoned run would have five epochs."""
    tiny_learner(Checkpointer(tmp_path, every_steps=3), n_batches=2).fit(5)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_learner(Checkpointer(tmp_path), Killed(), n_batches=2).fit(6, resume=tmp_path / "epoch-0003.ckpt")
    learner = tiny_learner(Checkpointer(tmp_path), n_batches=2)
    learner.fit(4, resume="auto")
    assert learner.cbstate.history[TrainingPhase].epochs == 4
    assert files(tmp_path) == ["1", "2", "3", "4"]


def test_a_run_that_goes_back_removes_no_file_that_it_did_not_write(tmp_path: Path) -> None:
    """Ranks by another metric do not count, and their files stay, as files with names of the user's own do."""
    names = ["step-00000004.ckpt", "epoch-0009.ckpt", "mine.ckpt", "epoch-9.ckpt"]
    tiny_learner(Checkpointer(tmp_path, every_steps=3), n_batches=2).fit(4)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    resumed = Checkpointer(tmp_path, monitor=None)
    tiny_learner(resumed, n_batches=2).fit(3, resume=tmp_path / "epoch-0002.ckpt")
    assert sorted(each.name for each in tmp_path.glob("*.ckpt")) == [
        "epoch-0001.ckpt", "epoch-0002.ckpt", "epoch-0003.ckpt", "epoch-9.ckpt", "mine.ckpt",
    ]  # fmt: skip


def test_an_interrupted_run_goes_back_to_the_checkpoint_of_the_interrupt(tmp_path: Path) -> None:
    class Stop(Callback):
        @on(BatchEnd, TrainingPhase, access={"cbstate.history": Read()})
        def stop(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[phase].steps == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_learner(Checkpointer(tmp_path), Stop(), n_batches=2).fit(4)
    with pytest.raises(RuntimeError, match="killed"):
        tiny_learner(Checkpointer(tmp_path), Killed(), n_batches=2).fit(6, resume=tmp_path)
    assert pointer(tmp_path, "latest") == "interrupted"
    with pytest.raises(RuntimeError, match="killed"):
        tiny_learner(Checkpointer(tmp_path), Killed(), n_batches=2).fit(6, resume=tmp_path / "epoch-0001.ckpt")
    assert pointer(tmp_path, "latest") == "1"


FULL = """
import resource, signal, sys
from pathlib import Path
from flowtrain import Callback, CheckpointError, FitBegin, on
from flowtrain.callbacks import Checkpointer
from flowtrain.testing import tiny_learner

class Full(Callback):
    @on(FitBegin)
    def fill(self, event, phase, learner):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12, 12))  # less than the name of a file

folder = Path(sys.argv[1])
tiny_learner(Checkpointer(folder), n_batches=1).fit(3)
learner = tiny_learner(Full(), Checkpointer(folder), n_batches=1)
try:
    learner.fit(4, resume=folder / "epoch-0002.ckpt")
except CheckpointError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes")
def test_a_disk_that_fills_while_a_run_goes_back(tmp_path: Path, programs: Programs) -> None:
    done = programs.run(FULL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        f"The file {tmp_path}/best must name epoch-0002.ckpt before training continues from that checkpoint, and it "
        f"cannot be written: [Errno 27] File too large. Nothing has been trained. Make room, or make the folder "
        f"writable, and resume again."
    )
    assert (pointer(tmp_path, "best"), pointer(tmp_path, "latest"), files(tmp_path)) == ("3", "3", ["1", "2", "3"])


def test_a_run_that_goes_back_to_before_its_first_epoch_has_no_best(tmp_path: Path) -> None:
    class Asks(Callback):
        @on(BatchEnd, TrainingPhase, access={"cbstate.history": Read()})
        def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[TrainingPhase].steps == 1:
                learner.request_checkpoint(tmp_path / "early.ckpt")

    def made(*scores: float) -> Learner:
        keep = Checkpointer(tmp_path, monitor="Score", mode="min", restore_best=True)
        return tiny_learner(scored(*(score for score in scores for _ in range(2))), keep, Asks(), n_batches=2)

    made(0.5, 0.2).fit(2)
    assert pointer(tmp_path, "best") == "2"
    learner = made(float("nan"))
    learner.fit(1, resume=tmp_path / "early.ckpt")
    plain = tiny_learner(n_batches=2)
    plain.fit(1)
    assert torch.equal(learner.model.coeff, plain.model.coeff)
    assert not (tmp_path / "best").exists()
    assert pointer(tmp_path, "latest") == "1"


EARLY = """
import os, signal, sys
import torch
from flowtrain import BatchEnd, Callback, FitBegin, on
from flowtrain.callbacks import Checkpointer, LearningRate, LogHyperParams, LogMetrics, Scheduler
from flowtrain.schedules import one_cycle
from flowtrain.logging import CsvBackend, JsonlBackend
from flowtrain.testing import tiny_learner

folder, at = sys.argv[1], int(sys.argv[2])

class Kill(Callback):
    count = 0
    @on(FitBegin)
    def begin(self, event, phase, learner):
        if not at:
            os.kill(os.getpid(), signal.SIGKILL)
    @on(BatchEnd)
    def end(self, event, phase, learner):
        self.count += 1
        if self.count == at:
            learner_.loop.checkpoints.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(3)
logs = JsonlBackend(folder + "/log.jsonl"), CsvBackend(folder + "/log.csv")
schedule = Scheduler({LearningRate: one_cycle(0.1)})
callbacks = [Checkpointer(folder + "/c"), LogMetrics(*logs), schedule, LogHyperParams(*logs), Kill()]
learner_ = tiny_learner(*callbacks, n_batches=4)
learner_.fit(3, resume="auto")
print(learner_.model.coeff.item(), learner_.cbstate.history)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by a signal")
def test_a_run_that_is_killed_before_its_first_epoch_ends_is_resumed(tmp_path: Path, programs: Programs) -> None:
    """The checkpoint at the beginning brings the logs back to there: a fit that began anew would double records."""
    whole = programs.run(EARLY, str(tmp_path / "whole"), "-1")
    assert whole.returncode == 0, whole.stderr
    for at in ("1", "3"):
        killed = programs.run(EARLY, str(tmp_path / "killed"), at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert pointer(tmp_path / "killed" / "c", "latest") == "start"
    resumed = programs.run(EARLY, str(tmp_path / "killed"), "-1")
    assert (resumed.returncode, resumed.stdout) == (0, whole.stdout), resumed.stderr
    assert log_records(tmp_path / "killed" / "log.jsonl") == log_records(tmp_path / "whole" / "log.jsonl")
    assert (tmp_path / "killed" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
    assert [*sorted(each.name for each in (tmp_path / "killed" / "c").iterdir())] == [
        "best", "epoch-0001.ckpt", "epoch-0002.ckpt", "epoch-0003.ckpt", "latest",
    ]  # fmt: skip


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    for name in (".epoch-0001.ckpt.1a.tmp", ".latest.2b.tmp", ".start.ckpt.tmp", "step-00000004.ckpt", ".mine.tmp"):
        (tmp_path / name).touch()
    tiny_learner(Checkpointer(tmp_path), n_batches=1).fit(1)
    left = sorted(each.name for each in tmp_path.iterdir())
    assert left == [".mine.tmp", "best", "epoch-0001.ckpt", "latest"]


@pytest.mark.parametrize("becomes", ["nothing", "a file"])
def test_a_folder_that_is_deleted_meanwhile(becomes: str, tmp_path: Path) -> None:
    """The next checkpoint makes the folder again. If it cannot, the error names the file, and the fit begins anew."""
    folder = tmp_path / "c"

    class Deletes(Callback):
        begun = 0

        @on(EpochBegin, TrainingPhase)
        def delete(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            self.begun += 1
            if self.begun == 2:
                made.loop.checkpoints.writer.wait()
                shutil.rmtree(folder)
                if becomes == "a file":
                    folder.touch()

    whole = tiny_learner(n_batches=2)
    whole.fit(3)
    learner = made = tiny_learner(Checkpointer(folder), Deletes(), n_batches=2)
    if becomes == "a file":
        with pytest.raises(CheckpointError, match=r"epoch-000\d\.ckpt could not be written: .*no earlier checkpoint"):
            learner.fit(3)
        folder.unlink()
        learner.close()
        learner = tiny_learner(Checkpointer(folder), n_batches=2)
        learner.fit(3, resume="auto")
    else:
        learner.fit(3)
        assert files(folder) == ["2", "3"]
    assert torch.equal(learner.model.coeff, whole.model.coeff)
