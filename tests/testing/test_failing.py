"""What executors promise about failures: the serial one keeps it, and broken ones are caught."""

from __future__ import annotations

import pytest

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Executor, SerialExecutor, Site
from flowtrain.graph.plan import Plan, Step
from flowtrain.testing.failing import FailurePromises
from tests.testing.test_contract import RaisesTheFirstOnly, Swallows, Threads, contract_of, failing


class TestSerialExecutor(FailurePromises):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class StopsAtTheFirstFailure(Threads):
    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for step in plan.steps:
            failure = self.call(step, event, phase)
            if failure is not None:
                return [(step, failure)]
        return []


class RunsAfterFailures(Threads):
    """Also runs what depends on a failed handler."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        found = [(step, self.call(step, event, phase)) for step in plan.steps]
        return [(step, failure) for step, failure in found if failure is not None]


class RaisesItself(Threads):
    """Raises the first failure by itself, past the loop."""

    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        raise failures[0][1]


class FailuresBackwards(Threads):
    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        site.fail(plan, event, phase, failures[::-1])


class TakesTheNotes(Threads):
    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        try:
            site.fail(plan, event, phase, failures)
        except Exception as error:
            error.__notes__ = []
            raise


class GivesUpOnWhoFailed(Threads):
    """Never again calls a handler that has raised."""

    def __init__(self) -> None:
        super().__init__()
        self.given_up: set[str] = set()

    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        if step.node.name in self.given_up:
            return None
        failure = super().call(step, event, phase)
        if failure is not None:
            self.given_up.add(step.node.name)
        return failure


class GivesUpWithoutASound(GivesUpOnWhoFailed):
    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None: ...


class InterruptsAtOnce(Threads):
    """Leaves the others running when a handler is interrupted."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for future in [self.start(step, event, phase) for step in plan.steps]:
            failure = future.result()
            if failure is not None:
                raise failure
        return []


class HidesInterrupts(Threads):
    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        failure = super().call(step, event, phase)
        return None if isinstance(failure, KeyboardInterrupt) else failure


BROKEN: list[tuple[type[Threads], str, str]] = [
    (StopsAtTheFirstFailure, "rule_15_those_that_depend_on_no_failed_one_still_run", "ran ['ProbeA', 'ProbeB']; "),
    (RunsAfterFailures, "rule_15_those_that_depend_on_no_failed_one_still_run", "'ProbeB', 'ProbeC', 'ProbeD'"),
    (Swallows, "rule_15_those_that_depend_on_no_failed_one_still_run", "no ValueError was raised"),
    (Swallows, "rule_15_the_first_in_serial_order_is_raised", "no Exception was raised"),
    (FailuresBackwards, "rule_15_the_first_in_serial_order_is_raised", "in round 1 was raised \"KeyError: 'second'\""),
    (RaisesTheFirstOnly, "rule_15_the_first_in_serial_order_is_raised", "in round 1 [] were attached"),
    (TakesTheNotes, "rule_15_the_first_in_serial_order_is_raised", "no note on the other: ValueError('first')"),
    (RaisesTheFirstOnly, "rule_15_errors_go_before_cancels", "serially ('error', ['fit', 'epoch', 'batch'])"),
    (RaisesItself, "rule_15_every_exception_says_where_it_was_raised", "do not say 'raised in EveryA.act at "),
    (RaisesTheFirstOnly, "rule_15_every_exception_says_where_it_was_raised", "two handlers failed, and what was "),
    (Swallows, "rule_15_every_exception_says_where_it_was_raised", "no ValueError was raised"),
    (GivesUpOnWhoFailed, "rule_15_the_next_event_runs_as_if_nothing_had_been", "round 1: ['ProbeB', 'ProbeC']"),
    (GivesUpWithoutASound, "rule_15_the_next_event_runs_as_if_nothing_had_been", "no ValueError was raised"),
    (InterruptsAtOnce, "rule_15_an_interrupt_leaves_no_handler_running", "fire was interrupted in round "),
    (HidesInterrupts, "rule_15_an_interrupt_leaves_no_handler_running", "no KeyboardInterrupt was raised"),
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
