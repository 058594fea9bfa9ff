"""What every `Site` keeps: the loop is one, and tests of executors have another in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flowtrain import (
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    Event,
    LearnerView,
    Phase,
    SerialExecutor,
    TrainingPhase,
    on,
)
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.plan import Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState


class Ping(Event):
    """An event that a handler fires."""


class Asks(Callback):
    """Fires an event and requests a checkpoint, and then looks into the queues of the site."""

    look: Callable[[], Any]

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @on(BatchEnd, TrainingPhase)
    def ask(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.fire(Ping())
        learner.request_checkpoint("a.ckpt")
        self.seen.append(self.look())


class MakeSite(Protocol):
    """Makes a site of a state with these callbacks, and binds the executor to it."""

    def __call__(self, state: LearnerState, callbacks: Callbacks, executor: SerialExecutor) -> Site: ...


class SiteContract:
    """Tests that every site passes. A subclass has a fixture ``make``, a `MakeSite`."""

    def made(self, make: MakeSite, *callbacks: Callback) -> tuple[Site, Callable[[type[Event]], Plan], SerialExecutor]:
        """Return a site, a function that gives the plan of an event, and the executor that is bound to the site."""
        state, executor = LearnerState(), SerialExecutor()
        used = Callbacks(callbacks, state, [TrainingPhase])
        site = make(state, used, executor)
        return site, lambda event: used.plan(event, TrainingPhase), executor

    def test_an_executor_sees_what_handlers_request_through_their_views(self, make: MakeSite) -> None:
        """Rules 18 and 28: the queues of the site are those of the state that the views show."""
        asks = Asks()
        site, plan, executor = self.made(make, asks)
        asks.look = lambda: ([name for name, _ in site.fired], [name for name, _ in site.requests])
        executor.compile(plan(BatchEnd))(BatchEnd(), TrainingPhase())
        assert asks.seen == [(["Asks"], ["Asks"])]
        assert (site.fired, site.requests) == ([], []), "the event has ended, so `drain` has emptied both"

    def test_the_queues_stay_the_same_lists(self, make: MakeSite) -> None:
        """An executor keeps them in its runners, which asks for them once."""
        asks = Asks()
        site, plan, executor = self.made(make, asks)
        asks.look = lambda: None
        fired, requests = site.fired, site.requests
        runner: Runner = executor.compile(plan(BatchEnd))
        runner(BatchEnd(), TrainingPhase())
        site.drain(TrainingPhase())
        assert site.fired is fired
        assert site.requests is requests
        assert site.fired is site.state.fired
        assert site.requests is site.state.requests

    def test_a_cancel_whose_scope_is_not_open_is_not_raised(self, make: MakeSite) -> None:
        """Rule 16: no batch is open here."""
        site, plan, _ = self.made(make, Asks())
        found = plan(BatchEnd)
        event, phase = BatchEnd(), TrainingPhase()
        failures: Sequence[Any] = [(found.handlers[0], CancelBatchException("no batch"))]
        site.fail(found, event, phase, failures)

    def test_it_tells_what_it_runs(self, make: MakeSite) -> None:
        asks = Asks()
        site, _, _ = self.made(make, asks)
        assert [node.callback for node in site.nodes] == [asks]
        assert site.runner(BatchBegin, Phase) is None, "no callback handles it"
        assert isinstance(site.run, Run)
        assert site.mailbox.calls == []
        assert not site.mailbox.stopping
        assert site.clock is None
        assert site.open_sinks is not None
