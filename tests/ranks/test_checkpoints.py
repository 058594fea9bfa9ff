"""Checkpoints of several ranks, in real processes: all ranks resume from one file, to the bit (rule 28)."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    Access,
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import EMA, Checkpointer
from flowtrain.training.checkpoint.remote import place
from tests.ranks.alone import Alone, End, fit
from tests.ranks.by_hand import classes, differing
from tests.support.ranks import Ranks, rank, returned
from tests.support.remote import shared
from tests.support.resumed import Ask
from tests.support.untyped import untyped


class Middle(Ask):
    """Requests a checkpoint on every rank, as all of them must."""

    may_checkpoint = True


def trained(folder: str, epochs: int, resume: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Train with dropout on this rank; return the weights, the averages, the losses and the next random numbers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    torch.manual_seed(seed + rank())
    random.seed(seed + rank())
    ema = EMA(0.5)
    with Learner(
        model,
        cross_entropy,
        data=(classes(4), classes(2)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[ema, Checkpointer(folder), Middle(place(folder) / "middle.ckpt", BatchEnd, TrainingPhase, 6)],
        core=TorchCore(device="cpu"),
        default_callbacks="quiet",
    ) as learner:
        learner.fit(epochs, resume=resume)
        steps = {repr(phase): each["Loss"].values for phase, each in learner.cbstate.metrics_step.items()}
        epoch = {repr(phase): each["Loss"].values for phase, each in learner.cbstate.metrics_epoch.items()}
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "averages": {name: value.tolist() for name, value in ema.averages.items()},
        "losses": [steps, epoch],
        "next": (torch.rand(2).tolist(), random.random()),
    }


@pytest.mark.parametrize("name", ["epoch-0002.ckpt", "middle.ckpt"], ids=["between", "within"])
def test_rule_28_every_rank_resumes_from_the_file_of_the_main_rank(name: str, ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks.values(trained, str(tmp_path / "whole"), 3)
    assert whole[0]["weights"] == whole[1]["weights"]
    assert whole[0]["next"] != whole[1]["next"]
    resumed = ranks.values(trained, str(tmp_path / "resumed"), 3, str(tmp_path / "whole" / name), 70)
    assert resumed == whole
    contents = torch.load(tmp_path / "whole" / name, weights_only=True)
    assert len(contents["ranks"]) == 1


@pytest.mark.parametrize("name", ["epoch-0001.ckpt", "middle.ckpt"], ids=["between", "within"])
def test_every_rank_resumes_from_a_remote_folder(name: str, ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks.values(trained, str(tmp_path / "whole"), 2)
    folder = shared(tmp_path / "remote")
    assert ranks.values(trained, folder, 2) == whole
    assert ranks.values(trained, f"{folder}-2", 2, f"{folder}/{name}", 70) == whole


def continued(path: str) -> tuple[list[str], list[Any], list[Any]]:
    """Resume a fit of three epochs from a checkpoint; return the warnings, the first and the last weights."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    first: list[Any] = []

    class Look(Callback):
        ranks = "every"

        def state_access(self) -> Access:
            return {"params": Read()}

        @on(EpochBegin, TrainingPhase)
        def look(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            first.append([param.tolist() for param in learner.params.values()])

    learner = Learner(
        model,
        cross_entropy,
        data=(classes(4), classes(2)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[EMA(0.5), Look()],
        core=TorchCore(device="cpu"),
        default_callbacks="quiet",
    )
    with learner, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        learner.fit(3, resume=path)
    texts = [str(each.message) for each in warned if "written by" in str(each.message)]
    return texts, first, [param.tolist() for param in model.parameters()]


@pytest.mark.parametrize("size", [1, 3])
def test_rule_42_another_number_of_ranks_resumes_at_the_end_of_an_epoch(
    size: int, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.values(trained, str(tmp_path / "whole"), 2)
    path = tmp_path / "whole" / "epoch-0002.ckpt"
    saved = torch.load(path, weights_only=True)["trained"][""]
    found = [outcome.value for outcome in ranks.run_on(size, 30, continued, str(path))]
    for number, value in enumerate(found):
        assert value is not None
        texts, first, last = value
        assert first == [[saved[name].tolist() for name in saved]]
        assert last == untyped(found)[0][2] != first[0]
        many = f"{size} ranks" if size > 1 else "one process"
        told = f"The checkpoint was written by 2 ranks, and this training has {many}. Models, optimizers"
        assert [text[: len(told)] for text in texts] == ([] if number else [told])


@pytest.mark.parametrize("size", [1, 3])
def test_rule_42_another_number_of_ranks_is_refused_within_an_epoch(size: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks.values(trained, str(tmp_path / "whole"), 2)
    for outcome in ranks.run_on(size, 30, continued, str(tmp_path / "whole" / "middle.ckpt")):
        assert outcome.ended == "CheckpointError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("The checkpoint was taken within an epoch by 2 ranks, and this training")
        assert "Resume with as many, or from a checkpoint of the end of an epoch" in outcome.error.text


CHECKPOINTED: list[tuple[type[Event], str, int]] = [
    *((event, "error", accumulate) for event in (BatchBegin, UpdateEnd, BatchEnd, EpochEnd) for accumulate in (1, 3)),
    *((BatchBegin, action, 3) for action in ("batch", "fit")),
    (BatchEnd, "batch", 3),
]


def leave(folder: str, event: type[Event], action: str, accumulate: int) -> End:
    dist.init_process_group("gloo")
    core = TorchCore(device="cpu", accumulate=accumulate)
    # In the second batch, and in the first one that updates, both of which are checkpointed.
    nth = 1 if (event in (EpochEnd, UpdateEnd) and accumulate > 1) or event is EpochEnd else 2
    return fit(Alone(event, TrainingPhase, action, nth), Checkpointer(folder, every_steps=1, monitor=None), core=core)


@pytest.mark.parametrize(("event", "action", "accumulate"), CHECKPOINTED)
def test_a_rank_that_fails_where_the_others_take_a_checkpoint_makes_none_wait(
    event: type[Event], action: str, accumulate: int, ranks: Ranks, tmp_path: Path
) -> None:
    zero, one = returned(ranks.run_on(2, 15, leave, str(tmp_path), event, action, accumulate))
    assert differing(zero.weights, one.weights) == []
    assert zero.counts == one.counts or event is UpdateEnd  # the batch of that rank is not complete
    if action == "error":
        assert one.error is not None
        assert zero.error is not None
        assert (one.error.kind, zero.error.kind) == ("ValueError", "RemoteError")
        assert zero.error.text.startswith("rank 1: ValueError: only here")
    else:
        assert (zero.error, one.error) == (None, None)


class Saves(Callback):
    """Requests a checkpoint after each batch."""

    may_checkpoint = True

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @on(BatchEnd, TrainingPhase)
    def save(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.request_checkpoint(Path(self.folder) / "a.ckpt")


class Marks(Callback):
    """Writes an entry that `SavesAfter` reads, or raises on rank 1 in the n-th batch."""

    ranks = "every"

    def __init__(self, failure: Exception, nth: int) -> None:
        self.failure, self.left = failure, nth

    def state_access(self) -> Access:
        return {"cbstate.mark": Write()}

    @on(BatchEnd, TrainingPhase)
    def mark(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.left -= 1
        if not self.left and rank():
            raise self.failure
        learner.cbstate.mark = 1


class SavesAfter(Saves):
    """Is not run where `Marks` has failed."""

    def state_access(self) -> Access:
        return {"cbstate.mark": Read(optional=True)}


def depend(folder: str, failure: Exception, accumulate: int) -> End:
    dist.init_process_group("gloo")
    core = TorchCore(device="cpu", accumulate=accumulate)
    return fit(Marks(failure, 2), SavesAfter(folder), core=core)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("failure", [ValueError("only here"), CancelEpochException("only here")], ids=repr)
def test_a_rank_takes_part_in_a_checkpoint_although_its_requester_depends_on_a_handler_that_failed(
    failure: Exception, accumulate: int, ranks: Ranks, tmp_path: Path
) -> None:
    zero, one = returned(ranks.run_on(2, 15, depend, str(tmp_path), failure, accumulate))
    assert zero.unlike(one) == []
    if isinstance(failure, CancelEpochException):
        assert (zero.error, one.error) == (None, None)
        return
    assert one.error is not None
    assert zero.error is not None
    assert (one.error.kind, zero.error.kind) == ("ValueError", "RemoteError")
    assert zero.error.text.startswith("rank 1: ValueError: only here")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_rank_takes_part_in_a_checkpoint_although_a_cancel_without_effect_has_left_out_its_requester(
    accumulate: int, ranks: Ranks, tmp_path: Path
) -> None:
    """At `BatchEnd` a batch cannot be cancelled any more, so all ranks train on."""
    late = CancelBatchException("only here")
    zero, one = returned(ranks.run_on(2, 15, depend, str(tmp_path), late, accumulate))
    assert zero.unlike(one) == []
    assert (zero.error, one.error) == (None, None)


class SavesEarly(Saves):
    """Requests a checkpoint in the middle of each batch."""

    @on(BackwardBegin, TrainingPhase)
    def save_early(self, event: BackwardBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.request_checkpoint(Path(self.folder) / "early.ckpt")


def fail_after(folder: str, event: type[Event], accumulate: int) -> End:
    dist.init_process_group("gloo")
    core = TorchCore(device="cpu", accumulate=accumulate)
    return fit(Alone(event, TrainingPhase, "error", 1), SavesEarly(folder), core=core)


@pytest.mark.parametrize(("event", "accumulate"), [(UpdateEnd, 1), (BatchEnd, 1), (BatchEnd, 3)])
def test_a_failure_is_told_once_although_two_checkpoints_were_requested_in_the_batch(
    event: type[Event], accumulate: int, ranks: Ranks, tmp_path: Path
) -> None:
    """The other ranks drop the second one when they learn of the failure at the first."""
    zero, one = returned(ranks.run_on(2, 15, fail_after, str(tmp_path), event, accumulate))
    assert differing(zero.weights, one.weights) == []
    assert one.error is not None
    assert zero.error is not None
    assert (one.error.kind, zero.error.kind) == ("ValueError", "RemoteError")
    assert zero.error.text.startswith("rank 1: ValueError: only here")


def cancel_before(folder: str, accumulate: int) -> End:
    dist.init_process_group("gloo")
    core = TorchCore(device="cpu", accumulate=accumulate)
    return fit(Alone(LossBegin, TrainingPhase, "batch", 2), SavesEarly(folder), core=core)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_rank_takes_a_checkpoint_that_it_requested_in_a_batch_which_another_rank_cancels(
    accumulate: int, ranks: Ranks, tmp_path: Path
) -> None:
    zero, one = returned(ranks.run_on(2, 15, cancel_before, str(tmp_path), accumulate))
    assert zero.unlike(one) == []
    assert (zero.error, one.error) == (None, None)


class AsksAlone(Callback):
    """Requests a checkpoint on one rank alone, at the second firing of an event in a phase, or the first in a fit."""

    may_checkpoint = True

    def __init__(self, path: str, event: type[Event], phase: type[Phase], on_rank: int) -> None:
        self.path, self.event, self.phase, self.on_rank = path, event, phase, on_rank
        self.left = 1 if event in (FitBegin, FitEnd) else 2

    @on(Event)
    def ask(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if type(event) is self.event and isinstance(phase, self.phase):
            self.left -= 1
            if not self.left and rank() == self.on_rank:
                learner.request_checkpoint(self.path)


def ask_alone(path: str, event: type[Event], phase: type[Phase], on_rank: int, accumulate: int) -> End:
    dist.init_process_group("gloo")
    return fit(AsksAlone(path, event, phase, on_rank), core=TorchCore(device="cpu", accumulate=accumulate))


ASKED: list[tuple[type[Event], type[Phase], int, int]] = [
    *((event, TrainingPhase, 0, accumulate) for event in (BatchBegin, BackwardEnd, BatchEnd) for accumulate in (1, 3)),
    *((event, TrainingPhase, 1, 1) for event in (UpdateEnd, BatchEnd, EpochBegin, EpochEnd)),
    (EpochEnd, ValidationPhase, 0, 1),
    (FitBegin, Phase, 0, 1),
]


@pytest.mark.parametrize(("event", "phase", "on_rank", "accumulate"), ASKED)
def test_a_checkpoint_that_one_rank_alone_requests_is_refused_on_all(
    event: type[Event], phase: type[Phase], on_rank: int, accumulate: int, ranks: Ranks, tmp_path: Path
) -> None:
    ends = returned(ranks.run_on(2, 15, ask_alone, str(tmp_path / "a.ckpt"), event, phase, on_rank, accumulate))
    asked = ["rank 0: none", "rank 1: none"]
    asked[on_rank] = f"rank {on_rank}: a.ckpt"
    for end in ends:
        assert end.error is not None
        assert end.error.kind == "RankError"
        assert end.error.text.startswith(f"The ranks request different checkpoints ({'; '.join(asked)}), and each")
    assert ends[0].unlike(ends[1]) == []
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_one_rank_alone_requests_at_the_last_event_ends_all(ranks: Ranks, tmp_path: Path) -> None:
    zero, one = returned(ranks.run_on(2, 15, ask_alone, str(tmp_path / "a.ckpt"), FitEnd, Phase, 0, 1))
    assert zero.error is not None
    assert one.error is not None
    assert (zero.error.kind, one.error.kind) == ("RemoteError", "RankError")
    assert zero.error.text == "rank 1: it has come to another point"


@pytest.mark.parametrize(("event", "phase"), [(BatchEnd, ValidationPhase), (BatchCancelled, TrainingPhase)])
def test_a_checkpoint_is_refused_at_events_that_one_rank_alone_may_fire(
    event: type[Event], phase: type[Phase], ranks: Ranks, tmp_path: Path
) -> None:
    zero, one = returned(ranks.run_on(2, 15, ask_lonely, str(tmp_path / "a.ckpt"), event, phase))
    assert zero.error is not None
    assert one.error is not None
    assert (zero.error.kind, one.error.kind) == ("RankError", "RemoteError")
    assert zero.error.text == (
        f"AsksAlone requests a checkpoint at ({event.__name__}, {phase.__name__}), which ranks need not fire equally "
        f"often, and a checkpoint needs all ranks. Request it at EpochEnd, or at the BatchEnd of a phase that trains."
    )


def ask_lonely(path: str, event: type[Event], phase: type[Phase]) -> End:
    dist.init_process_group("gloo")
    cancels = [Alone(BatchBegin, TrainingPhase, "batch", nth) for nth in (1, 2)]
    return fit(*cancels, AsksAlone(path, event, phase, 0), core=TorchCore(device="cpu"))


class Unable(Saves):
    """Cannot give its state, or not decide about a checkpoint, on rank 1."""

    def __init__(self, folder: str, what: str) -> None:
        super().__init__(folder)
        self.what = what

    def decide(self, finite: bool) -> tuple[bool, list[str]]:
        if self.what == "decide" and rank():
            raise ValueError("only here")
        return False, []

    def state_dict(self) -> dict[str, Any]:
        if self.what == "state_dict" and rank():
            raise ValueError("only here")
        return {}

    @on(BatchEnd, TrainingPhase)
    def save(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        for name in ("a.ckpt", "b.ckpt"):
            learner.request_checkpoint(Path(self.folder) / name, decide=self.decide)


def unable(folder: str, what: str) -> End:
    dist.init_process_group("gloo")
    return fit(Unable(folder, what), core=TorchCore(device="cpu"))


@pytest.mark.parametrize("what", ["state_dict", "decide"])
def test_a_callback_that_fails_within_a_checkpoint_on_one_rank_makes_none_wait(
    what: str, ranks: Ranks, tmp_path: Path
) -> None:
    zero, one = returned(ranks.run_on(2, 15, unable, str(tmp_path), what))
    assert zero.error is not None
    assert one.error is not None
    assert (zero.error.kind, one.error.kind) == ("CheckpointError", "ValueError")
    assert zero.error.text == "rank 1: ValueError: only here"
    assert list(tmp_path.iterdir()) == []
