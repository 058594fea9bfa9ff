"""Random numbers of the process and of loaders continue from a saved state."""

from __future__ import annotations

import gc
import io
import random
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from flowtrain import (
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    Phase,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint.rng import loader_state, random_state, set_loader_state, set_random_state
from tests.support.loaders import end_workers
from tests.support.resumed import FITS, Ask, everything, learner_of, shuffled

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
    set_loader_state(loader, state)
    assert torch.equal(torch.cat(list(loader)), first)


def test_a_loader_that_keeps_a_state_is_asked_for_it() -> None:
    class Keeps:
        at = 7

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    loader = Keeps()
    state = loader_state(loader)
    loader.at = 9
    set_loader_state(loader, state)
    assert loader.at == 7
    set_loader_state([1, 2], state)  # a list keeps no state


def persistent() -> Any:
    return DataLoader(shuffled().dataset, 5, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize(
    ("fit", "event", "phase", "number", "warned"),
    [
        ("epochs", BatchEnd, TrainingPhase, 3, ""),
        ("epochs", EpochEnd, TrainingPhase, 1, "TrainingPhase"),
        ("steps", BatchEnd, TrainingPhase, 9, "TrainingPhase and ValidationPhase"),
        ("epochs", BatchEnd, ValidationPhase, 3, "TrainingPhase and ValidationPhase"),
    ],
)
def test_workers_that_stay_are_exact_but_for_what_they_draw(
    fit: str, event: type[Event], phase: type[Phase], number: int, warned: str, tmp_path: Path
) -> None:
    """Rule 28: persistent workers keep their random state to themselves; resuming warns about that once."""
    path = tmp_path / "one.ckpt"

    def run(*callbacks: Callback, **how: Any) -> dict[str, Any]:
        learner = learner_of(*callbacks, data=persistent, seed=99 if how else 0)
        validation = DataLoader(shuffled().dataset, 11, num_workers=1, persistent_workers=True)
        learner.fit(**FITS[fit], data=(learner.data[TrainingPhase], validation), **how)
        end_workers(learner.data.values())
        return everything(learner)

    wanted = run(Ask(path, event, phase, number))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(resume=path) == wanted
    texts = [str(each.message) for each in caught if "persistent_workers" in str(each.message)]
    assert len(texts) == bool(warned)
    if warned:
        assert texts[0].startswith(f"The loader for {warned} keeps its workers from one pass to the next")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 calls it
@pytest.mark.parametrize("fit", ["epochs", "steps", "stream"])
@pytest.mark.parametrize("own", [False, True], ids=["DataLoader", "StatefulDataLoader"])
def test_workers_of_a_learner_that_is_dropped_can_be_told_to_end(
    fit: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise torch waits five seconds for each of them."""
    module: Any = pytest.importorskip("torchdata.stateful_dataloader") if own else torch.utils.data
    kind = module.StatefulDataLoader if own else DataLoader
    loader: Any = kind(shuffled().dataset, 5, num_workers=1, persistent_workers=True)
    learner = tiny_learner(data=loader, model=torch.nn.Linear(3, 2))
    if fit == "epochs":
        learner.fit(1)
    else:
        learner.fit(steps=3, validate_every=2 if fit == "stream" else None)
    iterator = loader._iterator
    queue = weakref.ref(iterator._index_queues[0])
    usable: list[bool] = []
    end = type(iterator)._shutdown_workers

    def note(self: Any) -> None:
        """Note whether the queue is there when the iterator is freed."""
        usable.append(queue() is not None)
        end(self)

    monkeypatch.setattr(type(iterator), "_shutdown_workers", note)
    cycle: list[Any] = [loader]
    cycle.append(cycle)
    del learner, loader, iterator, cycle
    gc.collect()
    assert usable == [True]
    assert queue() is None
