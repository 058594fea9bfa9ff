"""The number of collectives in a batch: those by which DDP sends gradients, and none of flowtrain's own.

Every process group numbers its collectives, also those that DDP starts in C++, so they can be counted exactly. The
collectives of an epoch and of a fit are removed by comparing a long fit with a short one.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import BatchBegin, Callback, Learner, LearnerView, TorchCore, TrainingPhase, on
from tests.ranks.by_hand import classes, train
from tests.support.ranks import Ranks

FEW, MANY = 8, 24
SGD = partial(torch.optim.SGD, lr=0.1)


def collectives() -> int:
    """Return how many collectives this rank has taken part in, in all groups."""
    world: Any = vars(dist.distributed_c10d)["_world"]
    return sum(group._get_sequence_number_for_group() for group in world.pg_map)


def model(norm: bool) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), *[nn.BatchNorm1d(16)] * norm, nn.Linear(16, 4))


def by_hand(norm: bool, accumulate: int) -> float:
    """Return the collectives of a batch by hand."""
    dist.init_process_group("gloo")
    counts = [collectives()]
    for batches in (FEW, MANY):
        train(model(norm), SGD, [classes(batches)], accumulate)
        counts.append(collectives())
    return (counts[2] - 2 * counts[1] + counts[0]) / (MANY - FEW)


class Looks(Callback):
    """Looks at each batch before the model does."""

    @on(BatchBegin, TrainingPhase)
    def look(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        """Do nothing."""


class OnlyLooks(Looks):
    """Says that it cancels no batch."""

    may_cancel = False


def ours(
    norm: bool,
    accumulate: int,
    defaults: Literal[False, "quiet"],
    phase: Literal["training", "validation"],
    *kinds: type[Callback],
) -> float:
    """Return the collectives of a batch of a learner, which has a callback of each of these kinds."""
    dist.init_process_group("gloo")
    counts = list[int]()
    for batches in (FEW, MANY):
        data = (classes(batches), classes(2)) if phase == "training" else (classes(4), classes(batches))
        core = TorchCore(device="cpu", accumulate=accumulate)
        with Learner(
            model(norm), cross_entropy, data=data, optimizer=SGD, core=core, default_callbacks=defaults,
            callbacks=[kind() for kind in kinds],
        ) as learner:  # fmt: skip
            before = collectives()
            learner.fit(1)
            counts.append(collectives() - before)
    return (counts[1] - counts[0]) / (MANY - FEW)


@pytest.mark.parametrize("defaults", [False, "quiet"])
@pytest.mark.parametrize(("norm", "accumulate"), [(False, 1), (False, 4), (True, 1)])
def test_a_training_batch_has_those_of_the_gradients(
    norm: bool, accumulate: int, defaults: Literal[False, "quiet"], ranks: Ranks
) -> None:
    # By hand DDP also sends the two buffers of batch norm, which flowtrain makes equal at the end of an epoch.
    assert ranks.values(by_hand, norm, accumulate) == [1 / accumulate + 2 * norm] * 2
    assert ranks.values(ours, norm, accumulate, defaults, "training") == [1 / accumulate] * 2


@pytest.mark.parametrize(("kind", "accumulate", "count"), [(Looks, 1, 1), (Looks, 4, 1), (OnlyLooks, 4, 1 / 4)])
def test_a_batch_that_only_accumulates_has_a_message_if_a_callback_may_cancel_it(
    kind: type[Callback], accumulate: int, count: float, ranks: Ranks
) -> None:
    assert ranks.values(ours, False, accumulate, "quiet", "training", kind) == [count] * 2


@pytest.mark.parametrize("defaults", [False, "quiet"])
def test_a_batch_of_validation_has_none(defaults: Literal[False, "quiet"], ranks: Ranks) -> None:
    assert ranks.values(ours, True, 1, defaults, "validation") == [0, 0]


def around(validates: bool) -> tuple[int, int]:
    """Return the collectives of an epoch, and of a fit beside its epochs, without those of its batches."""
    dist.init_process_group("gloo")
    counts = list[int]()
    for epochs in (1, 3):
        data = (classes(FEW), classes(2)) if validates else classes(FEW)
        core = TorchCore(device="cpu")
        with Learner(
            model(False), cross_entropy, data=data, optimizer=SGD, core=core, default_callbacks="quiet"
        ) as learner:
            learner.fit(1)  # DDP is made, and its buckets are sent, in the first fit
            before = collectives()
            learner.fit(epochs)
            counts.append(collectives() - before - epochs * FEW)
    epoch = (counts[1] - counts[0]) // 2
    return epoch, counts[0] - epoch


@pytest.mark.parametrize(("validates", "epoch", "fit"), [(False, 5, 3), (True, 9, 4)])
def test_the_collectives_of_an_epoch_and_of_a_fit(validates: bool, epoch: int, fit: int, ranks: Ranks) -> None:
    """An epoch meets at its begin, the end of its batches, the merging and its end; training at its first batch too.

    A fit meets for its plan, which takes two collectives if it is longer than the first one carries, and at its ends.
    """
    assert ranks.values(around, validates) == [(epoch, fit)] * 2
