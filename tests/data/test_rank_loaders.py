"""`LoaderDivider`: the share of each rank in a loader, with its values, and the texts about loaders that stay whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from flowtrain import DataError, RankError
from flowtrain.data import CombinedLoader
from flowtrain.data.loaders import LimitedLoader
from flowtrain.data.rank_loaders import LoaderDivider, RankSampler, Share, check_first_batches, without_share
from flowtrain.training.fit_data import check_gave, set_epoch
from tests.support.untyped import untyped

DATA = "The data for TrainingPhase()"


class Numbers(Dataset[int]):
    """The whole numbers below a limit, which may change."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Rows(Dataset[torch.Tensor]):
    """The rows of a tensor, also several at once."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.rows[index]


class Stream(IterableDataset[int]):
    """A stream, whose length nobody knows."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class Odd(Sampler[int]):
    """A sampler of a user."""

    def __iter__(self) -> Iterator[int]:
        return iter((1, 3))

    def __len__(self) -> int:
        return 2


def shares(loader: Any, size: int = 2, *, training: bool, seed: int = 0, what: str = DATA) -> list[Share]:
    """Return the shares of all ranks in a loader."""
    return [LoaderDivider(rank, size, seed).of(loader, what, training=training) for rank in range(size)]


def indices(share: Share) -> list[list[int]]:
    """Return the batches of a pass, each as a list."""
    return [torch.as_tensor(batch).reshape(-1).tolist() for batch in share.loader]


def flat(share: Share) -> list[int]:
    return [each for batch in indices(share) for each in batch]


# --- how many samples an epoch has


