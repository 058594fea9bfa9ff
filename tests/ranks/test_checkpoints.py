"""Checkpoints of several ranks, in real processes: all ranks resume from one file, to the bit (rule 28)."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import BatchEnd, Learner, TorchCore, TrainingPhase
from flowtrain.callbacks import EMA, Checkpointer
from tests.ranks.by_hand import classes
from tests.support.ranks import Ranks, rank
from tests.support.resumed import Ask


class Middle(Ask):
    """Requests a checkpoint on every rank, as all of them must."""

    ranks = "every"


def trained(folder: str, epochs: int, resume: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Train with dropout on this rank; return the weights, the averages, the losses and the next random numbers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    torch.manual_seed(seed + rank())
    random.seed(seed + rank())
    ema = EMA(0.5)
    with Learner(
        model,
        cross_entropy,
        data=(classes(4), classes(2)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[ema, Checkpointer(folder), Middle(Path(folder) / "middle.ckpt", BatchEnd, TrainingPhase, 6)],
        core=TorchCore(device="cpu"),
        default_callbacks="quiet",
    ) as learner:
        learner.fit(epochs, resume=resume)
        steps = {repr(phase): each["Loss"].values for phase, each in learner.cbstate.metrics_step.items()}
        epoch = {repr(phase): each["Loss"].values for phase, each in learner.cbstate.metrics_epoch.items()}
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "averages": {name: value.tolist() for name, value in ema.averages.items()},
        "losses": [steps, epoch],
        "next": (torch.rand(2).tolist(), random.random()),
    }


@pytest.mark.parametrize("name", ["epoch-0002.ckpt", "middle.ckpt"], ids=["between", "within"])
def test_rule_28_every_rank_resumes_from_the_file_of_the_main_rank(name: str, ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks.values(trained, str(tmp_path / "whole"), 3)
    assert whole[0]["weights"] == whole[1]["weights"]
    assert whole[0]["next"] != whole[1]["next"]
    resumed = ranks.values(trained, str(tmp_path / "resumed"), 3, str(tmp_path / "whole" / name), 70)
    assert resumed == whole
    contents = torch.load(tmp_path / "whole" / name, weights_only=True)
    assert len(contents["ranks"]) == 1
