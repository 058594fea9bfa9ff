"""Checkpointer: which checkpoint files it keeps in its folder, and which weights it restores."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    AbstractValidationPhase,
    BatchEnd,
    Callback,
    CancelEpochException,
    CancelFittingException,
    CheckpointError,
    EpochBegin,
    Executor,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    load_weights,
    on,
)
from flowtrain.callback.access import declare
from flowtrain.callbacks import Checkpointer, EarlyStopping, LogMetrics, Metrics, throttle
from flowtrain.errors import RankError
from flowtrain.logging import JsonlBackend
from flowtrain.testing import assert_equivalent, record_access, tiny_batches, tiny_learner
from tests.support.checkpoints import files, pointer
from tests.support.fired import OODPhase
from tests.support.logs import log_records
from tests.support.scores import scored

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "scores", "kept", "best"),
    [
        ({}, [3, 1, 2, 4], ["1", "2", "3", "4"], "2"),
        ({"mode": "max"}, [3, 1, 2, 4], ["1", "2", "3", "4"], "4"),
        ({"keep_top_k": 1}, [3, 1, 2, 4], ["2", "4"], "2"),
        ({"keep_top_k": 2}, [3, 1, 2, 4], ["2", "3", "4"], "2"),
        ({"keep_top_k": 2, "mode": "max"}, [3, 1, 2, 4], ["1", "4"], "4"),
        ({"keep_top_k": 2}, [1, NAN, 2, NAN], ["1", "3", "4"], "1"),
        ({"keep_top_k": 1}, [2, 2, 2, 2], ["1", "4"], "1"),
        ({"every": 2}, [1, 2, 3, 4], ["2", "4"], "2"),
        ({"every": 2, "keep_top_k": 1}, [1, 4, 3, 2], ["4"], "4"),
        ({"every": 3}, [1, 2, 3, 4], ["3", "4"], "3"),
        ({"every": 9}, [1, 2, 3, 4], ["4"], "4"),
    ],
)
def test_the_best_and_the_latest_stay(
    options: dict[str, Any], scores: list[float], kept: list[str], best: str, tmp_path: Path
) -> None:
    options = {"mode": "min", **options}
    tiny_learner(scored(*scores), Checkpointer(tmp_path, monitor="Score", **options), n_batches=1).fit(4)
    assert files(tmp_path) == kept
    assert (pointer(tmp_path, "latest"), pointer(tmp_path, "best")) == ("4", best)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("executor", ["serial", "dask"])
@pytest.mark.parametrize(("scores", "best"), [([3, 1, 2, 4], 2), ([4, 3, 2, 1], 4), ([NAN, 2, NAN, 3], 2)])
def test_the_best_weights_come_back_when_the_fit_ends(
    scores: list[float], best: int, executor: str, tmp_path: Path
) -> None:
    keep = Checkpointer(tmp_path, monitor="Score", mode="min", restore_best=True)
    learner = tiny_learner(scored(*scores), keep, n_batches=1, executor=executor)
    learner.fit(4)
    plain = tiny_learner(n_batches=1)
    plain.fit(best)
    assert torch.equal(learner.model.coeff, plain.model.coeff)
    assert torch.equal(load_weights(tmp_path)["coeff"], plain.model.coeff)
    assert load_weights(tmp_path, "latest")["coeff"] != plain.model.coeff or best == 4
    assert len(learner.cbstate.metrics_epoch[ValidationPhase]["Score"]) == 4, "only the weights are those of the best"
    assert learner.cbstate.history[TrainingPhase].epochs == 4


@pytest.mark.parametrize(
    ("every", "how", "kept"),
    [
        (2, {"epochs": 5, "validate_every": 3}, ["3", "5"]),
        (5, {"steps": 12, "validate_every": 3}, ["4"]),
        (2, {"steps": 12, "validate_every": 3}, ["2", "4"]),
        (3, {"epochs": 9, "validate_every": 2}, ["4", "6", "9"]),
        (10, {"epochs": 3}, ["3"]),
    ],
)
def test_every_is_met_by_the_next_evaluation_and_the_last_epoch_is_written(
    every: int, how: dict[str, Any], kept: list[str], tmp_path: Path
) -> None:
    keep = Checkpointer(tmp_path, every=every)
    learner = tiny_learner(keep, n_batches=3)
    learner.fit(**how)
    assert (files(tmp_path), pointer(tmp_path, "latest")) == (kept, kept[-1])
    assert torch.equal(load_weights(tmp_path, "latest")["coeff"], learner.model.coeff)
    learner.validate()
    assert files(tmp_path) == kept, "the validation is of no fit"


@pytest.mark.parametrize(
    ("every", "scores", "best"),
    [(2, [3, 1, 2], 2), (2, [3, 2, 1], 3), (2, [1, 2, NAN], 2), (9, [3, 1, 2], 3), (9, [1, 2, NAN], 3)],
)
def test_the_last_epoch_may_be_the_best(every: int, scores: list[float], best: int, tmp_path: Path) -> None:
    keep = Checkpointer(tmp_path, every=every, monitor="Score", mode="min", restore_best=True)
    learner = tiny_learner(scored(*scores), keep, n_batches=1)
    learner.fit(3)
    plain = tiny_learner(n_batches=1)
    plain.fit(best)
    assert torch.equal(learner.model.coeff, plain.model.coeff)


def test_a_fit_resumes_from_the_epoch_at_its_end(tmp_path: Path) -> None:
    def make() -> Learner:
        return tiny_learner(Checkpointer(tmp_path, every=2), n_batches=3)

    make().fit(5)
    resumed, whole = make(), tiny_learner(n_batches=3)
    resumed.fit(8, resume=tmp_path)
    whole.fit(8)
    assert files(tmp_path) == ["2", "4", "5", "6", "8"]
    assert torch.equal(resumed.model.coeff, whole.model.coeff)
    assert list(resumed.cbstate.metrics_epoch[ValidationPhase]["Loss"]) == list(
        whole.cbstate.metrics_epoch[ValidationPhase]["Loss"]
    )


def test_an_error_writes_no_epoch_that_was_left_out(tmp_path: Path) -> None:
    class Fails(Callback):
        @on(BatchEnd, TrainingPhase, access={"cbstate.history": Read()})
        def fail(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[phase].steps == 11:
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        tiny_learner(Checkpointer(tmp_path, every=2), Fails(), n_batches=3).fit(5)
    assert files(tmp_path) == ["2"]


def test_the_best_weights_come_back_after_a_cancel_and_not_after_an_error(tmp_path: Path) -> None:
    class Ends(Callback):
        def __init__(self, raised: type[Exception]) -> None:
            self.raised = raised

        @on(EpochBegin, TrainingPhase, access={"cbstate.history": Read()})
        def end(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[TrainingPhase].epochs == 3:
                raise self.raised("enough")

    for raised, epoch in ((CancelFittingException, 1), (RuntimeError, 3)):
        keep = Checkpointer(tmp_path / raised.__name__, monitor="Score", mode="min", restore_best=True)
        learner = tiny_learner(scored(1, 2, 3), keep, Ends(raised), n_batches=1)
        with pytest.raises(RuntimeError) if raised is RuntimeError else nullcontext():
            learner.fit(9)
        plain = tiny_learner(n_batches=1)
        plain.fit(epoch)
        assert torch.equal(learner.model.coeff, plain.model.coeff)


def test_without_a_best_epoch_the_last_weights_stay(tmp_path: Path) -> None:
    """The folder may have a best checkpoint of another run, which is not this run's."""
    tiny_learner(scored(1), Checkpointer(tmp_path, monitor="Score", mode="min"), n_batches=1).fit(1)
    keep = Checkpointer(tmp_path, monitor="Score", mode="min", restore_best=True)
    learner = tiny_learner(scored(NAN, NAN), keep, n_batches=1)
    with pytest.warns(UserWarning, match="holds the checkpoints of another run"):
        learner.fit(2)
    plain = tiny_learner(n_batches=1)
    plain.fit(2)
    assert torch.equal(learner.model.coeff, plain.model.coeff)


