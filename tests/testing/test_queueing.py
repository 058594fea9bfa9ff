"""What executors promise about fired events: the serial one keeps it, and broken ones are caught."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Executor, SerialExecutor, Site
from flowtrain.graph.plan import Plan, Step
from flowtrain.testing.queueing import QueueingPromises
from tests.testing.test_contract import RaisesTheFirstOnly, Swallows, Threads, contract_of, failing


class TestSerialExecutor(QueueingPromises):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class DropsFired(Threads):
    def ended(self, plan: Plan, site: Site, start: int) -> None:
        site.fired.clear()


class FiresInAnyOrder(Threads):
    def ended(self, plan: Plan, site: Site, start: int) -> None: ...


class FiresAtOnce(Threads):
    """Drains when a handler returns and not when the event has ended."""

    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        failure = super().call(step, event, phase)
        if self.site is not None and self.site.fired and threading.current_thread() is threading.main_thread():
            self.site.drain(phase)
        return failure

    def start(self, step: Step, event: Event, phase: Phase) -> Future[BaseException | None]:
        found: Future[BaseException | None] = Future()
        found.set_result(self.call(step, event, phase))
        return found


class ShowsRaised(Threads):
    """Fires what a raising event asked for."""

    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        site.drain(phase)
        site.fail(plan, event, phase, failures)


BROKEN: list[tuple[type[Threads], str, str]] = [
    (DropsFired, "rule_18_fired_events_wait_for_the_current_one", "fired in round 1: []; wanted ['ProbeA 0', "),
    (FiresInAnyOrder, "rule_18_fired_events_wait_for_the_current_one", "fired in round "),
    (FiresAtOnce, "rule_18_fired_events_wait_for_the_current_one", "was handled while its asker's event was running"),
    (ShowsRaised, "rule_18_fired_events_are_dropped_if_the_event_raises", "handled that a raising one had fired"),
    (DropsFired, "rule_18_fired_events_are_dropped_if_the_event_raises", "was fired next came 0 times"),
    (Swallows, "rule_18_fired_events_are_dropped_if_the_event_raises", "no ValueError was raised"),
    (Swallows, "rule_18_training_cannot_be_started_in_a_handler", "no UsageError was raised"),
    (RaisesTheFirstOnly, "rule_18_training_cannot_be_started_in_a_handler", "only 1 of 3 were refused"),
]


@pytest.mark.parametrize(
    ("kind", "test", "message"), BROKEN, ids=[f"{each.__name__}-{test}" for each, test, _ in BROKEN]
)
def test_a_broken_executor_fails_the_test_of_what_it_breaks(kind: type[Threads], test: str, message: str) -> None:
    contract = contract_of(kind)
    contract.patience = 0.1  # the machine may be busy
    said = failing(contract, f"test_{test}")
    assert said.startswith("AssertionError: "), said
    assert message in said
