"""The contract of `Replica`, which the models of one process, of DDP and of shards keep; checked on two ranks."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain.core.replica import FIRST_FAILURE, FLAGS, Replica
from flowtrain.core.torch_core import TorchCore
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.shards import whole
from tests.ranks.by_hand import classes
from tests.support.ranks import Ranks, needs_sharding, rank

Kind = Literal["ddp", "fsdp"] | None


def module() -> nn.Module:
    """Return a model with buffers that is equal on all ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4), nn.BatchNorm1d(4, affine=False).eval())


def loss_of(model: Any, number: int, of_rank: int | None = None) -> Tensor:
    """Return the loss of a model in a batch of a rank, by default of this one."""
    inputs, targets = classes(3, rank() if of_rank is None else of_rank)[number]
    return cross_entropy(model(inputs), targets)


def made(kind: Kind) -> tuple[nn.Module, Replica]:
    """Return a model, and what a core makes of it."""
    dist.init_process_group("gloo")
    state = LearnerState()
    state.model, state.lossfn = module(), cross_entropy
    core = TorchCore(device="cpu", parallel=kind)
    core.attach(state, partial(torch.optim.SGD, lr=0.1))
    core.replica.prepare()
    return state.model, core.replica


def batch(replica: Replica, number: int, *, sends: bool = True, flags: int = 0) -> list[int]:
    """Run a batch up to its backward pass, with this value of each flag that means no failure; return the sums."""
    replica.set_gradient_sync(sends)
    assert replica.syncs_gradients == sends
    sent = [0] + [flags] * (FIRST_FAILURE - 1) + [0] * (FLAGS - FIRST_FAILURE)
    return replica.backward(loss_of(replica.model, number), sent)


def is_gradient(model: nn.Module, kind: Kind, *numbers: int) -> bool:
    """Tell whether a model has the mean over all ranks of the gradients of these batches; of this rank if alone."""
    over = [rank()] if kind is None else [0, 1]
    plain = module()
    for number in numbers:
        for each in over:
            (loss_of(plain, number, each) / len(over)).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return all(
        one.grad is not None and other.grad is not None and torch.allclose(whole(one.grad), other.grad, atol=1e-6)
        for one, other in pairs
    )


def computes(kind: Kind) -> tuple[bool, list[int], bool]:
    model, replica = made(kind)
    inputs = classes(1, rank())[0][0]
    same = torch.equal(replica.model(inputs).detach(), module()(inputs).detach())
    return same, batch(replica, 1, flags=rank() + 1)[1:FIRST_FAILURE], is_gradient(model, kind, 1)


def accumulates(kind: Kind) -> bool:
    model, replica = made(kind)
    batch(replica, 0, sends=False)
    batch(replica, 1)
    return is_gradient(model, kind, 0, 1)


def averages(kind: Kind) -> bool:
    model, replica = made(kind)
    batch(replica, 0, sends=False)
    replica.average(model.parameters())
    return is_gradient(model, kind, 0)


def leaves(kind: Kind, sends: bool) -> tuple[int, bool]:
    """Let rank 1 leave the second of three batches."""
    model, replica = made(kind)
    batch(replica, 0)
    replica.set_gradient_sync(sends)
    left, told = [int(place == FIRST_FAILURE) for place in range(FLAGS)], 0
    if rank() == 0:
        told = replica.backward(loss_of(replica.model, 1), [0] * FLAGS)[FIRST_FAILURE]
    elif replica.has_sync_point:
        told = replica.leave(left)[FIRST_FAILURE]
    else:
        replica.skip_unsent_batch()
    if replica.unsent is not None:
        replica.unsent.discard()
    for param in model.parameters():
        param.grad = None
    batch(replica, 2)
    return told, is_gradient(model, kind, 2)


def buffers(kind: Kind) -> float:
    model, replica = made(kind)
    for buffer in model.buffers():
        buffer.fill_(rank() + 5)
    replica.share_buffers()
    [value] = {float(each) for buffer in model.buffers() for each in buffer.reshape(-1)}
    return value


def watched(kind: Kind) -> float:
    """Return whether this rank skips an update after a NaN loss on rank 1."""
    _, replica = made(kind)
    seen = torch.tensor(float(rank()))
    replica.watch_nan(seen)
    batch(replica, 0)
    return seen.item()


def watched_apart(kind: Kind) -> float:
    """Return whether this rank skips an update after a NaN loss on rank 1 whose gradients were not sent."""
    model, replica = made(kind)
    seen = torch.tensor(float(rank()))
    replica.watch_nan(seen)
    batch(replica, 0, sends=False)
    replica.average(model.parameters())
    return seen.item()


class ReplicaContract:
    """The promises, each checked on two ranks; without other ranks each of them is alone."""

    kind: ClassVar[Kind]

    def test_a_batch_computes_what_the_module_does_and_the_flags_are_summed(self, ranks: Ranks) -> None:
        one, other = ([each] * (FIRST_FAILURE - 1) for each in ((1, 2) if self.kind is None else (3, 3)))
        assert ranks.values(computes, self.kind) == [(True, one, True), (True, other, True)]

    def test_gradients_that_wait_are_sent_with_those_of_a_later_batch(self, ranks: Ranks) -> None:
        assert ranks.values(accumulates, self.kind) == [True, True]

    def test_gradients_that_were_not_sent_can_be_averaged(self, ranks: Ranks) -> None:
        assert ranks.values(averages, self.kind) == [True, True]

    @pytest.mark.parametrize("sends", [True, False])
    def test_a_rank_leaves_a_batch_and_takes_part_in_the_next_one(self, sends: bool, ranks: Ranks) -> None:
        told = [0, int(sends)] if self.kind is None else [int(sends or self.kind == "fsdp")] * 2
        assert ranks.values(leaves, self.kind, sends) == [(each, True) for each in told]

    def test_a_nan_of_one_rank_is_known_to_all_before_the_update(self, ranks: Ranks) -> None:
        for program in (watched, watched_apart):
            assert ranks.values(program, self.kind) == ([0, 1] if self.kind is None else [1, 1])

    def test_buffers_become_those_of_the_main_rank(self, ranks: Ranks) -> None:
        assert ranks.values(buffers, self.kind) == ([5, 6] if self.kind is None else [5, 5])


class TestSingle(ReplicaContract):
    kind = None


class TestDataParallel(ReplicaContract):
    kind = "ddp"


@needs_sharding
class TestSharded(ReplicaContract):
    kind = "fsdp"