def test_resume_auto_goes_on_if_there_is_something_to_go_on_from(tmp_path: Path) -> None:
    def made() -> Learner:
        log = LogMetrics(JsonlBackend(tmp_path / "log.jsonl"))
        return tiny_learner(Checkpointer(tmp_path / "one"), Checkpointer(tmp_path / "two"), log, n_batches=2)

    with made() as first:
        first.fit(2, resume="auto")
    shutil.rmtree(tmp_path / "one")  # the folder with the newest checkpoint counts
    with made() as second:
        second.fit(3, resume="auto")
    with made() as third:
        third.fit(3, resume="auto")
    assert third.cbstate.history[TrainingPhase].epochs == 3
    whole = tiny_learner(n_batches=2)
    whole.fit(3)
    assert torch.equal(third.model.coeff, whole.model.coeff)
    steps = [each["step"] for each in log_records(tmp_path / "log.jsonl") if each["group"] == "Step/TrainingPhase"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_auto_needs_a_folder() -> None:
    with pytest.raises(UsageError, match=r"resume='auto'\) continues from .* has no Checkpointer\. Add one"):
        tiny_learner().fit(1, resume="auto")


def test_checkpoints_of_another_run_are_noticed(tmp_path: Path) -> None:
    first = tiny_learner(Checkpointer(tmp_path), n_batches=1)
    first.fit(1)
    first.fit(1)
    second = tiny_learner(Checkpointer(tmp_path), n_batches=1)
    with pytest.warns(UserWarning, match=r"another run \(its latest is epoch-0002\.ckpt\).*resume='auto'"):
        second.fit(1)
    second.fit(1)
    third = tiny_learner(Checkpointer(tmp_path), n_batches=1)
    third.fit(3, resume=tmp_path)


def test_without_a_monitor_the_newest_stay(tmp_path: Path) -> None:
    tiny_learner(Checkpointer(tmp_path, 2, monitor=None), n_batches=1).fit(5)
    assert files(tmp_path) == ["4", "5"]
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_ranks_go_on_after_a_resumed_fit(stop: int, tmp_path: Path) -> None:
    scores = [3, 1, 2, 4]
    tiny_learner(scored(*scores), Checkpointer(tmp_path, 1, monitor="Score", mode="min"), n_batches=1).fit(stop)
    again = tiny_learner(scored(*scores[stop:]), Checkpointer(tmp_path, 1, monitor="Score", mode="min"), n_batches=1)
    again.fit(4, resume=tmp_path)
    assert (files(tmp_path), pointer(tmp_path, "best")) == (["2", "4"], "2")


def resume(source: Path, *checkpointers: Checkpointer, scores: list[float], epochs: int) -> None:
    """Resume from a folder, with the scores of the remaining epochs."""
    tiny_learner(scored(*scores), *checkpointers, n_batches=1).fit(epochs, resume=source)


def test_files_of_another_folder_do_not_count(tmp_path: Path) -> None:
    """The checkpoints in the folder that was resumed from stay; only files of the new folder are ranked for `best`."""
    a, b = tmp_path / "a", tmp_path / "b"
    tiny_learner(scored(1, 2, 3), Checkpointer(a, 3, monitor="Score", mode="min"), n_batches=1).fit(3)
    before = {each.name: each.read_bytes() for each in a.iterdir()}
    resume(a, Checkpointer(b, 3, monitor="Score", mode="min"), scores=[5, 4, 7, 6], epochs=7)
    assert (files(b), pointer(b, "latest"), pointer(b, "best")) == (["4", "5", "7"], "7", "5")
    assert {each.name: each.read_bytes() for each in a.iterdir()} == before
    resume(b, Checkpointer(b, 3, monitor="Score", mode="min"), scores=[4.5], epochs=8)
    assert (files(b), pointer(b, "latest"), pointer(b, "best")) == (["4", "5", "8"], "8", "5")


def test_files_of_another_run_in_the_folder_stay(tmp_path: Path) -> None:
    """Files of another run stay, even if they have the names of files in the folder of the resumed checkpoint."""
    a, b = tmp_path / "a", tmp_path / "b"
    tiny_learner(scored(1, 2), Checkpointer(a, 1, monitor="Score", mode="min"), n_batches=1).fit(2)
    b.mkdir()
    (b / "epoch-0001.ckpt").write_text("another run's")
    resume(a, Checkpointer(b, 1, monitor="Score", mode="min"), scores=[4, 3, 5], epochs=5)
    assert (files(b), pointer(b, "best")) == (["1", "4", "5"], "4")
    assert (b / "epoch-0001.ckpt").read_text() == "another run's"


@pytest.mark.parametrize("how", ["moved", "copied", "relative", "link"])
def test_files_of_this_folder_count_wherever_it_is_now(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "runs" / "a", tmp_path / "others" / "b"
    tiny_learner(scored(1, 2), Checkpointer(a, 1, monitor="Score", mode="min"), n_batches=1).fit(2)
    b.parent.mkdir()
    if how == "moved":
        a.rename(b)
    elif how == "copied":
        shutil.copytree(a, b)
    elif how == "relative":
        monkeypatch.chdir(tmp_path / "runs")
        b = Path("a")
    else:
        b.symlink_to(a)
    assert files(b) == ["1", "2"]
    resume(b, Checkpointer(b, 1, monitor="Score", mode="min"), scores=[3, 4], epochs=4)
    assert (files(b), pointer(b, "latest"), pointer(b, "best")) == (["1", "4"], "4", "1")


def test_two_checkpointers_go_on_in_their_own_folders(tmp_path: Path) -> None:
    """Each resumes in its own folder, even if both folders were moved and only one of them is named."""

    def both(place: Path) -> list[Checkpointer]:
        modes: list[tuple[str, Any]] = [("a", "min"), ("b", "max")]
        return [Checkpointer(place / name, 1, monitor="Score", mode=mode) for name, mode in modes]

    tiny_learner(scored(2, 1, 3), *both(tmp_path / "old"), n_batches=1).fit(3)
    (tmp_path / "old").rename(tmp_path / "new")
    a, b = tmp_path / "new" / "a", tmp_path / "new" / "b"
    resume(a, *both(tmp_path / "new"), scores=[1.5, 2.5], epochs=5)
    assert (files(a), pointer(a, "best")) == (["2", "5"], "2")
    assert (files(b), pointer(b, "best")) == (["3", "5"], "3")
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"mode": "max"}, False),
        ({"monitor": "Loss"}, False),
        ({"phase": TrainingPhase}, False),
        ({"phase": ValidationPhase}, True),
        ({"phase": AbstractValidationPhase}, True),
    ],
)
def test_files_that_another_metric_ranked_stay_and_do_not_count(
    other: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"keep_top_k": 1, "monitor": "Score", "mode": "min"}

    def metrics(*scores: float) -> Metrics:
        return scored(*(score for score in scores for _ in "tv"), phase=Phase)  # one of training, one of validation

    tiny_learner(metrics(1, 2, 3), Checkpointer(tmp_path, **options), n_batches=1).fit(3)
    assert files(tmp_path) == ["1", "3"]
    checkpointer = Checkpointer(tmp_path, **{**options, **other})
    tiny_learner(metrics(4, 5, 6), checkpointer, n_batches=1).fit(6, resume=tmp_path)
    assert pointer(tmp_path, "best") in (["1"] if same else ["4", "5", "6"])
    assert files(tmp_path) == (["1", "6"] if same else ["1", "3", *sorted({pointer(tmp_path, "best"), "6"})])


