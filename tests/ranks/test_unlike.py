"""Ranks with unlike settings, optimizers, data or calls: all of them say so before a rank waits or diverges."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    BatchEnd,
    Callback,
    CancelFittingException,
    CoreError,
    Learner,
    LearnerView,
    RankError,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Checkpointer
from tests.support.ranks import CAN_SHARD, Ranks, needs_sharding, rank


def loader(samples: int = 32, *, shuffle: bool = True) -> Any:
    return DataLoader(TensorDataset(torch.randn(samples, 3), torch.randn(samples, 1)), 4, shuffle=shuffle)


def learner(
    core: TorchCore | None = None, data: Any = None, optimizer: Any = None, model: Any = None, callbacks: Any = ()
) -> Learner:
    return Learner(
        model or nn.Linear(3, 1), mse_loss, data=data or (loader(), loader(shuffle=False)), callbacks=callbacks,
        core=core or TorchCore(device="cpu"), optimizer=optimizer or partial(torch.optim.SGD, lr=0.1),
        default_callbacks="quiet",
    )  # fmt: skip


def one_layer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([*params][: 2 - rank()], lr=0.1)


def epoch_of_another_phase() -> None:
    learner().epoch(ValidationPhase if rank() else TrainingPhase)


def predict_alone() -> None:
    made = learner(TorchCore(device="cpu", parallel="fsdp"))
    made.fit(1)
    if rank():
        made.predict(loader(shuffle=False))
    made.fit(1)


def changed_between_fits() -> None:
    made = learner()
    made.fit(1)
    made.optimizer.param_groups[0]["lr"] = 0.1 * (1 + rank())
    made.fit(1)


def frozen() -> None:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(not rank())
    learner(model=model).fit(1)


class LateBuffer(nn.Module):
    """Makes a buffer in its first forward pass in training, on the second rank only if that is wanted."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.apart = nn.Linear(3, 1), apart

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and not hasattr(self, "shift") and not (self.apart and not rank()):
            self.register_buffer("shift", inputs.mean(0).detach())
        found: torch.Tensor = self.layer(inputs - getattr(self, "shift", 0))
        return found


