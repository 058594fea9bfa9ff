"""Checkpoints of a sharded model: each rank writes its pieces, and any number of ranks resumes from them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    BatchBegin,
    BatchEnd,
    Callback,
    CheckpointError,
    EpochBegin,
    Event,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    load_weights,
    on,
)
from flowtrain.callbacks import EMA, Checkpointer
from flowtrain.core.sharding import full_state_dict
from flowtrain.state.shards import Pieces
from flowtrain.training.checkpoint.files import save
from flowtrain.training.checkpoint.reading import read
from tests.ranks.by_hand import classes
from tests.support.ranks import Outcome, Ranks, needs_sharding, rank, returned, send
from tests.support.resumed import Ask

pytestmark = needs_sharding


class AskAll(Ask):
    """Requests a checkpoint on every rank, as all of them must."""

    ranks = "every"
    may_checkpoint = True


class Starts(Callback):
    """Keeps the whole weights at the begin of the first epoch of a fit."""

    ranks = "every"

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None

    @on(EpochBegin, TrainingPhase, access={"model": Read()})
    def look(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        if self.weights is None:  # on all ranks alike: the weights are put together
            self.weights = full_state_dict(learner.model)


def network() -> nn.Sequential:
    """Return a model in which one layer has fewer rows than there are ranks."""
    torch.manual_seed(0)
    parts = [nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), nn.Linear(7, 1), nn.Linear(1, 4)]
    return nn.Sequential(*parts)


def learner(folder: str, *callbacks: Callback, parallel: Any = "fsdp", core: Any = None, **options: Any) -> Learner:
    """Return a learner of that model, whose layers are units of their own, with checkpoints in a folder."""
    torch.manual_seed(7 + rank())
    shard: Any = nn.Linear if parallel == "fsdp" else None
    return Learner(
        network(),
        cross_entropy,
        data=(classes(5), classes(2)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=[Checkpointer(folder, **options), *callbacks],
        core=TorchCore(parallel=parallel, shard=shard, **(core or {})),
        default_callbacks="quiet",
    )


def train(
    folder: str, epochs: int, resume: str | None = None, parallel: Any = "fsdp", core: Any = None, **options: Any
) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Train, with a request in the middle of an epoch; return the history, the whole weights and the averages."""
    average = EMA(0.5)
    asks = [AskAll(Path(folder) / "middle.ckpt", BatchEnd, TrainingPhase, 6)]
    asks += [AskAll(Path(folder) / "begin.ckpt", FitBegin, Phase, 1)] if resume else []
    with learner(folder, average, *asks, parallel=parallel, core=core, **options) as made:
        made.fit(epochs, resume=resume)
        with average.applied():
            averages = full_state_dict(made.model)
        return str(made.history), full_state_dict(made.model), averages


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not equal to the bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def names(folder: Path) -> list[str]:
    """Return the names in a folder, with stars for the drawn part of the folders of shards."""
    found = [each for each in folder.iterdir() if not each.name.startswith(".")]
    return sorted(each.name if each.suffix != ".shards" else f"{each.name[:-15]}*.shards" for each in found)