def test_files_that_were_removed_do_not_count(tmp_path: Path) -> None:
    tiny_learner(scored(1, 2, 3), Checkpointer(tmp_path, 2, monitor="Score", mode="min"), n_batches=1).fit(3)
    (tmp_path / "epoch-0001.ckpt").unlink()
    resume(tmp_path, Checkpointer(tmp_path, 2, monitor="Score", mode="min"), scores=[4, 1.5], epochs=5)
    assert (files(tmp_path), pointer(tmp_path, "best")) == (["2", "5"], "5")


def test_a_loaded_checkpoint_of_another_folder_does_not_count_either(tmp_path: Path) -> None:
    tiny_learner(scored(1), Checkpointer(tmp_path / "a", monitor="Score", mode="min"), n_batches=1).fit(1)
    learner = tiny_learner(scored(3, 2), Checkpointer(tmp_path / "b", 1, monitor="Score", mode="min"), n_batches=1)
    learner.load(tmp_path / "a" / "best")
    learner.fit(2)
    assert (files(tmp_path / "b"), pointer(tmp_path / "b", "best")) == (["3"], "3")


def test_steps_of_which_the_newest_stays(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path, every_steps=3), n_batches=4, data=tiny_batches(n_batches=4))
    seen: list[str] = []
    learner.loop.checkpoints.writer.reached = lambda point: seen.append(point) if point == "removed" else None
    learner.fit(2)
    assert files(tmp_path) == ["1", "2"]
    assert len(seen) == 5  # at the beginning, after batches 3 and 6, and after two epochs
    learner.fit(steps=1)
    assert sorted(each.name for each in tmp_path.glob("*.ckpt")) == [
        "epoch-0001.ckpt", "epoch-0002.ckpt", "epoch-0003.ckpt",
    ]  # fmt: skip


