"""Training on several ranks is that of a loop that is written by hand with DDP, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from flowtrain import Learner, TorchCore
from flowtrain.examples.gan import GANPhase
from tests.ranks.by_hand import classes, differing, points, train, train_gan, trained
from tests.support.ranks import Ranks, rank, returned

EPOCHS = 3
SGD = partial(torch.optim.SGD, lr=0.1)


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), *between, nn.ReLU(), nn.Linear(16, 4))


@dataclass(frozen=True)
class Case:
    """A training that flowtrain and the loop by hand both do."""

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[Any], torch.optim.Optimizer] = SGD
    accumulate: int = 1
    clip: float | None = None


CASES = {
    "plain": Case(),
    "momentum": Case(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
    "AdamW": Case(optimizer=partial(torch.optim.AdamW, lr=0.01)),
    "batch norm": Case(lambda: mlp(nn.BatchNorm1d(16))),
    "a short last group": Case(accumulate=3),
    "clipping": Case(clip=0.5),
    "dropout": Case(lambda: mlp(nn.Dropout(0.3))),
    "all of it": Case(
        lambda: mlp(nn.BatchNorm1d(16), nn.Dropout(0.3)),
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        accumulate=3,
        clip=0.5,
    ),
}


def seeded(make: Callable[[], Any]) -> Any:
    """Make a model that is equal on all ranks; from then on each rank draws numbers of its own."""
    torch.manual_seed(3)
    made = make()
    torch.manual_seed(10 + rank())
    return made


def both(name: str) -> tuple[list[str], dict[str, Any], float]:
    """Return the paths at which the two trainings differ on this rank, the result of flowtrain, and how far it is."""
    case = CASES[name]
    dist.init_process_group("gloo")
    plain = seeded(case.model)
    hand = trained(plain, train(plain, case.optimizer, [classes()] * EPOCHS, case.accumulate, case.clip))
    core = TorchCore(device="cpu", accumulate=case.accumulate, clip_grad_norm=case.clip)
    model = seeded(case.model)
    with Learner(
        model, cross_entropy, data=classes(), optimizer=case.optimizer, core=core, default_callbacks="quiet"
    ) as learner:
        learner.fit(EPOCHS)
        assert learner.model is model
        found = trained(model, learner.optimizer)
    apart = max(float((a - b).abs().max()) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    return differing(hand, found), found, apart


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_training_by_hand(name: str, ranks: Ranks) -> None:
    (main, first, _), (other, second, _) = ranks.values(both, name)
    assert main == []
    # Buffers of other ranks than the main one are those of their own batches by hand; flowtrain makes all equal.
    assert [path for path in other if "buffers" not in path] == []
    assert differing(first, second) == []


@pytest.mark.parametrize("name", ["momentum", "a short last group"])
def test_four_ranks_are_equal(name: str, ranks: Ranks) -> None:
    (_, first, apart), *others = returned(ranks.run_on(4, 30, both, name))
    assert [differing(first, found) for _, found, _ in others] == [[], [], []]
    # The order in which four numbers are added depends on their place in a bucket, which flowtrain's flags change.
    assert apart < 1e-5


def both_gans() -> tuple[list[str], list[str]]:
    dist.init_process_group("gloo")
    adam = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
    gen, disc = seeded(networks)
    hand = train_gan(gen, disc, adam, [points()] * EPOCHS)
    expected = [trained(gen, hand["gen"]), trained(disc, hand["disc"])]
    gen, disc = seeded(networks)
    with Learner(
        {"gen": gen, "disc": disc},
        binary_cross_entropy_with_logits,
        data={GANPhase: points()},
        optimizer={"gen": adam, "disc": adam},
        core=TorchCore(device="cpu"),
        default_callbacks="quiet",
    ) as learner:
        learner.fit(EPOCHS)
        found = [trained(gen, learner.optimizer.gen), trained(disc, learner.optimizer.disc)]
    return differing(expected[0], found[0]), differing(expected[1], found[1])


def networks() -> tuple[nn.Module, nn.Module]:
    gen = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    return gen, nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))


def test_two_models_and_optimizers_train_as_by_hand(ranks: Ranks) -> None:
    assert ranks.values(both_gans) == [([], []), ([], [])]
