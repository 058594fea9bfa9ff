"""Checkpoints in the first version of the format can be resumed.

``data/first`` holds the log of a fit of four epochs and the checkpoint after its second epoch, as version 0.1.0 wrote
them before the modules moved into packages. The resumed fit must give the same log and the same final weights.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flowtrain import Learner, TorchCore
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    EarlyStopping,
    GradNorm,
    LearningRate,
    LogHyperParams,
    LogMetrics,
    LogTraces,
    Metrics,
    Scheduler,
    one_cycle,
)
from flowtrain.logging import JsonlBackend
from flowtrain.metrics import accuracy
from tests.support.logs import log_records

FIRST = Path(__file__).parent / "data" / "first"
# The sums of the weights after the fourth epoch, which the fit printed when it wrote the data.
WEIGHTS = {"0.weight": -1.39670264, "1.running_var": 2.61033368, "4.weight": 0.28827900, "4.bias": -0.05520640}


def make_learner(folder: Path, executor: str) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    y = (x[:, 0] > 0).long()
    pairs = torch.utils.data.TensorDataset(x, y)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
    )
    lines = JsonlBackend(folder / "log.jsonl")
    return Learner(
        model,
        F.cross_entropy,
        data=(
            torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:16], y[:16]), batch_size=8),
        ),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        callbacks=[
            Metrics(accuracy),
            Scheduler({LearningRate: one_cycle(1e-2)}),
            EMA(0.9),
            GradNorm(),
            EarlyStopping(10),
            LogMetrics(lines),
            LogHyperParams(lines),
            LogTraces(lines),
            Checkpointer(folder / "checkpoints"),
        ],
        core=TorchCore(accumulate=2, clip_grad_norm=1.0),
        default_callbacks="quiet",
        executor=executor,
    )


def rows(path: Path) -> dict[tuple[Any, ...], float]:
    """Return the logged values by group, name and step; more lines than values show that a value was logged twice."""
    lines = log_records(path)
    values = {(line["group"], line["name"], line["step"]): line["value"] for line in lines}
    assert len(values) == len(lines)
    return values


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_the_first_format_is_resumed(tmp_path: Path, executor: str) -> None:
    shutil.copytree(FIRST, tmp_path / "run")
    with make_learner(tmp_path / "run", executor) as learner:
        learner.fit(4, resume=tmp_path / "run" / "checkpoints" / "epoch-0002.ckpt")
        weights = {name: value.sum().item() for name, value in learner.model.state_dict().items()}
    logged, expected = rows(tmp_path / "run" / "log.jsonl"), rows(FIRST / "log.jsonl")
    assert logged.keys() == expected.keys()
    if torch.__version__.startswith("2.13."):  # which wrote the data; dropout of torch 2.6 draws other numbers
        assert {name: weights[name] for name in WEIGHTS} == pytest.approx(WEIGHTS, rel=1e-4)
        assert logged == pytest.approx(expected, rel=1e-4)
