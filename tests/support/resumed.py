"""Runs with shuffled data, dropout and a schedule, which a resumed run is compared with to the bit."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    Event,
    Learner,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import SmoothLoss, Traces, throttle

Run = Callable[..., Any]
Place: TypeAlias = tuple[type[Event], type[Phase], int]
"""The n-th event of a type in a phase."""


class Ask(Callback):
    """Requests a checkpoint at the n-th event of a type in a phase."""

    def __init__(self, path: os.PathLike[str], event: type[Event], phase: type[Phase], number: int) -> None:
        self.path, self.wanted, self.number = path, (event, phase()), number
        self.place = event, phase, number
        self.seen = 0

    @on(Event)
    def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if (type(event), phase) == self.wanted:
            self.seen += 1
            if self.seen == self.number:
                learner.request_checkpoint(self.path)


def ask_at(places: Iterable[Place], folder: Path) -> list[Ask]:
    """Return a callback for each place, which requests a checkpoint into a file of its own."""
    return [Ask(folder / f"{number}.ckpt", *place) for number, place in enumerate(places)]


class Decay(Callback):
    """A schedule with state of its own: the learning rate falls with every batch."""

    def __init__(self) -> None:
        self.batches = 0

    def state_access(self) -> Access:
        return {"optimizer.hyperparams": Write(), "cbstate.decay": Write(), "resource.rng": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.decay = {"rates": []}

    @on(BatchEnd, TrainingPhase)
    def fall(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.batches += 1
        rate = 0.01 / (1 + self.batches) * (1 + random.random() + float(np.random.rand()))
        for group in learner.optimizer.hyperparams:
            group["lr"] = rate
        learner.cbstate.decay["rates"].append(rate)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = state["batches"]


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples with new random noise at each access, as augmentation makes them."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((3,), index / 20) + 0.1 * torch.randn(3) + random.random()
        return x, x[:2] ** 2


def shuffled() -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(22, 3, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :2] ** 2), 5, shuffle=True)


def with_generator() -> Any:
    dataset = shuffled().dataset
    return DataLoader(dataset, 5, sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(5)))


def augmented() -> Any:
    return DataLoader(Noisy(), 5, shuffle=True)


def learner_of(*callbacks: Callback, data: Run = shuffled, accumulate: int = 1, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
    )
    traces = Traces({"Second": lambda learner: learner.batch.loss**2}, TrainingPhase)
    return Learner(
        model,
        torch.nn.functional.mse_loss,
        data=(data(), DataLoader(shuffled().dataset, 11)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=[Decay(), SmoothLoss(), throttle(traces, BatchEnd, every=3), *callbacks],
        default_callbacks="quiet",
        core=TorchCore(device="cpu", accumulate=accumulate),
    )


def everything(learner: Learner) -> dict[str, Any]:
    """Return all results of training that the tests compare."""
    state = learner.cbstate
    series = {
        f"{name}.{phase!r}.{key}": list(each)
        for name in ("metrics_step", "metrics_epoch", "tracehistory")
        for phase, by_name in getattr(state, name).items()
        for key, each in by_name.items()
    }
    return {
        "model": {name: value.tolist() for name, value in learner.model.state_dict().items()},
        "optimizer": [
            {key: torch.as_tensor(value).tolist() for key, value in each.items()}
            for each in learner.optimizer.state_dict()["state"].values()
        ],
        "rate": learner.optimizer.param_groups[0]["lr"],
        "history": dict(state.history),
        "smooth": {repr(phase): list(each) for phase, each in state.smooth_loss.items()},
        "decay": state.decay,
        "next": (torch.rand(1).item(), random.random(), float(np.random.rand())),
        **series,
    }


FITS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 4},
    "passes": {"steps": 17},
    "steps": {"steps": 17, "validate_every": 7},
    "long steps": {"steps": 17, "validate_every": 3},
    "rare validation": {"epochs": 5, "validate_every": 2},
    "limited": {"epochs": 4, "limit_batches": 3},
    "limited passes": {"steps": 17, "limit_batches": {TrainingPhase: 4, ValidationPhase: 0.5}},
    "limited steps": {"steps": 17, "validate_every": 7, "limit_batches": {TrainingPhase: 3}},
}