def test_each_rank_writes_its_pieces_once(ranks: Ranks, tmp_path: Path) -> None:
    [(_, weights, averages), _] = ranks.values(train, str(tmp_path), 2, keep_top_k=1, weights="safetensors")
    found = names(tmp_path)
    assert [name for name in found if "epoch-0002" in name] == [
        "epoch-0002.*.shards", "epoch-0002.ckpt", "epoch-0002.safetensors"
    ]  # fmt: skip
    assert len([name for name in found if name.endswith(".shards")]) == len(
        [name for name in found if name.endswith(".ckpt")]
    )
    [folder] = tmp_path.glob("epoch-0002.*.shards")
    files = [torch.load(folder / f"rank-{number}.pt", weights_only=True) for number in range(2)]
    sizes = [sum(tensor.numel() for pieces in file for _, tensor in pieces) for file in files]
    params = sum(param.numel() for param in network().parameters())
    assert sum(sizes) == 5 * params  # trained, averaged, evaluated, and two in the state of AdamW
    assert 0.3 < sizes[0] / sum(sizes) < 0.7
    contents = torch.load(tmp_path / "epoch-0002.ckpt", weights_only=True)
    assert contents["model"][""]["0.weight"] == {
        "the number of a sharded tensor": contents["model"][""]["0.weight"]["the number of a sharded tensor"],
        "shape": [7, 12],
        "dtype": torch.float32,
    }
    assert torch.is_tensor(contents["model"][""]["1.running_mean"])
    assert differing(load_weights(tmp_path, "latest"), averages) == []
    safetensors = pytest.importorskip("safetensors.torch")
    assert differing(safetensors.load_file(tmp_path / "epoch-0002.safetensors"), averages) == []
    saved = read(tmp_path / "epoch-0002.ckpt")
    assert differing(saved["trained"][""], weights) == []