def test_outside_of_a_fit_no_file_is_written(tmp_path: Path) -> None:
    """A fit can resume from every checkpoint of the folder, so batches and epochs without a fit leave it as it is."""

    def made() -> Learner:
        return tiny_learner(Checkpointer(tmp_path, every_steps=1), n_batches=2)

    learner = made()
    learner.validate()
    learner.epoch(TrainingPhase)
    assert list(tmp_path.iterdir()) == []
    learner.fit(1)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    learner.epoch(TrainingPhase)
    learner.step(TrainingPhase, tiny_batches(n_batches=1)[0])
    learner.validate()
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    assert pointer(tmp_path, "latest") == "2"
    assert made().fit(3, resume="auto").rows[-1]["epoch"] == 4


class Masked(torch.nn.Module):
    """``y = coeff * x``, with further values that a test registers beside the parameter."""

    def __init__(self, **beside: torch.Tensor) -> None:
        super().__init__()
        self.coeff = torch.nn.Parameter(torch.zeros(()))
        for name, value in beside.items():
            if name == "frozen":
                self.frozen = torch.nn.Parameter(value, requires_grad=False)
            else:
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.coeff * x


INF = float("inf")
ONE: dict[str, Any] = {"keep_top_k": 1, "monitor": "Score", "mode": "min"}
BESIDE = {
    "attention mask": {"mask": torch.full((3, 3), -INF).triu(1)},
    "frozen": {"frozen": torch.tensor([0.0, -INF])},
    "nan": {"seen": torch.tensor([NAN, 1.0])},
    "integers": {"counts": torch.arange(3), "flags": torch.tensor([True, False])},
    "complex": {"turns": torch.tensor([complex(INF, NAN)])},
    "float8": {"scales": torch.ones(2).to(torch.float8_e4m3fn), "others": torch.ones(2).to(torch.float8_e5m2)},
}