class Cancels(Callback):
    """Ends the fit within its first epoch."""

    ranks = "every"

    @on(BatchEnd, TrainingPhase)
    def cancel(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        raise CancelFittingException("here")


def setting(**values: tuple[Any, Any]) -> Callable[[], object]:
    """Return a function that makes a learner with a setting that differs: that of the main rank, and the other one."""
    return lambda: learner(TorchCore(device="cpu", **{name: both[rank()] for name, both in values.items()}))


UNLIKE: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "accumulate": (
        setting(accumulate=(1, 2)), CoreError,
        "rank 1 has TorchCore(accumulate=2) where the main rank has accumulate=1. Pass the same value on every rank.",
    ),
    "clipping": (setting(clip_grad_norm=(None, 0.5)), CoreError, "clip_grad_norm=0.5) where"),
    "precision": (setting(precision=("bf16", "fp32")), CoreError, "precision='fp32') where"),
    "lag": (setting(lag=(0, 2)), CoreError, "lag=2) where the main rank has lag=0"),
    "uneven": (setting(uneven=("stop", "error")), CoreError, "uneven='error') where"),
    "arguments of DDP": (
        setting(ddp=({"find_unused_parameters": True}, None)), CoreError,
        "TorchCore(ddp=None) where the main rank has ddp={'find_unused_parameters': True}",
    ),
    "rate": (
        lambda: learner(optimizer=partial(torch.optim.SGD, lr=0.1 * (1 + rank()))).fit(1), RankError,
        "The ranks have different optimizers: rank 1 has lr=0.2 at group 0 of the optimizer, the main rank has lr=0.1.",
    ),
    "rate since the last fit": (changed_between_fits, RankError, "rank 1 has lr=0.2 at group 0 of the optimizer"),
    "kind of optimizer": (
        lambda: learner(optimizer=torch.optim.Adam if rank() else torch.optim.SGD).fit(1), RankError,
        "rank 1 has Adam at group 0 of the optimizer, the main rank has SGD",
    ),
    "parameters": (
        lambda: learner(optimizer=one_layer).fit(1), RankError,
        "rank 1 has 1 parameters at group 0 of the optimizer, the main rank has 2 parameters",
    ),
    "trained parameters": (
        frozen, RankError,
        "The ranks have different models: rank 1 has shape (1,), frozen at model.bias, the main rank has shape (1,), "
        "trained. Make, freeze (requires_grad_(False)) and change the same model on every rank.",
    ),
    "buffers at the end of an epoch": (
        lambda: learner(model=LateBuffer(apart=True)).fit(1), RankError,
        "rank 1 has torch.float32 of shape (3,) at model.shift, the main rank has nothing more. Let every rank make or",
    ),
    "buffers at a checkpoint": (
        lambda: learner(model=LateBuffer(apart=True), callbacks=[Checkpointer("a", every_steps=2)]).fit(1), RankError,
        "The ranks have different buffers, and those of the main rank are sent to all: rank 1 has torch.float32 of",
    ),
    "buffers after a cancel": (
        lambda: learner(model=LateBuffer(apart=True), callbacks=[Cancels()]).fit(1), RankError,
        "rank 1 has torch.float32 of shape (3,) at model.shift, the main rank has nothing more. Let every rank make or",
    ),
    "samples": (
        lambda: learner(data=(loader(32 - rank()),)).fit(1), RankError,
        "The ranks have different data: rank 1 has 31 samples of a RandomSampler at TrainingPhase, the main rank has "
        "32 samples of a RandomSampler. flowtrain gives each rank its share of one dataset.",
    ),
    "order of samples": (
        lambda: learner(data=(loader(shuffle=not rank()),)).fit(1), RankError,
        "rank 1 has 32 samples of a SequentialSampler at TrainingPhase, the main rank has 32 samples of a Random",
    ),
    "samples of an evaluation": (
        lambda: learner(data=(loader(), loader(16 * (1 + rank()), shuffle=False))).fit(1), RankError,
        "rank 1 has 32 samples of a SequentialSampler at ValidationPhase, the main rank has 16 samples",
    ),
    "phase of an epoch": (
        epoch_of_another_phase, RankError,
        "rank 0 is at EpochBegin of TrainingPhase, rank 1 is at EpochBegin of ValidationPhase. Call fit, epoch, step",
    ),
}  # fmt: skip
if CAN_SHARD:
    UNLIKE["parallel"] = setting(parallel=("auto", "fsdp")), CoreError, "parallel='fsdp') where the main rank has para"


def unlike(folder: str) -> dict[str, tuple[str, str]]:
    """Return the type and the text of the error of each of `UNLIKE` on this rank, with checkpoints in a folder."""
    os.chdir(folder)
    found = dict[str, tuple[str, str]]()
    for name, (make, _, _) in UNLIKE.items():
        with pytest.raises((CoreError, RankError), match=r"\brank") as error:
            make()
        found[name] = error.type.__name__, str(error.value)
    return found


def test_each_difference_is_named_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.values(unlike, str(tmp_path)):
        for name, (_, kind, text) in UNLIKE.items():
            assert found[name][0] == kind.__name__, name
            assert text in found[name][1], name


@needs_sharding
def test_a_rank_that_predicts_alone_with_a_sharded_model_is_noticed(ranks: Ranks) -> None:
    for outcome in ranks.run(predict_alone):
        assert outcome.ended == "RankError"
        assert outcome.error is not None
        assert "rank 0 is at the plan of the fit, rank 1 is at predict. Call fit, epoch" in outcome.error.text


def alike() -> float:
    """Train with settings that may differ and a buffer that all make; return what the model gives for ones."""
    core = TorchCore(device="cpu" if rank() else torch.device("cpu"), parallel="ddp" if rank() else "auto")
    made = learner(core, model=LateBuffer(apart=False))
    made.fit(2)
    return float(made.model(torch.ones(3)))


def test_what_is_the_same_in_other_words_is_no_difference(ranks: Ranks) -> None:
    one, two = ranks.values(alike)
    assert one == two
