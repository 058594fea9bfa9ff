"""The learner on which a trial run works: copies of the model, first batches, and random numbers that are restored."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    UsageError,
    Write,
    find_learning_rate,
    on,
    seed_everything,
)
from flowtrain.callbacks import Checkpointer, Metrics, MetricsPrinter, Recorder, throttle
from flowtrain.diagnostics.scratch_learner import copies, first_batches, same_rng
from flowtrain.testing import record_access, tiny_batches, tiny_learner
from tests.support.loaders import end_workers

TRIALS: dict[str, Callable[[Learner], object]] = {
    "learner.suggest_access()": lambda learner: learner.suggest_access(Recorder()),
    "learner.dry_run()": lambda learner: learner.dry_run(),
    "learner.audit_syncs()": lambda learner: learner.audit_syncs(),
}


@pytest.mark.parametrize("call", TRIALS)
def test_bad_data_is_refused_before_a_batch_is_used_up(call: str) -> None:
    with pytest.raises(UsageError) as raised:
        TRIALS[call](tiny_learner(data=None))
    assert str(raised.value) == f"{call} needs a batch of data. Pass data= to Learner."
    batches = iter([(torch.ones(2, 1), torch.ones(2, 1))])
    with pytest.raises(UsageError) as raised:
        TRIALS[call](tiny_learner(data=batches))
    assert str(raised.value) == (
        f"The data for TrainingPhase is an iterator: {call} would use up its first batch. Pass a list, a DataLoader, "
        f"or anything that can be iterated again."
    )
    assert len(list(batches)) == 1
    with open(__file__) as file:
        with pytest.raises(TypeError) as refused:  # versions of Python say it in different words
            copy.deepcopy(file)
        with pytest.raises(UsageError) as raised:
            TRIALS[call](tiny_learner(data=[(torch.ones(2, 1), file)]))
    assert str(raised.value) == (
        f"{call} works on copies, and the first batch of TrainingPhase cannot be copied: TypeError: {refused.value}. "
        f"Let the loader give tensors and plain values."
    )


class HasFile(Recorder):
    """A callback that cannot be copied."""

    def __init__(self, file: Any) -> None:
        self.file = file


TRIALS_OF_CALLBACKS: dict[str, Callable[[Callback], object]] = {
    "learner.suggest_access()": lambda callback: tiny_learner().suggest_access(callback),
    "record_access()": record_access,
    "learner.dry_run()": lambda callback: tiny_learner(callback).dry_run(),
    "learner.audit_syncs()": lambda callback: tiny_learner(callback).audit_syncs(),
    "find_learning_rate()": lambda callback: find_learning_rate(tiny_learner(callback)),
}


@pytest.mark.parametrize("call", TRIALS_OF_CALLBACKS)
def test_an_object_that_cannot_be_copied_is_named_with_the_call_of_the_user(call: str) -> None:
    with open(__file__) as file, pytest.raises(UsageError) as raised:
        TRIALS_OF_CALLBACKS[call](HasFile(file))
    assert str(raised.value).startswith(
        f"{call} works on copies, and an object of the learner cannot be copied: TypeError: cannot pickle"
    )


class Holds(Callback):
    """A callback that shares an object with another callback."""

    def __init__(self, shared: object) -> None:
        self.shared = shared


class Writes(Holds):
    """A callback that others may need, because it writes an entry."""

    def state_access(self) -> Access:
        return {"cbstate.made": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.made = self.shared


def test_copies_share_what_the_originals_share_and_leave_out_who_only_looks() -> None:
    shared = [1]
    subject = Holds(shared)
    learner = tiny_learner(Writes(shared), subject, MetricsPrinter())
    copy, model, _, _, others = copies(learner, subject, "learner.suggest_access()")
    assert (type(copy), model is learner.model) == (Holds, False)
    assert torch.equal(model.coeff, learner.model.coeff)
    assert [type(other) for other in others] == [Writes, Recorder, Metrics]
    assert vars(others[0])["shared"] is vars(copy)["shared"] is not shared


def test_the_first_batch_of_every_loader() -> None:
    data = tiny_learner(data=(tiny_batches(n_batches=3), tiny_batches(n_batches=2))).data
    found = first_batches(data, "learner.dry_run()")
    assert [(phase, len(batches)) for phase, batches in found.items()] == [(phase, 1) for phase in data]
    for phase, [(x, y)] in found.items():
        first = data[phase][0]
        assert torch.equal(x, first[0])
        assert torch.equal(y, first[1])
        assert x is not first[0], "a handler may write into it"


def test_a_generator_of_a_loader_does_not_move() -> None:
    generator = torch.Generator().manual_seed(3)
    dataset = torch.utils.data.TensorDataset(torch.arange(8.0)[:, None], torch.arange(8.0)[:, None])
    loader = torch.utils.data.DataLoader(dataset, 2, shuffle=True, generator=generator)
    before = generator.get_state()
    tiny_learner(data=loader).suggest_access(Recorder())
    assert torch.equal(generator.get_state(), before)


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(numpy.random.rand())


def test_random_numbers_come_back_also_after_an_error() -> None:
    drawn: list[tuple[float, float, float]] = []

    def fail() -> None:
        with same_rng():
            drawn.append(draw())
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fail()
    assert draw() == drawn[0]


CALLS: dict[str, Callable[[Learner], object]] = {
    "suggest_access": lambda learner: learner.suggest_access(Recorder()),
    "audit_syncs": Learner.audit_syncs,
    "dry_run": Learner.dry_run,
    "find_learning_rate": lambda learner: find_learning_rate(learner, updates=4),
}


@pytest.mark.parametrize("call", CALLS)
def test_workers_that_stay_are_started_by_the_fit(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Starting persistent workers draws a number, which the first pass of the fit draws."""

    def fit(*before: Callable[[Learner], object]) -> list[Any]:
        seed_everything(0)
        x, y = map(torch.cat, zip(*tiny_batches(n_batches=2), strict=True))
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True,
            multiprocessing_context="forkserver",
        )  # fmt: skip
        learner = tiny_learner(data=loader)
        for each in before:
            each(learner)
        learner.fit(2)
        end_workers([loader])
        return [list(learner.cbstate.metrics_step[TrainingPhase]["Loss"]), draw()]

    assert fit(CALLS[call]) == fit()
    capsys.readouterr()