@pytest.mark.parametrize("core", [{}, {"accumulate": 4}], ids=["plain", "accumulate"])
def test_training_resumes_to_the_bit_within_an_epoch_and_between(core: Any, ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks.values(train, str(tmp_path / "whole"), 3, core=core)
    for name in ("epoch-0002.ckpt", "middle.ckpt"):
        path = str(tmp_path / "whole" / name)
        resumed = ranks.values(train, str(tmp_path / name), 3, path, core=core)
        assert resumed[0][0] == whole[0][0], name
        assert differing(resumed[0][1], whole[0][1]) == [], name
        assert differing(resumed[0][2], whole[0][2]) == [], name
    begin = tmp_path / "middle.ckpt" / "begin.ckpt"  # the same checkpoint, saved again before its epoch had begun
    again = ranks.values(train, str(tmp_path / "again"), 3, str(begin), core=core)
    assert differing(again[0][1], whole[0][1]) == []


def begun(path: str, parallel: Any, core: Any = None) -> dict[str, Tensor]:
    """Resume, and return the whole weights at the begin of the first epoch."""
    starts = Starts()
    with learner(str(Path(path).parent / "new"), EMA(0.5), starts, parallel=parallel, core=core) as made:
        made.fit(3, resume=path)
    return starts.weights or {}


@pytest.mark.filterwarnings("ignore:The checkpoint was written by")
@pytest.mark.parametrize(("size", "parallel"), [(1, "auto"), (2, "ddp"), (3, "fsdp"), (4, "fsdp")])
def test_rule_42_any_number_of_ranks_reads_the_pieces(size: int, parallel: Any, ranks: Ranks, tmp_path: Path) -> None:
    [(_, weights, _), _] = ranks.values(train, str(tmp_path), 2)
    found = returned(ranks.run_on(size, 60, begun, str(tmp_path / "epoch-0002.ckpt"), parallel))
    assert differing(found[0], weights) == []


def gated(folder: str) -> tuple[bool, bool]:
    """Train while rank 1 cannot begin to write its pieces until a batch of the next epoch has begun there."""
    passed = threading.Event()

    class Passes(Callback):
        ranks = "every"

        @on(BatchBegin, TrainingPhase, access={"cbstate.history": Read()})
        def note(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[phase].epochs == 1:
                passed.set()

    waited, writes = list[bool](), list[str]()
    with learner(folder, Passes()) as made:

        def reached(point: str) -> None:
            if rank() == 1 and point == "shards begun":
                writes.append(point)
                waited.append(len(writes) == 1 or passed.wait(10))  # the first one is that of the start

        made.loop.checkpoints.writer.reached = reached
        made.fit(2)
    return all(waited), (Path(folder) / "epoch-0001.ckpt").exists()


def test_training_continues_while_the_pieces_are_written(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.values(gated, str(tmp_path)) == [(True, True)] * 2


def stopped(folder: str, number: int, point: str, on_rank: int, resume: str | None, how: str) -> Any:
    """Train, and kill this rank or let its disk be full at a point of its n-th write, the first at start."""
    with learner(folder) as made:
        left = [number]

        def reached(at: str) -> None:
            if rank() == on_rank and at == point:
                left[0] -= 1
                if not left[0]:
                    if how == "full":
                        raise OSError(28, "No space left on device")
                    send(signal.SIGKILL, rank())

        made.loop.checkpoints.writer.reached = reached
        made.fit(3, resume=resume)
        return full_state_dict(made.model)


def continued(folders: list[str]) -> list[Any]:
    """Train to the end in each folder, from what is in it; return the weights of all."""
    return [stopped(folder, 9, "", 0, "auto", "") for folder in folders]


KILLS = [("shards begun", 1), ("shards written", 1), ("shards renamed", 1), ("shards renamed", 0),
         ("checkpoint begun", 0), ("checkpoint written", 0), ("checkpoint renamed", 0)]  # fmt: skip


def test_a_kill_during_a_save_leaves_the_last_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    folders = [tmp_path / f"{point} {killed}" for point, killed in KILLS]
    for folder, (point, killed) in zip(folders, KILLS, strict=True):
        outcomes = ranks.run(stopped, str(folder), 3, point, killed, None, "kill")
        assert outcomes[killed].ended == "SIGKILL", outcomes
        assert outcomes[1 - killed].ended in ("RemoteError", "CheckpointError"), outcomes
        assert (folder / "latest").read_text() == "epoch-0001.ckpt\n"
    # One pair of ranks goes on in all folders, one after the other, and trains from the start in a new one.
    everywhere = [str(folder) for folder in [tmp_path / "whole", *folders]]
    (whole, *resumed), _ = returned(ranks.run_on(2, 60, continued, everywhere))
    for folder, weights in zip(folders, resumed, strict=True):
        assert differing(weights, whole) == [], folder.name
        kept = [name for name in names(folder) if "shards" in name]
        assert kept == [f"epoch-000{number}.*.shards" for number in (1, 2, 3)], folder.name


@pytest.mark.parametrize(("point", "full"), [("shards begun", 0), ("shards begun", 1), ("checkpoint begun", 0)])
def test_a_full_disk_of_one_rank_ends_on_all(point: str, full: int, ranks: Ranks, tmp_path: Path) -> None:
    outcomes: Sequence[Outcome[Any]] = ranks.run(stopped, str(tmp_path), 3, point, full, None, "full")
    for outcome in outcomes:  # a rank that raises its own error first tells it to the others
        assert outcome.ended in ("CheckpointError", "RemoteError"), "\n".join(map(str, outcomes))
        assert outcome.error is not None
        assert "epoch-0002.ckpt could not be written: " in outcome.error.text
        assert "No space left on device" in outcome.error.text
        assert f"The last complete one is {tmp_path / 'epoch-0001.ckpt'}." in outcome.error.text
    assert "CheckpointError" in [outcome.ended for outcome in outcomes]
    left = ["epoch-0002.*.shards"] if point == "checkpoint begun" else []  # the next save of that name removes it
    assert [name for name in names(tmp_path) if "0002" in name] == left


def test_shards_that_are_missing_or_damaged(ranks: Ranks, tmp_path: Path) -> None:
    ranks.values(train, str(tmp_path), 2)
    [folder] = tmp_path.glob("epoch-0002.*.shards")
    moved, path = folder.rename(tmp_path / "elsewhere"), tmp_path / "epoch-0002.ckpt"
    with pytest.raises(CheckpointError, match=r"is of a sharded model, whose tensors are in the folder .* Keep the"):
        read(path)
    with pytest.warns(UserWarning, match=r"that cannot be used: .*Instead, .*epoch-0001.ckpt is used, the one"):
        read(tmp_path)
    moved.rename(folder)
    file = folder / "rank-1.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="with another checksum than they were written with"):
        read(path)
    with file.open("wb") as opened:
        save([[] for _ in range(100)], opened)
    with pytest.raises(CheckpointError, match=r"its pieces have \d+ of the \d+ elements that were asked for"):
        read(path)
    file.write_bytes(b"no file of torch")
    with pytest.raises(CheckpointError, match="Keep the folder beside the file, also when you move it"):
        load_weights(path)


def test_a_part_is_put_together_from_pieces_that_lie_otherwise() -> None:
    whole = torch.arange(35.0).reshape(7, 5)
    pieces = Pieces((7, 5), whole.dtype, [([0, 0], whole[:3, :2]), ([0, 2], whole[:3, 2:]), ([3, 0], whole[3:])])
    assert torch.equal(pieces.whole(), whole)
    for first, last in ((0, 7), (1, 2), (2, 6), (4, 4)):
        assert torch.equal(pieces.part([first, 1], [last - first, 3]), whole[first:last, 1:4])
    assert torch.equal(Pieces((), whole.dtype, [([], whole[1, 1])]).whole(), whole[1, 1])
    lacking = Pieces((7, 5), whole.dtype, [([0, 0], whole[:3])])
    with pytest.raises(CheckpointError, match=r"shape \(7, 5\) is not complete: its pieces have 15 of the 35 elements"):
        lacking.whole()


def meshed(folder: str, resume: str | None, epochs: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train on a mesh of 2 x 2 ranks: two groups have the whole model each, sharded over the two ranks of a group."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    starts = Starts()
    with learner(folder, starts, core={"fsdp": {"mesh": mesh}}) as made:
        made.fit(epochs, resume=resume)
        return starts.weights or {}, full_state_dict(made.model)


def test_a_mesh_of_replicas_writes_each_piece_once(ranks: Ranks, tmp_path: Path) -> None:
    first = returned(ranks.run_on(4, 60, meshed, str(tmp_path), None, 2))
    [folder] = tmp_path.glob("epoch-0002.*.shards")
    sizes = [
        sum(tensor.numel() for pieces in torch.load(folder / f"rank-{number}.pt") for _, tensor in pieces)
        for number in range(4)
    ]
    assert sum(sizes) == 3 * sum(param.numel() for param in network().parameters())
    assert sizes[2:] == [0, 0]
    resumed = returned(ranks.run_on(4, 60, meshed, str(tmp_path), "auto", 3))
    assert differing(resumed[0][0], first[0][1]) == []
    assert differing(load_weights(tmp_path, "latest"), resumed[0][1]) == []


def restored(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train with a rate that makes the model worse, and return the best weights and those that the learner has."""
    with learner(folder, restore_best=True, keep_top_k=1) as made:
        made.optimizer.param_groups[0]["lr"] = 3.0
        made.fit(3)
        return load_weights(folder), full_state_dict(made.model)


def test_restore_best(ranks: Ranks, tmp_path: Path) -> None:
    best, has = ranks.values(restored, str(tmp_path))[0]
    assert differing(best, has) == []


class Interrupts(Callback):
    """Sends a signal to rank 1 in its third batch."""

    ranks = "every"

    def __init__(self) -> None:
        self.left = 3

    @on(BatchBegin, TrainingPhase)
    def send(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.left -= 1
        if not self.left and rank() == 1:
            send(signal.SIGTERM, 1)


def interrupted(folder: str, resume: str | None) -> dict[str, Tensor]:
    """Train or resume."""
    with learner(folder, *([] if resume else [Interrupts()])) as made:
        made.fit(2, resume=resume)
        return full_state_dict(made.model)


def test_an_interrupt_saves_the_pieces_of_all(ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks.values(interrupted, str(tmp_path / "whole"), "auto")
    outcomes = ranks.run(interrupted, str(tmp_path), None)
    assert [outcome.ended for outcome in outcomes] == ["KeyboardInterrupt"] * 2, "\n".join(map(str, outcomes))
    assert (tmp_path / "latest").read_text() == "interrupted.ckpt\n"
    resumed = ranks.values(interrupted, str(tmp_path), "auto")
    assert differing(resumed[0], whole[0]) == []
