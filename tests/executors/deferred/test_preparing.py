"""What a deferred callback may not keep (rule 19)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, CallbackError, Learner, LearnerView, Phase, TrainingPhase, on
from flowtrain.testing import tiny_learner
from flowtrain_dask.deferred.preparing import check_holds_no_state
from tests.support.untyped import untyped


class Sees(Callback):
    @on(BatchEnd, TrainingPhase)
    def see(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...


KEPT: list[Callable[[Learner], Any]] = [
    lambda learner: learner,
    lambda learner: learner.state,
    lambda learner: learner.model,
    lambda learner: [{"layer": next(iter(learner.model.parameters()))}],
    lambda learner: learner.batch,
    lambda learner: learner.cbstate,
    lambda learner: learner.fit,
    lambda learner: lambda: learner,
]


@pytest.mark.parametrize(
    "kept",
    KEPT,
    ids=["learner", "state", "model", "parameter", "batch", "cbstate", "method", "closure"],
)
def test_state_in_an_attribute_is_found(kept: Callable[[Learner], Any]) -> None:
    """Rule 19."""
    learner = tiny_learner()
    callback = Sees()
    check_holds_no_state(callback, "a", learner.state)
    untyped(callback).mine = kept(learner)  # as a user's would
    with pytest.raises(CallbackError, match=r"a is deferred and keeps \w+ in its attribute 'mine'.*Declare what"):
        check_holds_no_state(callback, "a", learner.state)
