"""Ranks are killed at random, and the training that resumes is the one that was never killed, to the bit.

So are its logs: each record is there once, in its place, in those of the main rank and in those of each rank.
"""

from __future__ import annotations

import csv
import importlib
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import Callback, Event, Learner, LearnerView, Phase, on
from flowtrain.callbacks import Checkpointer, LogMetrics
from flowtrain.logging import CsvBackend, JsonlBackend, TensorBoardBackend
from tests.ranks.by_hand import classes, differing, trained
from tests.support.logs import log_records
from tests.support.ranks import Ranks, rank, send

EPOCHS, BATCHES, KILLS = 3, 6, 5


class Killed(Callback):
    """Kills ranks at the n-th event on this one."""

    ranks = "every"

    def __init__(self, at: int, killed: tuple[int, ...]) -> None:
        self.left, self.killed = at, killed

    @on(Event)
    def count(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.left -= 1
        if not self.left:
            send(signal.SIGKILL, *self.killed)


class LogOnEach(LogMetrics):
    """Logs on every rank, each into a file of its own."""

    ranks = "every"


def loggers(folder: str) -> list[Callback]:
    """Return callbacks that log into files below a folder."""
    once = (JsonlBackend(f"{folder}/log.jsonl"), CsvBackend(f"{folder}/log.csv"), TensorBoardBackend(f"{folder}/board"))
    return [LogMetrics(*once), LogOnEach(JsonlBackend(folder + "/log-{rank}.jsonl"))]


def logged(folder: Path) -> dict[str, list[Any]]:
    """Return the records of all logs below a folder, in their order, without the times."""
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list[Any]] = {path.name: log_records(path) for path in folder.glob("*.jsonl")}
    with (folder / "log.csv").open(newline="") as file:
        found["csv"] = [{**row, "time": ""} for row in csv.DictReader(file)]
    for phase in ("TrainingPhase", "ValidationPhase"):
        (path,) = (folder / "board" / phase).iterdir()
        events = [event for event in reader.EventFileLoader(str(path)).Load() if event.HasField("summary")]
        values = [(event.step, each) for event in events for each in event.summary.value]
        found[phase] = [(step, each.tag, each.tensor.float_val[0]) for step, each in values]
    return found


def fit(folder: str, at: int, by: int, killed: tuple[int, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train or resume; rank `by` kills ranks at its event number `at`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    torch.manual_seed(10 + rank())
    saves = Checkpointer(folder, every_steps=2, monitor=None)
    callbacks = [Killed(at if rank() == by else 0, killed), saves, *loggers(folder)]
    with Learner(
        model,
        cross_entropy,
        data=(classes(BATCHES), classes(2)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=callbacks,
        default_callbacks="quiet",
    ) as learner:
        learner.fit(EPOCHS, resume="auto")
        return trained(model, learner.optimizer), learner.history.rows


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train without a kill."""
    folder = tmp_path_factory.mktemp("whole")
    results, logs = ranks.values(fit, str(folder), 0, 0, ()), logged(folder)
    assert {name: len(records) for name, records in logs.items()} == {
        "log.jsonl": 30, "log-0.jsonl": 30, "log-1.jsonl": 30, "csv": 30, "TrainingPhase": 21, "ValidationPhase": 9,
    }  # fmt: skip
    return results, logs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_training_resumes_to_the_same_result(seed: int, whole: Any, ranks: Ranks, tmp_path: Path) -> None:
    draw, kills = random.Random(seed), 0
    while True:
        killed = draw.choice([(0,), (1,), (0, 1)])
        # Of about 200 events in the whole training. Without a checkpoint, which is complete after the second one has
        # begun, another run would begin, with logs of its own.
        at = draw.randint(12 if kills else 31, 45) if kills < KILLS else 0
        outcomes = ranks.run_on(2, 20, fit, str(tmp_path), at, draw.randrange(2), killed)
        assert not any(outcome.timed_out for outcome in outcomes), "\n".join(map(str, outcomes))
        if all(outcome.ended == "returned" for outcome in outcomes):
            break
        assert all(outcome.ended in ("SIGKILL", "RemoteError") for outcome in outcomes), "\n".join(map(str, outcomes))
        kills += 1
    assert kills == KILLS
    results, logs = whole
    for outcome, (weights, rows) in zip(outcomes, results, strict=True):
        assert outcome.value is not None
        assert differing(outcome.value[0], weights) == []
        assert outcome.value[1] == rows
    assert logged(tmp_path) == logs
