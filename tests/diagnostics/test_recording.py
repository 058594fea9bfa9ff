"""The recording view: everything is allowed, and written down by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowtrain import LearnerView, Read, TrainingPhase, UsageError, Write
from flowtrain.callback.access import dotted
from flowtrain.diagnostics.suggest_access import Log, RecordingView
from flowtrain.state.learner_state import State
from flowtrain.state.partial_view import Owner
from flowtrain.testing import tiny_learner

PHASE = TrainingPhase()


def recorded(f: Callable[[LearnerView], Any]) -> dict[str, Read | Write]:
    """What a function touches of a learner that has run one batch."""
    learner = tiny_learner()
    learner.step(PHASE, (torch.ones(2, 1), torch.ones(2, 1)))
    learner.state.cbstate.space = State("cbstate.space")
    log: Log = {}
    f(RecordingView(learner.state, Owner("it", "It", "state_access", ()), log))
    return {dotted(path): kind for path, kind in log.items()}


def _assign(learner: LearnerView) -> None:
    learner.cbstate.mine = 1
    learner.batch.more = 2
    learner.cbstate.space.inner = 3
    del learner.batch.more


CASES: list[tuple[Callable[[LearnerView], Any], dict[str, Read | Write]]] = [
    (lambda learner: learner.batch.loss, {"batch.loss": Read()}),
    (lambda learner: learner.batch.nothing, {"batch.nothing": Read(optional=True)}),
    (lambda learner: "nothing" in learner.batch, {"batch.nothing": Read(optional=True)}),
    (_assign, {"cbstate.mine": Write(), "batch.more": Write(), "cbstate.space.inner": Write()}),
    (lambda learner: learner.cbstate.history[PHASE].steps, {"cbstate.history": Read()}),
    (lambda learner: learner.cbstate.metrics_step[PHASE]["Loss"].last(), {"cbstate.metrics_step.Loss": Read()}),
    (lambda learner: list(learner.cbstate.metrics_step[PHASE]), {"cbstate.metrics_step": Read()}),
    (lambda learner: len(learner.cbstate.metrics_step), {"cbstate.metrics_step": Read()}),
    (
        lambda learner: learner.cbstate.tracehistory[PHASE].push("New", 1.0, 1),
        {"cbstate.tracehistory.New": Write()},
    ),
    (
        lambda learner: learner.cbstate.hyperparams.push("LearningRate", 0.1, 1),
        {"cbstate.hyperparams.LearningRate": Write()},
    ),
    (lambda learner: learner.model(torch.ones(1)), {"model": Read()}),
    (lambda learner: learner.params["coeff"], {"params.coeff": Read()}),
    (lambda learner: dict(learner.params.items()), {"params": Read(), "params.coeff": Read()}),
    (lambda learner: learner.batch.grads["coeff"], {"batch.grads": Read()}),
    (lambda learner: learner.optimizer.hyperparams[0]["lr"], {"optimizer.hyperparams": Read()}),
    (lambda learner: learner.optimizer.state, {"optimizer.state": Read()}),
    (lambda learner: learner.optimizer.state_dict(), {"optimizer": Read()}),
    (lambda learner: len(learner.data[PHASE]), {"data": Read()}),
    (lambda learner: (learner.lossfn, len(learner.callbacks)), {"lossfn": Read(), "callbacks": Read()}),
]


@pytest.mark.parametrize(("f", "paths"), CASES)
def test_what_is_touched_is_logged_by_path(f: Callable[[LearnerView], Any], paths: dict[str, Read | Write]) -> None:
    assert recorded(f) == paths


def test_a_plain_read_beats_an_optional_one_and_a_write_beats_both() -> None:
    def touch(learner: LearnerView) -> None:
        _ = learner.cbstate.mine
        learner.cbstate.mine = 1
        _ = learner.cbstate.mine
        _ = "loss" in learner.batch
        _ = learner.batch.loss

    assert recorded(touch) == {"cbstate.mine": Write(), "batch.loss": Read()}


def test_what_no_view_allows_is_refused_here_too() -> None:
    with pytest.raises(UsageError, match=r"it calls learner\.fit\(\) in a handler"):
        recorded(lambda learner: learner.fit)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # on purpose
    with pytest.raises(AttributeError, match="Did you mean 'batch'"):
        recorded(lambda learner: learner.bacth)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # on purpose
