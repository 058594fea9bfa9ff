"""Checkpoint requests: no handler receives one as an event, and each carries the arguments of the call that made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowtrain import Callback, EpochEnd, Event, FitBegin, LearnerView, Phase, TrainingPhase, on
from flowtrain.callback.view import CheckpointRequest
from flowtrain.testing import tiny_learner
from tests.support.untyped import untyped


def test_no_handler_sees_a_request(tmp_path: Path) -> None:
    class Sees(Callback):
        def __init__(self) -> None:
            self.seen: list[type[Event]] = []

        @on(Event)
        def see(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            self.seen.append(type(event))
            if type(event) is EpochEnd and isinstance(phase, TrainingPhase):
                learner.request_checkpoint(tmp_path / "one.ckpt")

    sees = Sees()
    tiny_learner(sees, n_batches=1).fit(1)
    assert (tmp_path / "one.ckpt").exists()
    assert not issubclass(CheckpointRequest, Event), "handlers of `Event` would get it"


def test_a_request_holds_the_arguments_of_its_call(tmp_path: Path) -> None:
    found: list[CheckpointRequest] = []

    class Asks(Callback):
        @on(FitBegin)
        def ask(self, event: FitBegin, phase: Phase, view: LearnerView) -> None:
            view.request_checkpoint(tmp_path / "a", best=True, remove=["b"], weights=True, on_interrupt=True)

    learner = tiny_learner(Asks(), n_batches=1)
    learner.loop.dispatch.carry_out_requests(found.extend)
    learner.fit(1)
    assert found == [CheckpointRequest(str(tmp_path / "a"), True, ("b",), True, True)]
    with pytest.raises(AttributeError, match="cannot assign"):
        untyped(found[0]).best = False
