"""Ranks are killed at random, and the training that resumes is the one that was never killed, to the bit."""

from __future__ import annotations

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
from flowtrain.callbacks import Checkpointer
from tests.ranks.by_hand import classes, differing, trained
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


def fit(folder: str, at: int, by: int, killed: tuple[int, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train or resume; rank `by` kills ranks at its event number `at`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
    torch.manual_seed(10 + rank())
    callbacks = [Killed(at if rank() == by else 0, killed), Checkpointer(folder, every_steps=2, monitor=None)]
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
    return ranks.values(fit, str(tmp_path_factory.mktemp("whole")), 0, 0, ())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_killed_training_resumes_to_the_same_result(seed: int, whole: Any, ranks: Ranks, tmp_path: Path) -> None:
    draw, kills = random.Random(seed), 0
    while True:
        killed = draw.choice([(0,), (1,), (0, 1)])
        at = draw.randint(12, 45) if kills < KILLS else 0  # of about 200 events in the whole training
        outcomes = ranks.run_on(2, 20, fit, str(tmp_path), at, draw.randrange(2), killed)
        assert not any(outcome.timed_out for outcome in outcomes), "\n".join(map(str, outcomes))
        if all(outcome.ended == "returned" for outcome in outcomes):
            break
        assert all(outcome.ended in ("SIGKILL", "RemoteError") for outcome in outcomes), "\n".join(map(str, outcomes))
        kills += 1
    assert kills == KILLS
    for outcome, (weights, rows) in zip(outcomes, whole, strict=True):
        assert outcome.value is not None
        assert differing(outcome.value[0], weights) == []
        assert outcome.value[1] == rows