@pytest.mark.cpu_only("the simulated device has no numbers of one byte")
@pytest.mark.parametrize("beside", BESIDE)
def test_rule_28_what_is_not_trained_may_be_infinite(beside: str, tmp_path: Path) -> None:
    """Rule 28: a checkpoint is finite if the trained parameters and the last loss are; other values do not count."""
    model = Masked(**BESIDE[beside])
    tiny_learner(scored(2, 1, 3), Checkpointer(tmp_path, **ONE), model=model, n_batches=1).fit(3)
    assert files(tmp_path) == ["2", "3"]
    assert (pointer(tmp_path, "best"), pointer(tmp_path, "latest")) == ("2", "3")
    resumed = tiny_learner(scored(5), model=Masked(**BESIDE[beside]), n_batches=1)
    with pytest.warns(UserWarning, match="has the state of Checkpointer"):
        resumed.fit(4, resume=tmp_path)
    for name, value in BESIDE[beside].items():
        assert torch.equal(torch.nan_to_num(getattr(resumed.model, name).to(torch.cfloat)),
                           torch.nan_to_num(value.to(torch.cfloat)))  # fmt: skip


def test_rule_28_an_infinite_state_of_the_optimizer_does_not_count(tmp_path: Path) -> None:
    optimizer = partial(torch.optim.Adam, lr=0.0)
    learner = tiny_learner(Checkpointer(tmp_path), n_batches=2, optimizer=optimizer)
    learner.fit(1)
    learner.optimizer.state[learner.model.coeff]["exp_avg_sq"].fill_(INF)
    learner.fit(1)
    assert pointer(tmp_path, "latest") == "2"