@pytest.mark.parametrize(
    ("count", "size", "batch_size", "drop_last", "samples", "batches"),
    [
        (12, 2, 3, False, 6, 2),
        (12, 2, 4, False, 6, 2),
        (12, 2, 4, True, 6, 1),
        (11, 2, 3, False, 6, 2),  # one sample comes twice
        (11, 2, 3, True, 5, 1),  # one sample is left out, and two of each rank do not fill a batch
        (11, 4, 2, False, 3, 2),
        (11, 4, 2, True, 2, 1),
        (3, 4, 2, False, 1, 1),
        (1, 4, 2, False, 1, 1),
        (10, 3, 1, False, 4, 4),
        (10, 3, 1, True, 3, 3),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_of_training(
    count: int, size: int, batch_size: int, drop_last: bool, samples: int, batches: int, shuffle: bool
) -> None:
    loader = DataLoader(Numbers(count), batch_size, shuffle=shuffle, drop_last=drop_last)
    of_ranks = shares(loader, size, training=True, seed=5)
    for rank, share in enumerate(of_ranks):
        set_epoch(share.loader, 2)
        torch_sampler: DistributedSampler[int] = DistributedSampler(
            Numbers(count), size, rank, shuffle, seed=5, drop_last=drop_last
        )
        torch_sampler.set_epoch(2)
        by_hand = DataLoader(Numbers(count), batch_size, sampler=torch_sampler, drop_last=drop_last)
        assert [batch.tolist() for batch in by_hand] == indices(share)
        assert len(share.loader.sampler) == len(torch_sampler) == samples
        assert len(share.loader) == len(by_hand) == batches == share.least
        assert isinstance(share.loader.sampler, DistributedSampler)
    every = [index for share in of_ranks for index in share.loader.sampler]
    assert len(every) == samples * size
    if not drop_last:
        assert set(every) == set(range(count))  # no sample is left out


@pytest.mark.parametrize(
    ("count", "size", "batch_size", "samples", "batches"),
    [
        (12, 2, 3, [6, 6], [2, 2]),
        (11, 2, 3, [6, 5], [2, 2]),
        (7, 2, 3, [4, 3], [2, 1]),
        (11, 4, 2, [3, 3, 3, 2], [2, 2, 2, 1]),
        (3, 4, 2, [1, 1, 1, 0], [1, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_of_evaluation_has_each_sample_once(
    count: int, size: int, batch_size: int, samples: list[int], batches: list[int], shuffle: bool
) -> None:
    of_ranks = shares(DataLoader(Numbers(count), batch_size, shuffle=shuffle), size, training=False)
    assert [len(flat(share)) for share in of_ranks] == [len(share.loader.sampler) for share in of_ranks] == samples
    assert [len(indices(share)) for share in of_ranks] == [len(share.loader) for share in of_ranks] == batches
    assert sorted(index for share in of_ranks for index in flat(share)) == list(range(count))
    assert {share.least for share in of_ranks} == {min(batches)}
    if not shuffle:
        assert [flat(share) for share in of_ranks] == [list(range(rank, count, size)) for rank in range(size)]


def test_a_rank_without_samples_has_an_epoch_without_batches() -> None:
    first, second = (share.loader for share in shares(DataLoader(Numbers(1)), training=False))
    assert (without_share(first), without_share(second)) == (False, True)
    check_gave(0, untyped(None), second)
    with pytest.raises(DataError, match=r"gives no batch"):
        check_gave(0, untyped(None), first)
    assert not any(map(without_share, ([], DataLoader(Numbers(0)))))
    assert without_share(LimitedLoader(second, 3))


@pytest.mark.parametrize(("count", "batch_size"), [(7, 4), (1, 1)])
def test_no_batch_on_any_rank_is_refused_on_all(count: int, batch_size: int) -> None:
    loader = DataLoader(Numbers(count), batch_size, drop_last=True)
    for rank in (0, 1):
        with pytest.raises(DataError) as caught:
            LoaderDivider(rank, 2, 0).of(loader, DATA, training=True)
        assert str(caught.value) == (
            f"{DATA} (DataLoader) gives no batch on any of 2 ranks: each of them gets at most {count // 2} of {count} "
            f"samples, and a batch with drop_last=True has {batch_size}. Use fewer ranks, a smaller batch_size, or "
            f"drop_last=False."
        )


def test_a_dataset_that_grows_is_divided_anew() -> None:
    data = Numbers(4)
    for training in (True, False):
        data.count = 4
        share = shares(DataLoader(data, 2), training=training)[1]
        assert flat(share) == [1, 3]
        data.count = 8
        assert (flat(share), len(share.loader)) == ([1, 3, 5, 7], 2)


# --- what the loader of a rank has in common with the user's


class Own(DataLoader[int]):
    """A loader of a user, with a constructor of its own."""

    def __init__(self, limit: int) -> None:
        super().__init__(Numbers(limit), batch_size=2)
        self.more = "kept"

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's type is private
        for batch in super().__iter__():
            yield batch + 100


def double(batch: Sequence[int]) -> torch.Tensor:
    return torch.tensor(batch) * 2


def begin(worker: int) -> None:
    """Begin a worker."""


def test_all_other_arguments_are_those_of_the_user() -> None:
    given = DataLoader(
        Numbers(9), 2, shuffle=True, num_workers=2, collate_fn=double, pin_memory=True, drop_last=True, timeout=30,
        worker_init_fn=begin, multiprocessing_context="spawn", generator=torch.Generator(), prefetch_factor=3,
        persistent_workers=True, in_order=False,
    )  # fmt: skip
    made = shares(given, training=True)[0].loader
    same = (
        "dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
        "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers", "in_order",
    )  # fmt: skip
    assert {name: getattr(made, name) for name in same} == {name: getattr(given, name) for name in same}
    assert isinstance(given.sampler, RandomSampler)  # the user's loader stays as it is
    assert isinstance(made.batch_sampler, BatchSampler)
    assert (made.batch_sampler.sampler is made.sampler, made.batch_sampler.drop_last) == (True, True)


def test_a_subclass_stays_one() -> None:
    made = shares(Own(7), training=False)[1].loader
    assert (type(made), made.more) == (Own, "kept")
    assert [batch.tolist() for batch in made] == [[101, 103], [105]]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_share_too(workers: int) -> None:
    made = shares(DataLoader(Numbers(6), 2, num_workers=workers, collate_fn=double), training=True)[1].loader
    assert [batch.tolist() for batch in made] == [[2, 6], [10]]


def test_a_loader_is_divided_once() -> None:
    """Persistent workers belong to a loader, so a second fit gets the loader of the first one."""
    shards, loader, limited = LoaderDivider(0, 2, 0), DataLoader(Numbers(8)), DataLoader(Numbers(6))
    made = shards.of(loader, DATA, training=True).loader
    assert shards.of(loader, DATA, training=True).loader is made
    assert shards.of(loader, DATA, training=False).loader is not made
    of_limited = shards.of(LimitedLoader(limited, 2), DATA, training=True).loader
    assert (list(map(int, of_limited)), len(of_limited)) == ([0, 2], 2)  # the limit is one of each rank
    assert shards.of(limited, DATA, training=True).loader is of_limited.loader
    both = CombinedLoader((loader, limited))
    assert shards.of(both, DATA, training=True).loader.loaders[0] is made


def test_the_loader_of_a_rank_can_be_passed_again() -> None:
    shards = LoaderDivider(1, 2, 0)
    made = shards.of(DataLoader(Numbers(5)), DATA, training=True)
    assert flat(made) == [1, 3, 0]
    assert shards.of(made.loader, DATA, training=True).loader is made.loader
    once = shards.of(made.loader, DATA, training=False)
    assert flat(once) == [1, 3]
    assert shards.of(once.loader, DATA, training=False).loader is once.loader


# --- samplers


def test_the_order_follows_from_seed_and_pass_alone() -> None:
    """The generators of the process may differ between ranks, and a resumed pass must have its order again."""
    share = shares(DataLoader(Numbers(20), shuffle=True, generator=torch.Generator()), training=True, seed=3)[0]
    state = torch.get_rng_state()
    orders = []
    for number in (0, 1, 0):
        set_epoch(share.loader, number)
        orders.append(list(share.loader.sampler))
        torch.rand(3)
    torch.set_rng_state(state)
    assert orders[0] == orders[2] != orders[1]
    list(share.loader.sampler)
    assert torch.equal(torch.get_rng_state(), state)
    other = shares(DataLoader(Numbers(20), shuffle=True), training=True, seed=4)[0]
    assert list(other.loader.sampler) != orders[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(20), replacement=True, num_samples=9),
        RandomSampler(range(4), num_samples=9),
        SubsetRandomSampler([3, 5, 7, 11, 13, 17, 19, 23, 29]),
        WeightedRandomSampler([0.1, 0.4, 0.5], 9),
        WeightedRandomSampler([0.1] * 12, 9, replacement=False),
    ],
)
def test_samplers_of_torch_are_divided(sampler: Any, training: bool) -> None:
    """The ranks together have the samples of one process, however the sampler chooses them."""
    of_ranks = shares(DataLoader(Numbers(30), 2, sampler=sampler), training=training, seed=7)
    for share in of_ranks:
        set_epoch(share.loader, 1)
    first, second = map(flat, of_ranks)
    generator = torch.Generator()
    generator.manual_seed(7 + 1)
    sampler.generator = generator
    order = list(sampler)
    assert first == order[::2]
    assert second == [*order[1::2], *([order[0]] if training else [])]
    assert not of_ranks[0].remedy


def test_a_batch_sampler_of_torch_is_divided_inside() -> None:
    loader = DataLoader(Numbers(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 2, drop_last=True))
    assert [indices(share) for share in shares(loader, training=True)] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    assert [indices(share) for share in shares(loader, training=False)] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    batches: Any = BatchSampler(RandomSampler(range(9)), 4, drop_last=False)
    of_rows = DataLoader(Rows(torch.arange(9)), sampler=batches, batch_size=None)
    first, second = (sorted(flat(share)) for share in shares(of_rows, training=False))
    assert (len(first), len(second), sorted(first + second)) == (5, 4, list(range(9)))


def test_a_dataset_of_batches_is_divided() -> None:
    loader = DataLoader(Numbers(5), batch_size=None)
    assert [indices(share) for share in shares(loader, training=False)] == [[[0], [2], [4]], [[1], [3]]]


def test_the_users_distributed_sampler_is_kept_in_training() -> None:
    loader = DataLoader(Numbers(5), sampler=DistributedSampler(Numbers(5), 2, 1, seed=9))
    assert LoaderDivider(1, 2, 0).of(loader, DATA, training=True) == Share(loader)


@pytest.mark.parametrize(("replicas", "rank"), [(4, 1), (2, 0), (1, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_sampler_for_another_rank_is_refused(replicas: int, rank: int, training: bool) -> None:
    loader = DataLoader(Numbers(8), 2, sampler=DistributedSampler(Numbers(8), replicas, rank))
    with pytest.raises(DataError) as caught:
        LoaderDivider(1, 2, 0).of(loader, DATA, training=training)
    assert str(caught.value) == (
        f"{DATA} has a DistributedSampler with num_replicas={replicas}, rank={rank}, and this is rank 1 of 2. Leave "
        f"the sampler out, and flowtrain puts one in; or write num_replicas=torch.distributed.get_world_size(), "
        f"rank=torch.distributed.get_rank()."
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_in_evaluation_a_sampler_that_repeats_samples_is_replaced(shuffle: bool) -> None:
    def loader(count: int, rank: int, drop_last: bool = False) -> DataLoader[int]:
        sampler: DistributedSampler[int] = DistributedSampler(
            Numbers(count), 2, rank, shuffle, seed=6, drop_last=drop_last
        )
        return DataLoader(Numbers(count), 2, sampler=sampler)

    padded = [LoaderDivider(rank, 2, 0).of(loader(5, rank), DATA, training=False) for rank in (0, 1)]
    assert sorted(flat(padded[0]) + flat(padded[1])) == [0, 1, 2, 3, 4]
    assert flat(padded[0]) == [int(index) for index in loader(5, 0).sampler]  # the order stays
    for exact in (loader(6, 1), loader(5, 1, drop_last=True)):
        assert LoaderDivider(1, 2, 0).of(exact, DATA, training=False) == Share(exact)


def test_a_sampler_of_ones_own_that_knows_its_rank_is_kept() -> None:
    class Mine(DistributedSampler[int]):
        """A sampler that divides in its own way."""

    loader = DataLoader(Numbers(5), sampler=Mine(Numbers(5), 2, 1))
    for training in (True, False):
        assert LoaderDivider(1, 2, 0).of(loader, DATA, training=training) == Share(loader)


# --- loaders of loaders


def test_the_loaders_of_a_combined_loader_are_divided() -> None:
    both = CombinedLoader({"few": DataLoader(Numbers(4), 2), "many": DataLoader(Numbers(10), 2)}, "max_size_cycle")
    second = shares(both, training=True)[1].loader
    assert [(raw["few"].tolist(), raw["many"].tolist()) for raw in second] == [
        ([1, 3], [1, 3]),
        ([1, 3], [5, 7]),
        ([1, 3], [9]),
    ]


def test_a_loader_that_is_begun_again_is_shuffled_anew() -> None:
    few = DataLoader(Numbers(16), 8, shuffle=True)
    both = CombinedLoader((few, DataLoader(Numbers(48), 8)), "max_size_cycle")
    of_ranks = [share.loader for share in shares(both, training=True)]

    def epoch(loader: Any) -> list[tuple[int, ...]]:
        set_epoch(loader, 4)
        return [tuple(raw[0].tolist()) for raw in loader]

    first, second = epoch(of_ranks[0]), epoch(of_ranks[1])
    assert len(set(first)) == len(set(second)) == 3  # three passes in three orders
    assert all(sorted(one + other) == list(range(16)) for one, other in zip(first, second, strict=True))
    assert (epoch(of_ranks[0]), epoch(of_ranks[1])) == (first, second)


def test_too_few_samples_for_a_loader_of_a_combined_one_are_refused_on_all_ranks() -> None:
    both = CombinedLoader({"a": DataLoader(Numbers(1)), "b": DataLoader(Numbers(4))})
    for rank in (0, 1):
        with pytest.raises(DataError) as caught:
            LoaderDivider(rank, 2, 0).of(both, DATA, training=False)
        assert str(caught.value) == (
            f"{DATA}: the loader 'a' of CombinedLoader has too few samples to give each of 2 ranks a batch. Use fewer "
            f"ranks, or pass it as the data of a phase of its own."
        )


# --- what the user is told


@pytest.mark.parametrize(
    ("count", "training", "drop_last", "note"),
    [
        (12, True, False, "gives each of 2 ranks 6 of 12 samples, in 2 batches."),
        (
            11,
            True,
            False,
            "gives each of 2 ranks 6 of 11 samples, in 2 batches; the first 1 of an epoch come twice, so that the "
            "ranks have equally many.",
        ),
        (
            11,
            True,
            True,
            "gives each of 2 ranks 5 of 11 samples, in 1 batches; the last 1 of an epoch are left out "
            "(drop_last=True).",
        ),
        (11, False, False, "gives each of 2 ranks 5 or 6 of 11 samples, in 2 batches."),
        (9, False, False, "gives each of 2 ranks 4 or 5 of 9 samples, in 1 or 2 batches."),
    ],
)
def test_notes(count: int, training: bool, drop_last: bool, note: str) -> None:
    loader = DataLoader(Numbers(count), 4, drop_last=drop_last)
    for share in shares(loader, training=training):
        assert share.notes == (f"{DATA}: a DistributedSampler {note}",)


WHOLE = "flowtrain cannot divide: each of 2 ranks uses it whole."


@pytest.mark.parametrize(
    ("loader", "note"),
    [
        (
            [torch.zeros(2)],
            f"{DATA} is a list, which {WHOLE} Pass a DataLoader over a dataset, which flowtrain divides; or let each "
            f"rank have batches of its own, such as batches[rank::2] with rank = torch.distributed.get_rank().",
        ),
        (
            DataLoader(Stream()),
            f"{DATA} reads a Stream, a stream, which {WHOLE} Let the dataset give each rank samples of its own, such "
            f"as itertools.islice(samples, rank, None, 2) with rank = torch.distributed.get_rank().",
        ),
        (
            DataLoader(Numbers(5), sampler=Odd()),
            f"{DATA} has a sampler of its own, a Odd, which {WHOLE} Let the sampler give each rank indices of its own, "
            f"such as indices[rank::2] with rank = torch.distributed.get_rank(), or use a sampler of torch.",
        ),
        (
            DataLoader(Numbers(5), batch_sampler=BatchSampler(Odd(), 2, False)),
            f"{DATA} has a sampler of its own, a Odd, which {WHOLE} Let the sampler give each rank indices of its own, "
            f"such as indices[rank::2] with rank = torch.distributed.get_rank(), or use a sampler of torch.",
        ),
    ],
)
def test_other_loaders_are_used_as_they_are(loader: Any, note: str) -> None:
    for training in (True, False):
        share = LoaderDivider(0, 2, 0).of(loader, DATA, training=training)
        assert (share.loader is loader, share.notes, bool(share.remedy)) == (True, (note,), True)


# --- equal first batches


def first_prints(of_ranks: list[Share]) -> list[tuple[str, ...]]:
    return [share.fingerprints(next(iter(share.loader))) for share in of_ranks]


def test_the_same_first_batch_is_refused_with_what_to_write() -> None:
    of_ranks = shares([torch.tensor([1.0, 2.0])], 3, training=True)
    with pytest.raises(RankError) as caught:
        check_first_batches(first_prints(of_ranks), DATA, of_ranks[0])
    assert str(caught.value) == (
        f"{DATA} gives ranks 0 and 1 the same first batch, so they would compute the same gradients. Pass a DataLoader "
        f"over a dataset, which flowtrain divides; or let each rank have batches of its own, such as batches[rank::3] "
        f"with rank = torch.distributed.get_rank()."
    )
    prints = [("a",), ("b",), ("a",)]
    with pytest.raises(RankError, match="gives ranks 0 and 2 the same first batch"):
        check_first_batches(prints, DATA, of_ranks[0])


def test_different_first_batches_and_batches_without_data_pass() -> None:
    of_ranks = [shares([torch.tensor([1.0, number])], training=True)[0] for number in (2.0, 3.0)]
    check_first_batches(first_prints(of_ranks), DATA, of_ranks[0])
    numbers = shares(range(5), training=True)
    assert first_prints(numbers) == [("",), ("",)]
    check_first_batches(first_prints(numbers), DATA, numbers[0])


def test_a_divided_loader_is_not_compared() -> None:
    """Its ranks have different samples for certain, and samples may be equal."""
    of_ranks = shares(DataLoader(Rows(torch.tensor([[1, 2], [1, 2]]))), training=True)
    assert first_prints(of_ranks) == [(), ()]
    check_first_batches([(), ()], DATA, of_ranks[0])


def test_the_loaders_of_a_combined_loader_are_compared_each() -> None:
    both = CombinedLoader({"a": DataLoader(Numbers(4)), "b": DataLoader(Stream(), batch_size=2)})
    of_ranks = shares(both, training=True)
    prints = first_prints(of_ranks)
    assert [len(each) for each in prints] == [1, 1]
    with pytest.raises(RankError, match=r"same first batch.* Let the dataset give each rank samples of its own"):
        check_first_batches(prints, DATA, of_ranks[0])


def test_ceil_and_floor_for_many_sizes() -> None:
    """The counts hold for every number of samples, ranks and samples of a batch."""
    for count in range(1, 14):
        for size in (1, 2, 3, 5):
            for batch_size in (1, 2, 3):
                train = [share.loader for share in shares(DataLoader(Numbers(count), batch_size), size, training=True)]
                assert {len(loader) for loader in train} == {ceil(ceil(count / size) / batch_size)}
                evaluate = shares(DataLoader(Numbers(count), batch_size), size, training=False)
                assert sum(len(share.loader.sampler) for share in evaluate) == count
                assert all(isinstance(share.loader.sampler, RankSampler) for share in evaluate)
