"""Resume on one of several ranks: the position within the share of a loader, and batches that are taken early."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from flowtrain import BatchEnd, Callback, Learner, LearnerView, Read, TrainingPhase, on
from flowtrain.data import CombinedLoader
from flowtrain.data.rank_loaders import LoaderDivider
from flowtrain.training.checkpoint.position import loader_start, replay
from flowtrain.training.checkpoint.rng import (
    loader_state,
    set_loader_state,
)

RANKS = 2


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that know their index, with random noise at each access."""

    def __init__(self, count: int = 21) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([index, torch.randn(()), random.random()]), torch.ones(2)


class Asks(Callback):
    """Notes the inputs of each batch, and asks for a checkpoint in one of them."""

    def __init__(self, path: Path | None, number: int) -> None:
        self.path, self.number = path, number
        self.seen = list[Any]()

    def state_access(self) -> dict[str, Read]:
        return {"batch.inputs": Read()}

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.seen.append(learner.batch.inputs.tolist())
        if len(self.seen) == self.number and self.path is not None:
            learner.request_checkpoint(self.path)


def trained(
    rank: int, data: Any, fit: dict[str, Any], asks: Asks, *, seed: int, resume: Path | None = None
) -> tuple[list[Any], list[list[float]]]:
    """Train one rank; return its batches and its parameters."""
    torch.manual_seed(seed)
    random.seed(seed)
    loader = LoaderDivider(rank, RANKS, seed).of(data, "The data", training=True).loader
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 2))
    with Learner(
        model, torch.nn.functional.mse_loss, data=loader, callbacks=[asks], default_callbacks=False
    ) as learner:
        learner.fit(**fit, resume=resume)
    return asks.seen, [each.tolist() for each in model.parameters()]


@pytest.mark.parametrize("fit", [{"epochs": 3}, {"steps": 11, "validate_every": 4}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("workers", "shuffle", "number"), [(0, True, 3), (0, False, 7), (2, True, 7), (2, False, 3)])
def test_rule_28_a_rank_resumes_with_the_share_that_it_had(
    workers: int, shuffle: bool, number: int, fit: dict[str, Any], tmp_path: Path
) -> None:
    """The resumed process has another seed, for the order too: the checkpoint holds the seed of the order."""
    path, rank = tmp_path / "one.ckpt", number % RANKS

    def data() -> Any:
        return DataLoader(Augmented(), 3, shuffle=shuffle, num_workers=workers)

    batches, parameters = trained(rank, data(), fit, Asks(path, number), seed=4)
    resumed, resumed_parameters = trained(rank, data(), fit, Asks(None, 0), seed=99, resume=path)
    assert resumed == batches[number:]
    assert resumed_parameters == parameters
    orders = [[int(sample[0]) for batch in batches[begin : begin + 4] for sample in batch] for begin in (0, 4)]
    assert (orders[0] != orders[1]) == shuffle


def test_the_ranks_resume_with_shares_that_fit_together(tmp_path: Path) -> None:
    def data() -> Any:
        return DataLoader(Augmented(), 3, shuffle=True, drop_last=True)

    shares = []
    for rank in range(RANKS):
        path = tmp_path / f"{rank}.ckpt"
        trained(rank, data(), {"epochs": 2}, Asks(path, 4), seed=4)
        shares.append(trained(rank, data(), {"epochs": 2}, Asks(None, 0), seed=9, resume=path)[0])
    indices = [int(sample[0]) for share in shares for batch in share for sample in batch]
    assert len(indices) == len(set(indices)) == 2 * 2 * 3  # 10 samples a rank are 3 batches, of which 1 was done


@pytest.mark.parametrize("number", [2, 7])
def test_a_combined_loader_of_a_rank_resumes(number: int, tmp_path: Path) -> None:
    def both(seed: int) -> Any:
        few, many = (DataLoader(Augmented(count), 2, shuffle=True) for count in (8, 32))
        pairs = CombinedLoader((few, many), "max_size_cycle")
        return LoaderDivider(1, RANKS, seed).of(pairs, "The data", training=True).loader

    def plain(loader: Any) -> list[Any]:
        return [[part[0].tolist() for part in raw] for raw in loader]

    torch.manual_seed(1)
    loader = both(3)
    begun = loader_start(loader)
    whole = plain(loader)
    assert len(whole) == 8
    torch.manual_seed(5)
    assert plain(replay(both(8), begun, number, TrainingPhase())) == whole[number:]


def test_the_seed_of_a_distributed_sampler_is_part_of_the_state_of_its_loader() -> None:
    def loader(seed: int) -> DataLoader[Any]:
        return DataLoader(Augmented(), sampler=DistributedSampler(Augmented(), 2, 1, seed=seed))

    state = loader_state(loader(3))
    other = loader(8)
    set_loader_state(other, state)
    assert list(other.sampler) == list(loader(3).sampler)
    del state["seeds"]  # an earlier version wrote it
    set_loader_state(other, state)
    assert list(other.sampler) == list(loader(3).sampler)
