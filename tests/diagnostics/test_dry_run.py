"""The dry run: every handler runs once on copies, its time is told, and nothing of the learner changes."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    Access,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelFittingException,
    EpochEnd,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
    seed_everything,
)
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    EarlyStopping,
    GradNorm,
    LearningRate,
    LogHistograms,
    LogMetrics,
    Scheduler,
    one_cycle,
    throttle,
)
from flowtrain.diagnostics.dry_run import DryRun, HandlerTime
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_batches, tiny_learner


class Busy(Callback):
    """Changes all that a handler can change, and prints."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def state_access(self) -> Access:
        return {"batch.inputs": Write(), "model": Write(), "cbstate.mine": Write(), "resource.rng": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.mine = 0

    @on(BatchBegin, TrainingPhase)
    def begin(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.called.append("begin")
        print("printed by Busy")
        learner.batch.inputs.add_(1)
        learner.model.coeff.data.fill_(9.0)
        learner.cbstate.mine += 1
        self.drawn = (torch.rand(1), random.random(), np.random.rand())
        learner.request_checkpoint("never-written.ckpt")

    @on(BatchCancelled, access={})
    def cancelled(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        self.called.append("cancelled")


def shuffled() -> Any:
    x, y = tiny_batches(n_batches=1, batch_size=12)[0]
    return DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=torch.Generator().manual_seed(5))


def full(folder: Path, *callbacks: Callback, **options: Any) -> Learner:
    log = JsonlBackend(folder / "log.jsonl")
    return tiny_learner(
        *callbacks,
        Scheduler({LearningRate: one_cycle(0.1)}),
        LogMetrics(log),
        LogHistograms(log, every=100),
        GradNorm(),
        EMA(0.9),
        EarlyStopping(patience=2),
        Checkpointer(folder / "checkpoints", every_steps=50),
        **options,
    )


def test_nothing_of_the_learner_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The same training follows as without the dry run, from the same batches and random numbers."""
    monkeypatch.chdir(tmp_path)
    results: list[Any] = []
    for tries in (0, 2):
        seed_everything(1)
        batches, folder = tiny_batches(n_batches=3), tmp_path / str(tries)
        busy = Busy()
        learner = full(folder, busy, data=(shuffled(), batches), default_callbacks=True)
        for _ in range(tries):
            learner.dry_run()
        assert capsys.readouterr().out == ""
        assert (busy.called, learner.cbstate.mine, learner.model.coeff.item()) == ([], 0, 0.0)
        assert not list(folder.glob("**/*")), "no file is written"
        assert not list(learner.cbstate.metrics_epoch[TrainingPhase])
        assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, tiny_batches(n_batches=3), strict=True))
        learner.fit(2)
        log = [re.sub(r'"time": [^,}]+', "", line) for line in (folder / "log.jsonl").read_text().splitlines()]
        capsys.readouterr()
        results.append((log, learner.model.coeff.item(), torch.rand(1), random.random(), np.random.rand()))
    assert len(results[0][0]) > 10
    assert results[0] == results[1]
    assert (tmp_path / "never-written.ckpt").exists(), "the fits have written it, so the dry run would have too"


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_every_handler_is_in_the_table_once(executor: str, tmp_path: Path) -> None:
    with full(tmp_path, Busy(), executor=executor) as learner:
        found = learner.dry_run()
        handlers = {
            f"{node.name}.{handler.attribute}" for node in learner.callbacks.nodes for _, handler in node.handlers
        }
    reached = [each.handler for each in found]
    assert handlers == {*reached, *found.idle}
    assert {"Scheduler.set_values", "GradNorm.record", "EMA.swap_in", "EarlyStopping.judge"} & set(reached)
    assert any(name.startswith("LogHistograms.") for name in reached), "a throttled handler runs too"
    assert "Busy.cancelled" in found.idle
    assert len({(each.event, each.phase, each.handler) for each in found}) == len(found)
    assert all(each.milliseconds >= 0 for each in found)
    assert found.stopped is None


def test_its_text_is_a_table() -> None:
    found = DryRun(
        [
            HandlerTime("BatchEnd", "TrainingPhase", "Recorder.count", 0.0123),
            HandlerTime("FitEnd", "Phase", "Plot.draw", 1234.5),
        ]
    )
    found.idle = ("Plot.cancelled",)
    found.stopped = CancelFittingException("flat")
    assert repr(found) == (
        "event     phase          handler         milliseconds\n"
        "BatchEnd  TrainingPhase  Recorder.count         0.012\n"
        "FitEnd    Phase          Plot.draw           1234.500\n"
        "A handler ended the dry run: CancelFittingException: flat\n"
        "Not reached: Plot.cancelled."
    )


class Fails(Callback):
    """Raises at the end of a validation batch."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @on(BatchEnd, ValidationPhase)
    def fail(self, event: BatchEnd, phase: ValidationPhase, learner: LearnerView) -> None:
        raise self.error


def test_an_error_of_a_handler_comes_out_with_its_place() -> None:
    learner = tiny_learner(throttle(Fails(KeyError("gone")), BatchEnd, every=100))
    with pytest.raises(KeyError, match="gone") as caught:
        learner.dry_run()
    place, copies = caught.value.__notes__
    assert place == "raised in Fails.fail at (BatchEnd, ValidationPhase), epoch 1, batch 1"
    assert copies == "raised in a dry run, on copies: the learner has not changed"
    assert learner.model.coeff == 0
    learner.fit(1)  # the handler of the learner is still throttled


def test_a_cancel_ends_it_and_is_told() -> None:
    found = tiny_learner(Fails(CancelFittingException("enough"))).dry_run()
    assert isinstance(found.stopped, CancelFittingException)
    assert "A handler ended the dry run: CancelFittingException: enough" in repr(found)
    assert [each for each in found if each.event == "FitEnd"] == []  # no default callback has a handler there
    assert "Recorder.end_epoch" in [each.handler for each in found], "training was complete"


def test_where_it_cannot_run() -> None:
    with pytest.raises(UsageError, match=r"learner\.dry_run\(\) needs a batch of data"):
        tiny_learner(data=None).dry_run()
    with pytest.raises(UsageError, match=r"TrainingPhase is an iterator: learner\.dry_run\(\) would use up"):
        tiny_learner(data=iter(tiny_batches())).dry_run()
    with pytest.raises(UsageError, match="works on copies, and the first batch of TrainingPhase cannot be copied"):
        tiny_learner(data=[Uncopied()]).dry_run()
    learner = tiny_learner()
    learner.close()
    with pytest.raises(Exception, match="dry_run\\(\\) on a closed learner"):
        learner.dry_run()


class Uncopied:
    """A batch that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies of this")


def test_it_is_refused_within_a_handler() -> None:
    class Nested(Callback):
        @on(EpochEnd, TrainingPhase)
        def run(self, event: EpochEnd, phase: TrainingPhase, view: LearnerView) -> None:
            learner.dry_run()

    learner = tiny_learner(Nested())
    with pytest.raises(UsageError, match="dry_run\\(\\)"):
        learner.fit(1)


class Late(Callback):
    """Reads an entry that no batch of the dry run has."""

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(FitEnd)
    def last(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        assert learner.batch.loss is not None


def test_the_end_of_the_fit_is_reached() -> None:
    found = tiny_learner(Late(), data=tiny_batches()).dry_run()
    assert ("FitEnd", "Phase", "Late.last") in [(each.event, each.phase, each.handler) for each in found]
