"""The contracts of `Together`, `Sync` and `Parts`, checked on two processes that train together, or each alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    Callback,
    Learner,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    on,
)
from flowtrain.callback.view import NO_REQUEST, CheckpointRequest
from flowtrain.errors import RankError, RemoteError
from flowtrain.state.by_phase import PhaseMap
from flowtrain.training.failures import Failures
from flowtrain.training.loop import Loop
from tests.ranks.by_hand import classes
from tests.support.ranks import Ranks, rank

Kind = Literal["ddp"] | None

POINTS = ("resumed", "fit_begun", "epoch_begun", "batches_ended", "epoch_ended", "broke_off", "fit_ended")
TRAINING = TrainingPhase()


class Looks(Callback):
    """Notes the events of an update."""

    ranks = "every"
    may_cancel = False

    def __init__(self) -> None:
        self.seen: list[str] = []

    @on(UpdateBegin)
    def begin(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        self.seen.append("begin")

    @on(UpdateEnd)
    def end(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        self.seen.append("end")


def made(kind: Kind, *callbacks: Callback) -> Loop:
    """Return the loop of a learner, alone or together with the other process."""
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    learner = Learner(
        nn.Linear(12, 4), cross_entropy, data=(classes(4), classes(2)), optimizer=partial(torch.optim.SGD, lr=0.1),
        core=TorchCore(device="cpu", parallel=kind), callbacks=callbacks, default_callbacks=False,
    )  # fmt: skip
    loop = learner.loop
    loop.together.begin()
    return loop


# --- Together


def meets(kind: Kind) -> list[int]:
    """Meet at every sync point; return how many failures there are then."""
    together = made(kind).together
    together.begin_fit(lambda: None)
    merged, found = Failures(), []
    for point in POINTS:
        failures = Failures()
        getattr(together, point)(failures)
        found.append(len([*failures]))
    together.merge(TRAINING, merged)
    return [*found, len([*merged])]


def fails(kind: Kind, point: str) -> list[str]:
    """Meet at a sync point with an error of rank 1; return the failures there."""
    together, failures = made(kind).together, Failures()
    if rank():
        failures.add(ValueError("broken"))
    getattr(together, point)(*[TRAINING] * (point == "merge"), failures)
    return [f"{type(failure).__name__}: {failure}" for failure in failures]


def agrees(kind: Kind) -> tuple[int, int | None, int | None]:
    together = made(kind).together
    return together.agree(rank() + 5), together.plan(lambda: rank() + 7), together.plan(lambda: rank() or None)


def feeds(kind: Kind) -> tuple[list[int], list[int], list[int]]:
    """Return the samples that this process evaluates, those of an epoch of training, and those of a prediction."""
    loop = made(kind)
    together = loop.together
    data: PhaseMap[Any] = PhaseMap("data")
    data[ValidationPhase()] = DataLoader(TensorDataset(torch.arange(7.0)), batch_size=2)
    loader = together.divide(data)[ValidationPhase()]
    with together.batches(ValidationPhase(), loader, 0, None, announced=True) as given:
        evaluated = [int(value) for [batch] in given for value in batch]
    mine = [torch.tensor(float(number + 10 * rank())) for number in range(4)]
    trained = list[int]()
    with loop.mode(TRAINING), together.batches(TRAINING, iter(mine[1:]), 1, 4, announced=True) as given:
        for value in given:
            trained.append(int(value))
            loop.together.sync.leave(ValidationPhase(), ValueError())  # a batch without a gradient ends here
    with together.predicting(TRAINING, mine) as inputs:
        predicted = [int(value) for value in inputs]
    return evaluated, trained, predicted


class TogetherContract:
    """The promises, each checked on two processes, which train together or each alone."""

    kind: ClassVar[Kind]

    def test_no_failure_comes_from_a_sync_point(self, ranks: Ranks) -> None:
        assert ranks.values(meets, self.kind) == [[0] * (len(POINTS) + 1)] * 2

    @pytest.mark.parametrize("point", [*POINTS, "merge"])
    def test_an_error_is_told_at_each_sync_point(self, point: str, ranks: Ranks) -> None:
        own = ["ValueError: broken"]
        other = [] if self.kind is None else ["RemoteError: rank 1: ValueError: broken"]
        assert ranks.values(fails, self.kind, point) == [other, own]

    def test_one_value_and_one_plan(self, ranks: Ranks) -> None:
        alone = [(5, 7, None), (6, 8, 1)]
        assert ranks.values(agrees, self.kind) == (alone if self.kind is None else [(5, 7, None)] * 2)

    def test_every_sample_is_evaluated_once_and_inputs_stay(self, ranks: Ranks) -> None:
        found = ranks.values(feeds, self.kind)
        evaluated = [samples for samples, _, _ in found]
        if self.kind is None:
            assert evaluated == [[*range(7)]] * 2
        else:
            assert sorted(evaluated[0] + evaluated[1]) == [*range(7)]
        assert [trained for _, trained, _ in found] == [[1, 2, 3], [11, 12, 13]]
        assert [predicted for _, _, predicted in found] == [[0, 1, 2, 3], [10, 11, 12, 13]]


class TestAlone(TogetherContract):
    kind = None


class TestRanks(TogetherContract):
    kind = "ddp"


# --- Sync


def gradients(model: nn.Module) -> torch.Tensor:
    """Return the gradients of a model in one vector."""
    return torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])


def trains(kind: Kind) -> tuple[bool, list[str], list[str], float]:
    """Run a batch by the calls of a bundled step; return whether the gradients are right, and what was called."""
    looks, called = Looks(), list[str]()
    loop = made(kind, looks)
    sync, model = loop.together.sync, loop.core.models[""]
    loop.together.begin(TRAINING)
    run, backward, update = sync.begin(TRAINING, lambda phase: called.append(repr(phase)))
    over = [rank()] if kind is None else [0, 1]
    inputs, targets = classes(1)[0]
    backward(cross_entropy(run(inputs), targets))
    update(TRAINING)
    plain = nn.Linear(12, 4)
    plain.load_state_dict(model.state_dict())
    for each in over:
        inputs, targets = classes(1, each)[0]
        (cross_entropy(plain(inputs), targets) / len(over)).backward()
    same = torch.allclose(gradients(model), gradients(plain))
    for runner, event in zip(
        sync.updating(TRAINING, [""], loop.dispatch.runners[TRAINING], in_batch=True),
        (UpdateBegin(), UpdateEnd()),
        strict=True,
    ):
        assert runner is not None
        runner(event, TRAINING)
    return same, called, looks.seen, float(gradients(model).abs().sum())


def leaves(kind: Kind) -> str:
    """Let rank 1 leave a batch that the other one runs; return how it ended."""
    loop = made(kind)
    loop.together.begin(TRAINING)
    sync = loop.together.sync
    run, backward, _ = sync.begin(TRAINING, lambda phase: None)
    if rank():
        return repr(sync.leave(TRAINING, ValueError("broken")))
    inputs, targets = classes(1)[0]
    try:
        backward(cross_entropy(run(inputs), targets))
    except RemoteError as failure:
        return repr(sync.leave(TRAINING, failure))
    return "complete"


def steps(kind: Kind) -> tuple[list[Any], str]:
    """Run a step of the user that opens no batch, and one that does; and update without `learner.update`."""
    loop, seen = made(kind), list[Any]()
    sync = loop.together.sync
    sync.begin_own(TRAINING)
    sync.around(TRAINING, seen.append)(1)
    sync.begin_own(TRAINING)
    sync.end_own(TRAINING)
    try:
        sync.check_own_update(TRAINING)
    except RankError as error:
        return seen, str(error).partition(",")[0]
    return seen, ""


class SyncContract:
    """The promises, each checked on two processes, which train together or each alone."""

    kind: ClassVar[Kind]

    def test_a_batch_has_the_gradients_of_all_and_updates_once(self, ranks: Ranks) -> None:
        one, other = ranks.values(trains, self.kind)
        assert one[:3] == other[:3] == (True, ["TrainingPhase"], ["begin", "end"])
        assert (one[3] == other[3]) == (self.kind is not None)

    def test_who_leaves_a_batch_tells_the_others(self, ranks: Ranks) -> None:
        told = "complete" if self.kind is None else "RemoteError('rank 1: ValueError: broken')"
        assert ranks.values(leaves, self.kind) == [told, "ValueError('broken')"]

    def test_a_step_of_the_user(self, ranks: Ranks) -> None:
        refused = "" if self.kind is None else "TrainingPhase fires UpdateEnd"
        assert ranks.values(steps, self.kind) == [([1], refused)] * 2


class TestNoSync(SyncContract):
    kind = None


class TestBatchSync(SyncContract):
    kind = "ddp"


# --- Parts


def compares(kind: Kind, same: bool) -> str:
    parts = made(kind).together.parts
    parts.compare([NO_REQUEST])
    requests = [CheckpointRequest("here/a.ckpt"), NO_REQUEST, CheckpointRequest("b.ckpt", on_interrupt=True)]
    try:
        parts.compare(requests if same or rank() else [NO_REQUEST])
    except RankError as error:
        return str(error).partition(", and")[0]
    return ""


def saves(kind: Kind, folder: str) -> tuple[bool, list[Any], list[Any]]:
    """Save what each process has, and read it again."""
    loop = made(kind)
    parts, path = loop.together.parts, Path(folder) / (f"{rank()}.ckpt" if kind is None else "a.ckpt")
    finite = parts.begin(finite=not rank())
    own = {
        "version": 1, "random": rank(), "loaders": {}, "position": {"phase": "", "stream": None}, "numbers": {},
        "passes": {}, "cbstate": {}, "callbacks": {}, "group": None, "run": {"positions": {}}, "model": 3,
    }  # fmt: skip
    contents = parts.gather(lambda: dict(own))
    request = CheckpointRequest(str(path))
    parts.write(loop.checkpoints.writer, {**contents, "finite": True}, request)
    loop.checkpoints.writer.wait()
    loop.together.agree(None)
    found = torch.load(path, weights_only=True)
    mine = parts.own(found)
    return finite, [mine["random"], mine["model"]], [parts.same_size(found), found.get("ranks") is None]


class PartsContract:
    """The promises, each checked on two processes, which train together or each alone."""

    kind: ClassVar[Kind]

    def test_requests_of_all_are_the_same(self, ranks: Ranks) -> None:
        assert ranks.values(compares, self.kind, True) == ["", ""]
        asked = "The ranks request different checkpoints (rank 0: none; rank 1: a.ckpt, at an interrupt, b.ckpt)"
        assert ranks.values(compares, self.kind, False) == ["" if self.kind is None else asked] * 2

    def test_each_process_reads_what_it_has_saved(self, ranks: Ranks, tmp_path: Path) -> None:
        found = ranks.values(saves, self.kind, str(tmp_path))
        finite = [True, False] if self.kind is None else [False, False]
        assert found == [(finite[each], [each, 3], [True, self.kind is None]) for each in range(2)]


class TestWholeParts(PartsContract):
    kind = None


class TestRankParts(PartsContract):
    kind = "ddp"