class Diverging(torch.nn.Module):
    """Mean squared error, made infinite in some validation epochs."""

    def __init__(self, *epochs: int, batches: int) -> None:
        super().__init__()
        self.epochs, self.batches, self.seen = epochs, batches, 0

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(outputs, targets)
        if self.training:
            return loss
        self.seen += 1
        return loss * INF if 1 + (self.seen - 1) // self.batches in self.epochs else loss


@pytest.mark.parametrize(
    ("options", "infinite", "scores", "kept", "best", "latest"),
    [
        # if epoch 3 were finite, it would remove the file of epoch 2, which then would be missing for good
        (ONE, [3], [1, 2, 3, 4], ["1", "4"], "1", "4"),
        (ONE, [3], [1, 2, 3], ["1", "2", "3"], "1", "2"),  # epoch 3 is the newest
        (ONE, [2, 3, 4], [1, 2, 3, 4], ["1", "4"], "1", "1"),
        (ONE, [2, 3, 4], [1, 2, 3, 4, 5], ["1", "5"], "1", "5"),
        # the epoch with the best score has infinite weights, so its file cannot be the best
        ({"keep_top_k": 2, "monitor": "Score", "mode": "max"}, [2], [1, 9, 3, 2, 1], ["3", "4", "5"], "3", "5"),
        ({"keep_top_k": 1, "monitor": None}, [2], [0, 0, 0], ["3"], "", "3"),
        ({"keep_top_k": 1}, [2], [0, 0, 0], ["3"], "3", "3"),
        ({}, [2], [0, 0, 0], ["1", "2", "3"], "3", "3"),
    ],
)
def test_an_epoch_that_is_not_finite_leaves_nothing_behind(
    options: dict[str, Any], infinite: list[int], scores: list[float], kept: list[str], best: str, latest: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    learner = tiny_learner(
        scored(*scores), Checkpointer(tmp_path, **options), n_batches=1, lossfn=Diverging(*infinite, batches=1)
    )
    with pytest.warns(RuntimeWarning, match="holds values that are not finite"):
        learner.fit(len(scores))
    assert files(tmp_path) == kept
    assert pointer(tmp_path, "latest") == latest
    assert (pointer(tmp_path, "best") if best else "") == best


def test_a_resumed_run_removes_what_was_not_finite_before_it(tmp_path: Path) -> None:
    def learner() -> Learner:
        loss = Diverging(2, batches=2)  # the epochs are counted further
        return tiny_learner(Checkpointer(tmp_path, 1, every_steps=3), n_batches=2, lossfn=loss)

    with pytest.warns(RuntimeWarning, match="not finite"):
        learner().fit(2)
    assert files(tmp_path) == ["1", "2", "step-00000003"]
    with pytest.warns(RuntimeWarning, match="not finite"):
        learner().fit(3, resume=tmp_path)
    assert files(tmp_path) == ["3"]


@pytest.mark.parametrize(
    ("phases", "phase", "counted"),
    [
        ([TrainingPhase], None, TrainingPhase),
        ([TrainingPhase, ValidationPhase], None, ValidationPhase),
        ([ValidationPhase, TrainingPhase], None, ValidationPhase),
        ([TrainingPhase, ValidationPhase, OODPhase], None, OODPhase),
        ([TrainingPhase, ValidationPhase, OODPhase], TrainingPhase, TrainingPhase),
        ([TrainingPhase, ValidationPhase, OODPhase], AbstractValidationPhase, OODPhase),
    ],
)
def test_whose_epochs_count(
    phases: list[type[Phase]], phase: type[Phase] | None, counted: type[Phase], tmp_path: Path
) -> None:
    data = {each: tiny_batches(n_batches=1) for each in phases}
    callback = Checkpointer(tmp_path, phase=phase)
    tiny_learner(callback, data=data).fit(1)
    # An evaluation before the first training epoch counts as epoch 0.
    name = "epoch-0000.ckpt" if phases[0] is ValidationPhase else "epoch-0001.ckpt"
    done = torch.load(tmp_path / name, weights_only=True)["position"]["done"]
    assert done[-1] == counted.__name__
    assert callback.state_dict()["files"][0][0] == name


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_at_the_same_event_loses_nothing(first: bool, tmp_path: Path) -> None:
    """Rule 15: the other handlers of the event run, and the checkpoint that they requested is written."""
    stops, saves = (
        EarlyStopping(patience=1, monitor="Score", mode="min"),
        Checkpointer(tmp_path, monitor="Score", mode="min"),
    )
    callbacks = [stops, saves] if first else [saves, stops]
    learner = tiny_learner(scored(1, 2, 3, 4), *callbacks, n_batches=1)
    learner.fit(4)
    assert learner.stopped is not None
    epochs = learner.cbstate.history[TrainingPhase].epochs
    assert epochs < 4
    assert files(tmp_path) == [str(number) for number in range(1, epochs + 1)]


def test_an_epoch_without_a_completed_batch_is_the_worst(tmp_path: Path) -> None:
    class Skips(Callback):
        @on(EpochBegin, ValidationPhase)
        def skip(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            raise CancelEpochException("not today")

    tiny_learner(Skips(), Checkpointer(tmp_path), n_batches=1).fit(2)
    assert files(tmp_path) == ["1", "2"]
    assert not (tmp_path / "best").exists()


# --- errors for bad arguments


def test_an_unknown_monitor_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(MissingStateError, match=r"cbstate\.metrics_epoch\.Los, .* there is Loss"):
        tiny_learner(Checkpointer(tmp_path, monitor="Los"))
    wrong = Checkpointer(tmp_path, monitor="Score", mode="min", phase=ValidationPhase)
    learner = tiny_learner(scored(*range(99), phase=TrainingPhase), wrong, n_batches=1)
    with pytest.raises(UsageError, match=r"^Checkpointer needs 'Score' of ValidationPhase, and nothing .*; it is"):
        learner.fit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="modes of folders")
def test_a_folder_that_cannot_be_written_stops_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran: list[str] = []

    class Watch(Callback):
        @on(EpochBegin)
        def note(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            ran.append("epoch")

    learner = tiny_learner(Checkpointer(tmp_path / "file" / "run"), Watch())
    with pytest.raises(CheckpointError, match=r"^Checkpointer cannot write into the folder .*run: .*Not a directory"):
        learner.fit(1)
    assert ran == []


def test_a_phase_that_the_data_does_not_have(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path, phase=OODPhase))
    with pytest.raises(UsageError, match=r"^Checkpointer watches OODPhase, which the data does not have"):
        learner.fit(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": ""}, r"folder=''\): folder is a path, such as 'runs/a'\."),
        ({"folder": 3}, r"folder=3\): folder is a path, such as 'runs/a'\."),
        ({"keep_top_k": 0}, r"Checkpointer\(\): keep_top_k is a whole number, at least 1, got 0\."),
        ({"every_steps": True}, r"Checkpointer\(\): every_steps is a whole number, at least 1, got True\."),
        ({"every": 0}, r"Checkpointer\(\): every is a whole number, at least 1, got 0\."),
        ({"monitor": "a."}, r"monitor='a\.'\): monitor is the name of a metric, such as 'Loss'\."),
        ({"phase": "train"}, r"phase='train'\) is no phase type\. Write phase=ValidationPhase\."),
        ({"mode": "best"}, r"mode='best'\): mode is 'min' if small values of Loss are good, otherwise 'max'\."),
        ({"restore_best": 1}, r"restore_best=1\): restore_best is True or False\."),
        ({"restore_best": True, "monitor": None}, r"without a monitor no epoch is the best\. Name the metric"),
        ({"weights": "onnx"}, r'weights=\'onnx\'\): weights is "safetensors", or None for no such file\.'),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Checkpointer(**dict[str, Any]({"folder": "unused", **options}))


def test_safetensors_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None: ...

    monkeypatch.setattr("importlib.util.find_spec", absent)
    with pytest.raises(CheckpointError, match=r"needs safetensors, .*pip install 'flowtrain\[safetensors\]'"):
        Checkpointer("unused", weights="safetensors")


# --- its declarations


def test_its_declaration_is_minimal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = record_access(Checkpointer(tmp_path, every_steps=1))
    capsys.readouterr()
    handlers = [handler for _, handler in Checkpointer(".", every_steps=1).handlers()]
    declared = {handler.attribute: dict(declare(handler.access or {}, "")) for handler in handlers}
    assert {name: dict(access) for name, access in found.handlers.items()} == declared


def test_equal_results_under_every_executor(tmp_path: Path) -> None:
    def make(executor: Executor) -> Learner:
        return tiny_learner(Checkpointer(tmp_path, keep_top_k=1), executor=executor)

    assert_equivalent(make)


# --- with a log


def test_rule_28_the_log_of_a_resumed_run_is_that_of_the_run(tmp_path: Path) -> None:
    """Rules 25 and 28: a resumed fit removes log records from after the checkpoint, so none appears twice."""

    def run(name: str, failing: int = 0) -> Any:
        class Fails(Callback):
            epochs = 0

            @on(EpochBegin, TrainingPhase)
            def fail(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
                self.epochs += 1
                if self.epochs == failing:
                    raise Stopped

        log = LogMetrics(JsonlBackend(tmp_path / f"{name}.jsonl"))
        return tiny_learner(log, Checkpointer(tmp_path / name, every=2), Fails(), n_batches=3)

    run("whole").fit(6)
    with pytest.raises(Stopped):
        run("part", failing=4).fit(6)
    run("part").fit(6, resume=tmp_path / "part")

    def lines(name: str) -> list[dict[str, Any]]:
        read = log_records(tmp_path / f"{name}.jsonl")
        return [{key: value for key, value in each.items() if key != "run"} for each in read]

    assert len(lines("whole")) > 20
    assert lines("part") == lines("whole")


class Stopped(Exception):
    """Ends the run that the test then resumes."""


def test_two_in_one_folder_are_refused_before_training(tmp_path: Path) -> None:
    """Under any spelling of the path: each would remove files that the other keeps, and both would write `best`."""
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for other in (tmp_path / "kept" / ".." / "kept", tmp_path / "link"):
        learner = tiny_learner(Checkpointer(tmp_path / "kept"), Checkpointer(other, monitor=None, keep_top_k=1))
        with pytest.raises(UsageError, match=r"Checkpointer and Checkpointer#2 both keep .* a folder of its own"):
            learner.fit(1)
        assert not (tmp_path / "kept").exists()
    apart = tiny_learner(Checkpointer(tmp_path / "one"), Checkpointer(tmp_path / "two"))
    apart.fit(1)
    assert (tmp_path / "two" / "latest").read_text() == "epoch-0001.ckpt\n"


def test_a_clock_decides_on_no_checkpoint_of_several_ranks(tmp_path: Path) -> None:
    learner = tiny_learner(throttle(Checkpointer(tmp_path, every_steps=1), BatchEnd, seconds=600))
    learner.state.world_size = 2
    with pytest.raises(RankError) as raised:
        learner.fit(1)
    assert str(raised.value) == (
        "throttle(Checkpointer, BatchEnd, seconds=600) depends on a clock, and all 2 ranks take part in a checkpoint: "
        "where their clocks disagree, one would wait for the others for ever. Count batches instead: "
        "Checkpointer(..., every_steps=1000)."
    )
