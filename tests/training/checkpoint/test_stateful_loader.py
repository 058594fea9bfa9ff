"""Rule 28 for torchdata's StatefulDataLoader, which keeps its position itself."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from flowtrain import (
    BatchEnd,
    Callback,
    CancelEpochException,
    EpochBegin,
    EpochEnd,
    Event,
    LearnerView,
    Phase,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.data import CombinedLoader
from flowtrain.training.checkpoint.rng import restoring_loader
from tests.support.loaders import end_workers
from tests.support.resumed import FITS, Ask, Noisy, everything, learner_of, shuffled

module = pytest.importorskip("torchdata.stateful_dataloader")
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 calls it

POINTS: list[tuple[type[Event], type[Phase], int]] = [
    (EpochBegin, TrainingPhase, 1),
    (BatchEnd, TrainingPhase, 3),
    (EpochEnd, TrainingPhase, 1),
    (BatchEnd, ValidationPhase, 1),
    (EpochEnd, ValidationPhase, 2),
    (BatchEnd, TrainingPhase, 8),
]


def stateful(dataset: Dataset[Any] | None = None, **options: Any) -> Any:
    return module.StatefulDataLoader(shuffled().dataset if dataset is None else dataset, 5, **options)


class Walk(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples whose number is not known, and the position in them; with random noise unless it is left out."""

    def __init__(self, noise: bool = True) -> None:
        self.at, self.noise = 0, noise

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while self.at < 22:
            self.at += 1
            x = torch.full((3,), self.at / 20)
            if self.noise:
                x += 0.1 * torch.randn(3) + random.random()
            yield x, x[:2] ** 2
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class First(CombinedLoader):
    """Gives the batches of the first of two loaders; the shorter one is begun again."""

    def __iter__(self) -> Iterator[Any]:
        return (each[0] for each in super().__iter__())


def combined() -> First:
    few = torch.utils.data.TensorDataset(*shuffled().dataset[:6])
    return First((stateful(shuffle=True), stateful(few, shuffle=True)), mode="max_size_cycle")


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: stateful(shuffle=True),
    "with noise": lambda: stateful(Noisy(), shuffle=True),
    "generator": lambda: stateful(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "iterable": lambda: stateful(Walk()),
    "combined": combined,
}


def fit(data: Callable[[], Any], *callbacks: Callback, seed: int = 0, accumulate: int = 1, **how: Any) -> Any:
    """Return all results of a fit, with another such loader for the validation."""
    learner = learner_of(*callbacks, data=data, seed=seed, accumulate=accumulate)
    learner.fit(**how, data=(learner.data[TrainingPhase], stateful(shuffle=True)))
    end_workers(learner.data.values())
    return everything(learner)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "epochs") for kind in LOADERS] + [("with noise", name) for name in ("steps", "limited", "limited steps")],
)
def test_rule_28_a_resumed_run_is_the_uninterrupted_one(kind: str, name: str, tmp_path: Path) -> None:
    """Taking a checkpoint changes nothing either, before the first pass of a loader as well."""
    data, how = LOADERS[kind], FITS[name]
    wanted = fit(data, **how)
    points = [point for point in POINTS if name == "epochs" or point[0] is BatchEnd]
    asks = [Ask(tmp_path / f"{number}.ckpt", *point) for number, point in enumerate(points)]
    assert fit(data, *asks, **how) == wanted
    for ask in asks:
        assert fit(data, seed=99, resume=ask.path, **how) == wanted, ask.wanted


@pytest.mark.parametrize("data", [LOADERS["with noise"], lambda: stateful(Walk(noise=False))])
def test_rule_28_within_an_accumulation_group(data: Callable[[], Any], tmp_path: Path) -> None:
    """A loader of unknown length has given one more batch, to know which is the last; it begins the pass again."""
    path = tmp_path / "one.ckpt"
    wanted = fit(data, Ask(path, BatchEnd, TrainingPhase, 7), accumulate=2, epochs=3)
    assert fit(data, seed=99, accumulate=2, resume=path, epochs=3) == wanted


class Counts(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Counts the samples that are drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.drawn += 1
        x = torch.full((3,), index / 40)
        return x, x[:2]


@pytest.mark.parametrize("how", [{"epochs": 1}, {"steps": 8, "validate_every": 3}, {"epochs": 1, "limit_batches": 8}])
def test_batches_that_are_done_are_not_drawn_again(how: dict[str, Any], tmp_path: Path) -> None:
    path, drawn = tmp_path / "one.ckpt", Counts()
    fit(lambda: stateful(Counts()), Ask(path, BatchEnd, TrainingPhase, 6), **how)
    fit(lambda: stateful(drawn), resume=path, **how)
    assert drawn.drawn == 10


class Leaves(Callback):
    """Ends the second training epoch after two batches."""

    def __init__(self) -> None:
        self.batches = 0

    @on(BatchEnd, TrainingPhase)
    def leave(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.batches += 1
        if self.batches == 7:
            raise CancelEpochException

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Any) -> None:
        self.batches = state["batches"]


def test_rule_28_a_pass_that_was_left_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    wanted = fit(LOADERS["with noise"], Leaves(), Ask(path, EpochEnd, TrainingPhase, 2), epochs=4)
    assert fit(LOADERS["with noise"], Leaves(), seed=99, resume=path, epochs=4) == wanted


@pytest.mark.parametrize("begun", [False, True])
def test_a_look_at_the_batches_leaves_no_trace(begun: bool) -> None:
    def order(look: bool) -> list[Any]:
        torch.manual_seed(0)
        loader = stateful(shuffle=True)
        found = [x.tolist() for x, _ in loader] if begun else []
        if look:
            with restoring_loader(loader):
                next(iter(loader))
        return [*found, *(x.tolist() for x, _ in loader), torch.rand(1).item()]

    assert order(look=True) == order(look=False)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"snapshot_every_n_steps": 3}])
def test_rule_28_with_workers_the_order_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    """What the workers draw is not, within a pass and with workers that stay: resuming warns of it, once."""

    def data() -> Any:
        return stateful(shuffle=True, num_workers=2, **options)

    asks = [Ask(tmp_path / f"{number}.ckpt", BatchEnd, TrainingPhase, number) for number in (2, 7)]
    wanted = fit(data, *asks, epochs=3)
    for ask in asks:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert fit(data, seed=99, resume=ask.path, epochs=3) == wanted
        texts = [str(each.message) for each in caught]
        assert sum("the states of their random numbers" in text for text in texts) == 1, texts
