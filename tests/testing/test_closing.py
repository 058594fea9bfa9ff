"""What executors promise about ends: the serial one keeps it, and broken ones are caught."""

from __future__ import annotations

import pytest

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Executor, SerialExecutor, Site
from flowtrain.graph.plan import Plan, Step
from flowtrain.testing.closing import ClosingPromises
from tests.testing.test_contract import Swallows, Threads, contract_of, failing


class TestSerialExecutor(ClosingPromises):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class SkipsAtFitEnd(Threads):
    """Does not look at `Plan.always`."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        failures: list[tuple[Step, BaseException]] = []
        lost = 0
        for position, step in enumerate(plan.steps):
            failure = None if plan.ancestors[position] & lost else self.call(step, event, phase)
            if failure is not None:
                failures.append((step, failure))
            if failure is not None or plan.ancestors[position] & lost:
                lost |= 1 << position
        return failures


class ReversesFitEnd(Threads):
    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        site.fail(plan, event, phase, failures[::-1] if plan.always else failures)


BROKEN: list[tuple[type[Threads], str, str]] = [
    (Swallows, "rule_16_every_begin_has_one_end", "after CancelFittingException at FitBegin came "),
    (SkipsAtFitEnd, "rule_17_fit_end_runs_for_every_callback", "FitEnd ran for ['EveryA', 'EveryC']"),
    (Swallows, "rule_17_fit_end_runs_for_every_callback", "no ValueError was raised"),
    (ReversesFitEnd, "rule_17_fit_end_runs_for_every_callback", "raised and attached are ['end EveryC', "),
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
