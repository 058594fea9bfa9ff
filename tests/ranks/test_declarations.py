"""Rules 31 to 35 with real processes: declared exchanges, refusals, and the comparison of plans."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    DivergedError,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    Write,
    on,
)
from flowtrain.callbacks import LearningRateMonitor, LogMetrics, Recorder
from flowtrain.core.torch_core import TorchCore
from flowtrain.logging import JsonlBackend
from flowtrain.training.checkpoint.reading import own_version
from tests.support.ranks import Ranks, rank


class LossRate(Callback):
    """Makes the learning rate follow the loss of all ranks, and sends the worst loss of the main rank."""

    def __init__(self, *, reduced: bool = True) -> None:
        self.reduced = reduced
        self.rates: list[float] = []

    def state_access(self) -> Access:
        return {
            "batch.loss": Read(reduce="mean") if self.reduced else Read(),
            "optimizer.hyperparams": Write(),
            "cbstate.rate": Write(broadcast=True),
        }

    @on(BatchEnd, TrainingPhase)
    def follow(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        rate = 0.01 + float(learner.batch.loss) / 100
        learner.optimizer.hyperparams[0]["lr"] = rate
        learner.cbstate.rate = (rank(), rate)
        self.rates.append(rate)


class CancelAt(Callback):
    """Cancels the second batch on the second rank, at an event."""

    ranks = "every"

    def __init__(self, event_type: type[Event], failure: type[BaseException]) -> None:
        self.event_type, self.failure = event_type, failure
        self.count = 0

    @on("event_type", TrainingPhase)
    def cancel(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.count += 1
        if self.count == 2 and rank() == 1:
            raise self.failure("only here")


def learner(*callbacks: Callback, executor: str = "serial") -> Learner:
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(rank())
    batches = [(torch.randn(4, 3, generator=made), torch.randn(4, 1, generator=made)) for _ in range(5)]
    return Learner(
        torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, data={TrainingPhase: batches},
        optimizer=partial(torch.optim.SGD, lr=0.1), core=TorchCore(device="cpu"), callbacks=callbacks,
        default_callbacks="quiet", executor=executor,
    )  # fmt: skip


def state_of(made: Learner, follow: LossRate) -> Any:
    weights = [param.tolist() for param in made.model.parameters()]
    return weights, made.optimizer.param_groups[0]["lr"], made.cbstate.rate, follow.rates


def train(executor: str) -> Any:
    follow = LossRate()
    with learner(follow, executor=executor) as made:
        made.fit(2)
        text = made.callbacks.explain()
        return state_of(made, follow), text


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_a_rate_that_follows_the_loss_is_the_same_on_every_rank(executor: str, ranks: Ranks) -> None:
    (first, text), (second, _) = ranks.values(train, executor)
    assert first == second
    assert len(first[3]) == 10
    assert len(set(first[3])) == 10
    assert first[2][0] == 0  # sent by the main rank
    assert "2 ranks, of which this is 0" in text
    assert "exchange before: every rank gets the mean of batch.loss of all ranks" in text


EVENTS = [BatchBegin, LossBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd]


def cancel(event: type[Event], failure: type[BaseException], *, first: bool) -> Any:
    follow, stop = LossRate(), CancelAt(event, failure)
    with learner(*((stop, follow) if first else (follow, stop))) as made:
        try:
            made.fit(2)
        except Exception as error:
            return type(error).__name__, len(follow.rates)
        return state_of(made, follow)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("event", EVENTS)
def test_a_batch_that_one_rank_leaves_makes_no_rank_wait(event: type[Event], first: bool, ranks: Ranks) -> None:
    one, two = ranks.run_on(2, 20, cancel, event, CancelBatchException, first=first)
    assert (one.ended, two.ended) == ("returned", "returned"), f"{one}\n{two}"
    assert one.value == two.value


@pytest.mark.parametrize("event", EVENTS)
def test_an_error_on_one_rank_makes_no_rank_wait(event: type[Event], ranks: Ranks) -> None:
    one, two = ranks.run_on(2, 20, cancel, event, ValueError, first=True)
    assert (one.ended, two.ended) == ("returned", "returned"), f"{one}\n{two}"
    assert (one.value or "")[0] == "RemoteError"
    assert (two.value or "")[0] == "ValueError"
    assert (one.value or "")[1] == (two.value or "")[1]


def refuse() -> Any:
    learner(LossRate(reduced=False))


def test_a_rate_of_each_rank_is_refused(ranks: Ranks) -> None:
    for outcome in ranks.run(refuse):
        assert outcome.ended == "RankError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("LossRate reads batch.loss, which differs between ranks")


def differ() -> Any:
    more = [LearningRateMonitor()] if rank() else []
    learner(Recorder(), *more).fit(1)


def test_different_callbacks_are_refused_when_a_fit_begins(ranks: Ranks) -> None:
    for outcome in ranks.run(differ):
        assert outcome.ended == "RankError"
        assert outcome.error is not None
        assert outcome.error.text == (
            "The ranks have different callbacks: rank 1 has LearningRateMonitor.look on every rank "
            "{cbstate.history: Read(), cbstate.tracehistory.LearningRate: Write(), optimizer.hyperparams: Read()} at "
            "(UpdateBegin, TrainingPhase), the main rank has nothing more. Give the learner the same callbacks, in "
            'the same order, on every rank; with ranks = "main" one of them runs on the main rank only.'
        )


def log(place: str) -> Any:
    with learner(LogMetrics(JsonlBackend(place))) as made:
        made.fit(3)
    return rank()


def test_a_logger_writes_on_the_main_rank_only(ranks: Ranks, tmp_path: Path) -> None:
    place = tmp_path / "log.jsonl"
    assert ranks.values(log, str(place)) == [0, 1]
    records = [json.loads(line) for line in place.read_text("utf-8").splitlines()]
    losses = [each["step"] for each in records if each["name"] == "Loss" and each["group"] == "Epoch/TrainingPhase"]
    assert losses == [1, 2, 3]


class OwnTotal(Callback):
    """Writes an entry that differs between ranks, and declares nothing by which that could be known."""

    def __init__(self, step: int) -> None:
        self.step = step

    def state_access(self) -> Access:
        return {"cbstate.total": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.total = 0

    @on(EpochEnd, TrainingPhase)
    def add(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.cbstate.total += self.step


def total(*, own: bool) -> Any:
    with learner(OwnTotal(1 + rank() if own else 1)) as made:
        try:
            made.fit(2)
        except DivergedError as error:
            return error.paths, str(error), made.cbstate.total
        return made.cbstate.total


def test_shared_state_that_differs_is_an_error_at_the_end_of_the_epoch(ranks: Ranks) -> None:
    """Rule 41: no declaration shows the difference, and it is noticed before training uses it further."""
    for number, (paths, text, value) in enumerate(ranks.values(total, own=True)):
        assert paths == ("cbstate.total",)
        assert text.startswith(
            "cbstate.total must be the same on all ranks, and differs on rank 1 from the main rank. A callback that"
        )
        assert value == 1 + number  # after the first epoch
    assert ranks.values(total, own=False) == [2, 2]


def wrap(parallel: Any, inside: bool = False) -> Any:
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    wrapped = torch.nn.Sequential(wrapped) if inside else wrapped
    core = TorchCore(device="cpu", parallel=parallel)
    data = [(torch.randn(4, 3), torch.randn(4, 1))]
    Learner(wrapped, torch.nn.functional.mse_loss, data=data, core=core, default_callbacks=False).fit(1)
    return [param.tolist() for param in wrapped.parameters()]


def test_a_model_that_the_user_has_wrapped_is_refused_or_taken_as_it_is(ranks: Ranks) -> None:
    for outcome in (*ranks.run(wrap, "auto"), *ranks.run(wrap, "auto", inside=True)):
        assert outcome.ended == "CoreError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("The model is wrapped in DistributedDataParallel, and the learner wraps")
    one, two = ranks.values(wrap, None)
    assert one == two


def pretend() -> Any:
    if rank():
        pytest.MonkeyPatch().setattr(torch, "__version__", "2.0.0")
    learner(Recorder()).fit(1)


def test_other_versions_are_refused_when_a_fit_begins(ranks: Ranks) -> None:
    version = torch.__version__
    for outcome in ranks.run(pretend):
        assert outcome.ended == "RankError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("Rank 1 has flowtrain ")
        told = f"and torch 2.0.0, and the main rank has flowtrain {own_version()} and torch {version}. Install the same"
        assert told in outcome.error.text
