"""The tools for tests of callbacks: small learners that print nothing and always train in the same way."""

from __future__ import annotations

import pytest
import torch

from flowtrain import (
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    LearnerView,
    Phase,
    SerialExecutor,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import CustomCallback, Metrics
from flowtrain.graph.executor import Site
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinySite, record_access, tiny_batches, tiny_learner
from tests.support.sites import MakeSite, SiteContract


def test_a_tiny_learner_learns_its_coefficient_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    learner = tiny_learner(coeff=-2.0, n_batches=8, batch_size=4)
    learner.fit(5)
    assert learner.model.coeff.item() == pytest.approx(-2.0, abs=1e-3)
    assert learner.core.device == torch.device("cpu")
    assert [len(learner.data[phase]) for phase in (TrainingPhase, ValidationPhase)] == [8, 8]
    assert capfd.readouterr() == ("", "")


def test_it_is_the_same_every_time() -> None:
    coeffs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        learner = tiny_learner()
        learner.fit(1)
        coeffs.append(learner.model.coeff.item())
    assert coeffs[0] == coeffs[1]


def test_every_choice_can_be_replaced() -> None:
    model = torch.nn.Linear(1, 1)
    seen: list[int] = []
    learner = tiny_learner(
        CustomCallback(lambda learner: seen.append(1), EpochEnd),
        model=model,
        lossfn=torch.nn.functional.l1_loss,
        data=tiny_batches(n_batches=2),
        optimizer=torch.optim.Adam,
        default_callbacks=False,
    )
    learner.fit(3)
    assert learner.model is model
    assert learner.lossfn is torch.nn.functional.l1_loss
    assert isinstance(learner.optimizer, torch.optim.Adam)
    assert len(learner.callbacks) == 1
    assert seen == [1, 1, 1]


def test_record_access_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    found = record_access(Metrics())
    assert capsys.readouterr().out == f"{found}\n"


class Probe(Callback):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    @on(BatchEnd)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if self.error is not None:
            raise self.error


def test_a_tiny_site_notes_what_an_executor_tells_it_and_raises_nothing() -> None:
    with tiny_learner(Probe(), Probe(ValueError("broken")), default_callbacks=False) as learner:
        plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
    site, executor = TinySite(), SerialExecutor()
    as_an_executor_sees_it: Site = site
    assert as_an_executor_sees_it.runner(BatchEnd, TrainingPhase) is None
    assert not any((site.nodes, site.mailbox.stopping, site.mailbox.calls, site.requests))
    assert not any((site.failures, site.drained, site.swapped))
    executor.bind(site)
    run, fired, event = executor.compile(plan), site.fired, BatchEnd()
    fired.append(("Probe", event))
    run(event, TrainingPhase())
    run(event, TrainingPhase())  # no event was fired, so the queue is not drained
    assert [(name, repr(failure)) for name, failure in site.failures] == [("Probe#2", "ValueError('broken')")] * 2
    assert site.drained == [[("Probe", event)]]
    assert site.fired is fired == []
    executor.close()
    assert len(site.swapped) == 1
    site.swap(plan, run)
    assert site.swapped[1:] == [run]


class TestTinySite(SiteContract):
    """The site in tests of executors is like the loop in all that an executor sees."""

    @pytest.fixture
    def make(self) -> MakeSite:
        def make(state: LearnerState, callbacks: Callbacks, executor: SerialExecutor) -> TinySite:
            site = TinySite()
            site.state, site.nodes = state, callbacks.running
            executor.bind(site)
            return site

        return make
