"""Checkpoints of several ranks, in real processes: all ranks resume from one file, to the bit (rule 28)."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochBegin,
    Learner,
    LearnerView,
    Read,
    TorchCore,
    TrainingPhase,
    on,
)
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


def continued(path: str) -> tuple[list[str], list[Any], list[Any]]:
    """Resume a fit of three epochs from a checkpoint; return the warnings, the first and the last weights."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    first: list[Any] = []

    class Look(Callback):
        ranks = "every"

        def state_access(self) -> Access:
            return {"params": Read()}

        @on(EpochBegin, TrainingPhase)
        def look(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            first.append([param.tolist() for param in learner.params.values()])

    learner = Learner(
        model,
        cross_entropy,
        data=(classes(4), classes(2)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[EMA(0.5), Look()],
        core=TorchCore(device="cpu"),
        default_callbacks="quiet",
    )
    with learner, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        learner.fit(3, resume=path)
    texts = [str(each.message) for each in warned if "written by" in str(each.message)]
    return texts, first, [param.tolist() for param in model.parameters()]


@pytest.mark.parametrize("size", [1, 3])
def test_rule_42_another_number_of_ranks_resumes_at_the_end_of_an_epoch(
    size: int, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.values(trained, str(tmp_path / "whole"), 2)
    path = tmp_path / "whole" / "epoch-0002.ckpt"
    saved = torch.load(path, weights_only=True)["trained"][""]
    found = [outcome.value for outcome in ranks.run_on(size, 30, continued, str(path))]
    for number, value in enumerate(found):
        assert value is not None
        texts, first, last = value
        assert first == [[saved[name].tolist() for name in saved]]
        assert last == found[0][2] != first[0]  # type: ignore[index]
        many = f"{size} ranks" if size > 1 else "one process"
        told = f"The checkpoint was written by 2 ranks, and this training has {many}. Models, optimizers"
        assert [text[: len(told)] for text in texts] == ([] if number else [told])


@pytest.mark.parametrize("size", [1, 3])
def test_rule_42_another_number_of_ranks_is_refused_within_an_epoch(size: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks.values(trained, str(tmp_path / "whole"), 2)
    for outcome in ranks.run_on(size, 30, continued, str(tmp_path / "whole" / "middle.ckpt")):
        assert outcome.ended == "CheckpointError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("The checkpoint was taken within an epoch by 2 ranks, and this training")
        assert "Resume with as many, or from a checkpoint of the end of an epoch" in outcome.error.text
