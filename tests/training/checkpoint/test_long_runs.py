"""Long runs: a checkpoint costs the training thread what is new, and histories can be kept short."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain import (
    BatchEnd,
    Callback,
    CancelFittingException,
    Learner,
    LearnerView,
    Read,
    TrainingPhase,
    on,
)
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    LearningRate,
    LogMetrics,
    LogTraces,
    Metrics,
    Scheduler,
    SmoothLoss,
    Traces,
    one_cycle,
)
from flowtrain.logging import JsonlBackend
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint.reading import read
from flowtrain_dask import DaskExecutor
from tests.support.logs import log_records

# --- the cost of a checkpoint

WAIT = 20  # the calls of waiting for the writer of the checkpoint before, which may have ended


def calls_of(learner: Learner) -> list[int]:
    """Return a list that gets the number of calls that each checkpoint makes on the training thread."""
    found: list[int] = []
    inside: Any = learner.loop.checkpoints
    gather: Callable[[bool], dict[str, Any]] = inside._gather

    def counted(judged: bool) -> dict[str, Any]:
        found.append(0)

        def count(frame: Any, event: str, argument: Any) -> None:
            found[-1] += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            return gather(judged)
        finally:
            sys.setprofile(before)

    inside._gather = counted
    return found


def test_a_checkpoint_makes_as_many_calls_late_in_a_run_as_early(tmp_path: Path) -> None:
    """In one epoch of many batches, with a metric whose values are whole numbers, and with the ends of many epochs."""

    def right(outputs: torch.Tensor, targets: torch.Tensor) -> int:
        return int((outputs > targets).sum())

    batches = [(torch.full((8, 1), 0.5), torch.full((8, 1), 1.5))] * 2000
    learner = tiny_learner(
        Metrics(mean_absolute_error, right),
        Scheduler({LearningRate: 1e-3}),
        SmoothLoss(),
        Traces({"Bias": lambda learner: 0.5}, TrainingPhase),
        Checkpointer(tmp_path, every_steps=500),
        data=batches,
    )
    calls = calls_of(learner)
    learner.fit(1)
    _, first, *others, last, end = calls
    assert len(others) == 2
    assert max(*others, last) <= first + WAIT  # the first one imports modules
    assert end < first  # the values of the epoch have been added up
    short = tiny_learner(Checkpointer(tmp_path / "epochs", keep_top_k=1), n_batches=1)
    calls = calls_of(short)
    short.fit(40)
    assert abs(calls[20] - calls[40]) <= WAIT


# --- histories that are kept short


def train(folder: Path, keep: int | None, *, executor: Any = "serial", stop: int | None = None, **fit: Any) -> Learner:
    """Train three epochs of 16 batches with every callback that records a value for each batch."""

    def end(learner: Any) -> None:
        count.append(1)
        if len(count) == stop:
            raise CancelFittingException

    count: list[int] = []
    log = JsonlBackend(folder / "log.jsonl", append=True)
    with tiny_learner(
        Metrics(mean_absolute_error, keep=keep),
        Scheduler({LearningRate: one_cycle(0.1)}, keep=keep),
        SmoothLoss(keep=keep),
        Traces({"Square": lambda learner: learner.batch.loss**2}, TrainingPhase, keep=keep),
        LogMetrics(log),
        LogTraces(log),
        Checkpointer(folder / "checkpoints", every_steps=7),
        CustomCallback(end, BatchEnd, TrainingPhase),
        executor=executor,
    ) as learner:
        learner.fit(3, **fit)
    return learner


def histories(learner: Learner) -> dict[str, Any]:
    """Return all series of a learner, each with the number of values that it has dropped."""
    cbstate = learner.cbstate
    found: dict[str, Any] = {"hyperparams": cbstate.hyperparams["LearningRate"]}
    for entry in ("metrics_step", "metrics_epoch", "tracehistory"):
        for phase, by_name in getattr(cbstate, entry).items():
            found |= {f"{entry} {phase} {name}": series for name, series in by_name.items()}
    found["smooth_loss"] = cbstate.smooth_loss[TrainingPhase]
    return {name: (series.dropped, list(series)) for name, series in found.items()}


@pytest.mark.parametrize("keep", [1, 5, 16])
@pytest.mark.parametrize("executor", ["serial", "deferred"])
def test_means_and_logs_do_not_depend_on_how_much_is_kept(executor: str, keep: int, tmp_path: Path) -> None:
    used = DaskExecutor(defer="always") if executor == "deferred" else executor
    whole, short = train(tmp_path / "a", None), train(tmp_path / "b", keep, executor=used)
    every, kept = histories(whole), histories(short)
    assert every.keys() == kept.keys()
    for name, (dropped, pairs) in kept.items():
        assert pairs == every[name][1][dropped:]
        if "metrics_epoch" in name:
            assert dropped == 0
        else:
            assert keep <= len(pairs) < 2 * keep
    logs = [log_records(tmp_path / folder / "log.jsonl") for folder in "ab"]
    assert sorted(map(repr, logs[0])) == sorted(map(repr, logs[1]))
    assert len(logs[0]) > 48 * 3


@pytest.mark.parametrize("stop", [7, 20, 21, 33])
def test_a_resumed_run_keeps_the_same_values(stop: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "a", 5)
    train(tmp_path / "b", 5, stop=stop)
    resumed = train(tmp_path / "b", 5, resume="auto")
    assert histories(resumed) == histories(whole)
    assert log_records(tmp_path / "a" / "log.jsonl") == log_records(tmp_path / "b" / "log.jsonl")


def test_checkpoints_of_a_short_history_stay_small(tmp_path: Path) -> None:
    batches = [(torch.ones(1, 1), torch.ones(1, 1))]

    def size(keep: int | None, epochs: int) -> int:
        folder = tmp_path / f"{keep}-{epochs}"
        data = {TrainingPhase: batches * 400}
        tiny_learner(Metrics(keep=keep), Checkpointer(folder, every=epochs), data=data).fit(epochs)
        return (folder / f"epoch-{epochs:04d}.ckpt").stat().st_size

    assert size(100, 4) - size(100, 1) < 500
    assert size(None, 4) - size(None, 1) > 1200 * 16


def test_the_next_checkpoint_is_copied_when_the_one_before_is_written(tmp_path: Path) -> None:
    """It is copied into the same memory; each file has the state of its own moment."""

    class Asks(Callback):
        may_checkpoint = True
        seen: list[torch.Tensor] = []  # noqa: RUF012  # of this test alone

        @on(BatchEnd, TrainingPhase, access={"params": Read()})
        def ask(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            self.seen.append(learner.params["0.weight"].detach().clone())
            learner.request_checkpoint(tmp_path / f"{len(self.seen)}.ckpt")

    points: list[str] = []
    model = torch.nn.Sequential(torch.nn.Linear(1, 20_000), torch.nn.Linear(20_000, 1))
    learner = tiny_learner(Asks(), model=model, n_batches=4, optimizer=partial(torch.optim.SGD, lr=1e-5))
    inside: Any = learner.loop.checkpoints
    gather = inside._buffers.begin

    def begun() -> None:
        points.append("copy")
        gather()

    inside._buffers.begin, inside.writer.reached = begun, points.append
    learner.fit(1)
    assert [point for point in points if point in ("copy", "removed")] == ["copy", "removed"] * 4
    assert len(Asks.seen) == 4
    for number, weight in enumerate(Asks.seen, start=1):
        assert torch.equal(read(tmp_path / f"{number}.ckpt")["model"][""]["0.weight"], weight)


def test_the_memory_of_a_load_is_the_checkpoint_and_one_copy_of_the_state(tmp_path: Path) -> None:
    """The weights are counted that are cloned on the way: a save makes one copy, and a load one, for the way back."""

    class Counts(TorchDispatchMode):
        """Counts the bytes of large tensors that are made."""

        made = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            made = str(function).split(".")[1] in ("_to_copy", "clone", "empty", "empty_like", "empty_strided")
            Counts.made += found.nbytes if made and found.nbytes > 1000 else 0
            return found

    model = torch.nn.Sequential(torch.nn.Linear(1, 20_000), torch.nn.Linear(20_000, 1))
    size = sum(param.nbytes for param in model.parameters() if param.nbytes > 1000)
    learner = tiny_learner(Checkpointer(tmp_path), model=model, n_batches=1)
    learner.fit(1)
    inside: Any = learner.loop.checkpoints
    counts = Counts()  # type: ignore[no-untyped-call]  # torch's class has no annotations
    with counts:
        contents = inside._gather(False)
    assert Counts.made == size
    del contents
    Counts.made = 0
    with counts:
        inside._gather(False)  # into the memory of the one before
    assert Counts.made == 0
    with counts:
        learner.load(tmp_path)
    assert Counts.made == size
    Counts.made = 0
    with counts:
        inside.resume(tmp_path, learner.loop.state.data, "epochs", learner.loop)
    assert Counts.made == size