class Saves(Callback):
    """Requests a checkpoint and writes the batch, so that also a sweep of learning rates runs a copy of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def state_access(self) -> Access:
        return {"batch.mine": Write(), "batch.grad_norm": Read()}

    @on(BatchEnd, TrainingPhase)
    def save(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.mine = learner.batch.grad_norm
        learner.request_checkpoint(self.path)


ALL_TRIALS: dict[str, Callable[[Learner, Callback], object]] = {
    "dry_run": lambda learner, callback: learner.dry_run(),
    "suggest_access": lambda learner, callback: learner.suggest_access(callback),
    "audit_syncs": lambda learner, callback: learner.audit_syncs(),
    "find_learning_rate": lambda learner, callback: find_learning_rate(learner, updates=4),
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("of", [Checkpointer, Saves])
@pytest.mark.parametrize("trial", ALL_TRIALS)
def test_no_file_of_a_finished_fit_changes(trial: str, of: type[Checkpointer | Saves], tmp_path: Path) -> None:
    learner = tiny_learner(
        Checkpointer(tmp_path / "kept", keep_top_k=1, every_steps=2), Saves(tmp_path / "own" / "a.ckpt"), n_batches=4
    )
    learner.fit(3)
    # The unfinished file of another process, which a Checkpointer removes when a fit begins.
    (tmp_path / "kept" / ".epoch-0009.ckpt.tmp").write_bytes(b"half")
    before = content(tmp_path)
    assert {"kept/best", "kept/latest", "kept/epoch-0003.ckpt", "own/a.ckpt"} <= before.keys()
    subject = Checkpointer(tmp_path / "kept") if of is Checkpointer else Saves(tmp_path / "own" / "a.ckpt")
    ALL_TRIALS[trial](learner, subject)
    learner.flush()
    assert content(tmp_path) == before
    other = tiny_learner(Checkpointer(tmp_path / "kept"), Saves(tmp_path / "b.ckpt"), n_batches=4)
    other.load(tmp_path / "kept")
    assert other.cbstate.history[TrainingPhase].epochs == 3


class OwnConstructor(Learner):
    """A learner whose constructor takes other arguments, and which keeps the learners of its trial runs."""

    def __init__(self, width: int, *callbacks: Callback) -> None:
        loss = torch.nn.functional.mse_loss
        model = torch.nn.Linear(1, width)
        core = TorchCore(device="cpu")
        super().__init__(model, loss, data=tiny_batches(2), callbacks=callbacks, default_callbacks="quiet", core=core)
        self.made: list[Learner] = []

    def __scratch__(self, model: Any, lossfn: Any, **parts: Any) -> Learner:
        self.made.append(super().__scratch__(model, lossfn, **parts))
        return self.made[-1]


@pytest.mark.parametrize("trial", ALL_TRIALS)
def test_a_subclass_may_have_a_constructor_of_its_own_and_the_trial_closes_its_learner(trial: str) -> None:
    learner = OwnConstructor(1)
    ALL_TRIALS[trial](learner, Recorder())
    assert [type(each) for each in learner.made] == [Learner]
    assert learner.made[0].closed


class Fails(Callback):
    def state_access(self) -> Access:
        return {"batch.mine": Write()}

    @on(BatchEnd, TrainingPhase)
    def fail(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.mine = 1
        raise ValueError("on purpose")


@pytest.mark.parametrize("trial", ALL_TRIALS)
def test_the_learner_of_a_trial_that_fails_is_closed_too(trial: str) -> None:
    learner = OwnConstructor(1, Fails())
    if trial == "suggest_access":
        ALL_TRIALS[trial](learner, Fails())
    else:
        with pytest.raises(ValueError, match="on purpose"):
            ALL_TRIALS[trial](learner, Fails())
    assert learner.made[0].closed


class Waits(Callback):
    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(EpochEnd, TrainingPhase)
    def wait(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.loss.item()


class ReadsNorm(Callback):
    def state_access(self) -> Access:
        return {"batch.grad_norm": Read(), "batch.mine": Write()}

    @on(UpdateEnd)
    def read(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        learner.batch.mine = learner.batch.grad_norm


@pytest.mark.parametrize("trial", ALL_TRIALS)
def test_a_trial_computes_the_norm_of_the_gradients(trial: str) -> None:
    ALL_TRIALS[trial](tiny_learner(ReadsNorm()), ReadsNorm())


def test_throttled_callbacks_are_audited_too(capsys: pytest.CaptureFixture[str]) -> None:
    learner = tiny_learner(throttle(Waits(), EpochEnd, every=100))
    [sync] = learner.audit_syncs()
    assert (sync.where, sync.operation) == ("Waits.wait", ".item()")
