"""Random numbers of the process and of loaders continue from a saved state."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from flowtrain.training.checkpoint.rng import loader_state, random_state, set_loader_state, set_random_state

DATA: Any = list(range(20))


def drawn() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


def test_the_process_goes_on_where_it_was() -> None:
    with torch.random.fork_rng():
        random.gauss(0, 1)  # each generator keeps a second number, which belongs to its state
        np.random.randn()
        file = io.BytesIO()
        torch.save(random_state(), file)  # a file, as for a checkpoint
        first = drawn()
        assert drawn() != first
        file.seek(0)
        set_random_state(torch.load(file, weights_only=True))
        assert drawn() == first


@pytest.mark.parametrize("place", ["loader", "sampler", "batch sampler"])
def test_a_loader_with_a_generator_of_its_own_draws_the_same_again(place: str) -> None:
    own = torch.Generator().manual_seed(3)
    sampler = RandomSampler(DATA, generator=own)
    loader: DataLoader[Any] = {
        "loader": lambda: DataLoader(DATA, shuffle=True, generator=own),
        "sampler": lambda: DataLoader(DATA, sampler=sampler),
        "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(sampler, 4, drop_last=False)),
    }[place]()
    list(loader)
    state = loader_state(loader)
    first = torch.cat(list(loader))
    assert not torch.equal(torch.cat(list(loader)), first)
    assert not set_loader_state(loader, state)
    assert torch.equal(torch.cat(list(loader)), first)


def test_a_loader_that_keeps_its_position_is_asked_for_it() -> None:
    class Keeps:
        at = 7

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    loader = Keeps()
    state = loader_state(loader)
    loader.at = 9
    assert set_loader_state(loader, state)
    assert loader.at == 7
    assert not set_loader_state([1, 2], state)  # a list has no position
