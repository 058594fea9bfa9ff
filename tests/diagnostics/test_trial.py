"""Trials: what is looked at stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

from flowtrain.diagnostics.scratch_learner import CannotLook, borrowed, first_batch, untouched


class Stateful(Sampler[int]):
    """Gives other indices in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([self.passes, self.passes + 1, self.passes + 2, self.passes + 3])


DATA = TensorDataset(torch.arange(12.0))


def seeded(**settings: Any) -> DataLoader[Any]:
    return DataLoader(DATA, shuffle=True, generator=torch.Generator().manual_seed(5), **settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: seeded(batch_size=4),
        lambda: seeded(batch_size=4, num_workers=1, persistent_workers=True, timeout=30),
        lambda: DataLoader(DATA, batch_size=3, sampler=Stateful()),
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(Stateful(), 2, drop_last=False)),
        lambda: DataLoader(DATA, batch_size=None, sampler=Stateful()),
        lambda: [[torch.zeros(2)], [torch.ones(2)]],
        lambda: ([torch.zeros(2)],),
    ],
    ids=["generator", "workers", "sampler", "batch sampler", "no batching", "list", "tuple"],
)
def test_the_first_batch_is_the_one_that_training_gets_next(make: Any) -> None:
    loader = make()
    with untouched():
        [[seen]] = first_batch(loader)
        assert torch.equal(first_batch(loader)[0][0], seen)
    seen += 0
    assert torch.equal(next(iter(loader))[0], seen)


def test_what_is_done_to_the_batch_is_not_done_to_the_data() -> None:
    data = [torch.zeros(2)]
    first_batch(data)[0].add_(1)
    assert data[0].tolist() == [0, 0]


def test_no_batch() -> None:
    assert first_batch([]) == []
    assert first_batch(DataLoader(DATA, batch_size=20, drop_last=True)) == []


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it was asked")


class Locked(Stateful):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (iter([1]), "a list_iterator is asked for batches by training alone"),
        (DataLoader(Stream()), "an IterableDataset may lose what it gives"),
        (DataLoader(DATA, sampler=Locked()), "its samplers cannot be copied: TypeError: no copies"),
    ],
)
def test_loaders_that_are_left_alone(loader: Any, reason: str) -> None:
    with pytest.raises(CannotLook) as raised:
        first_batch(loader)
    assert str(raised.value) == reason


def test_a_borrowed_model_shares_parameters_and_nothing_else() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    copied = borrowed(model)
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(copied.buffers(), model.buffers(), strict=True))
    assert borrowed(torch.nn.functional.mse_loss) is torch.nn.functional.mse_loss


def test_a_model_that_cannot_be_copied() -> None:
    model = torch.nn.Linear(1, 1)
    model.kept = iter([1])  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    model.lock = (each for each in [1])  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CannotLook, match="it cannot be copied: TypeError: cannot pickle 'generator' object"):
        borrowed(model)
