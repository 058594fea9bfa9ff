"""The data of several ranks, in real processes: shares that fit together, and first batches that are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from flowtrain import RankError, TorchCore
from flowtrain.data.rank_loaders import LoaderDivider, check_first_batches
from flowtrain.testing import tiny_learner
from flowtrain.training.fit_data import set_epoch
from tests.support.ranks import Ranks, rank

DATA = "The data for TrainingPhase()"


class Numbers(Dataset[torch.Tensor]):
    """The numbers below 7, with noise, as augmentation adds it."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(())])


def exchange(payload: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, payload)
    return found


def passes(workers: int) -> list[list[int]]:
    """Return the samples that each rank gets in two passes; the generators of the ranks differ."""
    dist.init_process_group("gloo")
    torch.manual_seed(rank())
    loader = DataLoader(Numbers(), 2, shuffle=True, num_workers=workers)
    share = LoaderDivider(rank(), dist.get_world_size(), 3).of(loader, DATA, training=True)
    seen = list[int]()
    for number in (0, 1):
        set_epoch(share.loader, number)
        batches = list(share.loader)
        check_first_batches(exchange(share.fingerprints(batches[0])), DATA, share)
        seen += [int(index) for batch in batches for index, _ in batch]
    return exchange(seen)


def test_the_shares_of_the_ranks_are_the_data(ranks: Ranks) -> None:
    for workers in (0, 2):
        first, second = ranks.values(passes, workers)
        assert first == second
        for begin in (0, 4):  # each rank has 4 of the 7 samples in a pass, and one sample comes twice
            both = [index for seen in first for index in seen[begin : begin + 4]]
            assert (len(both), set(both)) == (8, set(range(7)))
        assert first[0][:4] != first[0][4:]


def compare(seed: int | None) -> None:
    """Compare first batches, which are the same on all ranks if there is a seed."""
    dist.init_process_group("gloo")
    torch.manual_seed(rank() if seed is None else seed)
    batches = [{"x": torch.randn(4), "text": ["a", {"b"}], "types": [Numbers, object]}]
    share = LoaderDivider(rank(), dist.get_world_size(), 3).of(batches, DATA, training=True)
    check_first_batches(exchange(share.fingerprints(batches[0])), DATA, share)


def test_all_ranks_refuse_the_same_first_batch(ranks: Ranks) -> None:
    assert ranks.values(compare, None) == [None, None]
    for size in (2, 3):
        outcomes = ranks.run_on(size, 20, compare, 1)
        assert [outcome.ended for outcome in outcomes] == [RankError.__name__] * size
        assert {outcome.error.text for outcome in outcomes if outcome.error} == {
            f"{DATA} gives ranks 0 and 1 the same first batch, so they would compute the same gradients. Pass a "
            f"DataLoader over a dataset, which flowtrain divides; or let each rank have batches of its own, such as "
            f"batches[rank::{size}] with rank = torch.distributed.get_rank()."
        }


class Overstated:
    """A loader whose length says 5, and which gives 3 batches on rank 1."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(3 if rank() else 5):
            yield torch.full((2, 1), number + rank() / 2), torch.ones(2, 1)


def overstated(uneven: Literal["stop", "error"]) -> tuple[int, str]:
    """Return the number of updates of two epochs, and the parameter."""
    with tiny_learner(data=Overstated(), core=TorchCore(device="cpu", uneven=uneven)) as learner:
        learner.fit(2)
        return learner.state.updates, repr(learner.model.coeff.item())


def test_a_loader_with_fewer_batches_than_its_length_ends_the_epoch_on_all_ranks(ranks: Ranks) -> None:
    one, two = ranks.values(overstated, "stop")
    assert one == two
    assert one[0] == 6
    text = (
        "The loader for TrainingPhase has given 3 batches, and its length is at least 5. Let its __len__ return the "
        "number of batches that it gives, or raise a TypeError."
    )
    other, own = ranks.run_on(2, 30, overstated, "error")
    assert (other.ended, own.ended) == ("RemoteError", "DataError")
    assert own.error is not None
    assert other.error is not None
    assert own.error.text == text
    assert other.error.text == f"rank 1: DataError: {text}"
