"""What executors promise about order: the serial one keeps it, and broken ones are caught."""

from __future__ import annotations

from concurrent.futures import Future
from copy import copy

import pytest
import torch

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase, ValidationPhase
from flowtrain.graph.executor import Executor, SerialExecutor
from flowtrain.graph.plan import Plan, Step
from flowtrain.testing.ordering import OrderPromises
from tests.testing.test_contract import Swallows, Threads, contract_of, failing


class TestSerialExecutor(OrderPromises):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class IgnoresEdges(Threads):
    def may_start(self, plan: Plan, position: int, done: int) -> bool:
        return True


class IgnoresTheLastEdge(Threads):
    """Waits for all but the last of those that it should wait for."""

    def may_start(self, plan: Plan, position: int, done: int) -> bool:
        ancestors = plan.ancestors[position]
        needed = ancestors & ~(1 << ancestors.bit_length() - 1) if ancestors else 0
        return needed & ~done == 0


class ReversesResources(Threads):
    """Runs in list order backwards where it may not: a plan's users of one resource."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        if all(step.node.union for step in plan.steps) and len(plan) == 3:
            for step in reversed(plan.steps):
                self.call(step, event, phase)
            return []
        return super().run(plan, event, phase)


class DoesNotWait(Threads):
    """Returns while the last handler runs."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for step in plan.steps:
            self.pool.submit(self.call, step, event, phase)
        return []


class DrawsAnywhere(Threads):
    def start(self, step: Step, event: Event, phase: Phase) -> Future[BaseException | None]:
        return self.pool.submit(self.surrounded(self.call), step, event, phase)


class SkipsTheLast(Threads):
    """Calls all handlers but the last of a plan."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for step in plan.steps[:-1]:
            self.call(step, event, phase)
        return []


class FiresACopy(Threads):
    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        return super().call(step, copy(event), phase)


class AnotherPhase(Threads):
    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        return super().call(step, event, ValidationPhase())


class OneViewForAll(Threads):
    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for step in plan.steps:
            step.call(event, phase, plan.steps[0].view)
        return []


class RaisesAtOnce(Threads):
    """Leaves the others running when a handler has raised."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for future in [self.start(step, event, phase) for step in plan.steps]:
            failure = future.result()
            if failure is not None:
                raise failure
        return []


class Backwards(Threads):
    """Runs every plan from its end, on the training thread."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        for step in reversed(plan.steps):
            self.call(step, event, phase)
        return []


class Draws(Threads):
    """Takes a random number for itself."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        torch.rand(())
        return super().run(plan, event, phase)


BROKEN: list[tuple[type[Threads], str, str]] = [
    (IgnoresEdges, "rule_12_a_chain_runs_in_its_order", " started before ProbeC"),
    (SkipsTheLast, "rule_12_a_chain_runs_in_its_order", "in round 1 ran ['ProbeC', 'ProbeB']; wanted is "),
    (IgnoresTheLastEdge, "rule_12_no_handler_starts_before_those_it_waits_for", " started before "),
    (SkipsTheLast, "rule_12_no_handler_starts_before_those_it_waits_for", "'ProbeF']; wanted is "),
    (SkipsTheLast, "rule_12_every_handler_gets_its_event_phase_and_view", "in round 1 ran ['ProbeA', 'ProbeB', "),
    (FiresACopy, "rule_12_every_handler_gets_its_event_phase_and_view", "and not the event that was fired"),
    (AnotherPhase, "rule_12_every_handler_gets_its_event_phase_and_view", "ValidationPhase and not the phase that was"),
    (OneViewForAll, "rule_12_every_handler_gets_its_event_phase_and_view", "ProbeB got the view of another handler"),
    (DoesNotWait, "rule_13_an_event_ends_when_all_its_handlers_have", "fire returned in round "),
    (SkipsTheLast, "rule_13_an_event_ends_when_all_its_handlers_have", "in round 1 ran ['ProbeA', 'ProbeB']; wanted"),
    (RaisesAtOnce, "rule_13_an_event_raises_when_all_its_handlers_have_ended", "fire raised in round "),
    (Swallows, "rule_13_an_event_raises_when_all_its_handlers_have_ended", "of ProbeA was not raised in round 1"),
    (IgnoresEdges, "rule_13_no_conflict_pairs_never_run_together", " started before ProbeA"),
    (SkipsTheLast, "rule_13_no_conflict_pairs_never_run_together", "in round 1 ran ['ProbeA', 'ProbeB']; wanted"),
    (ReversesResources, "rule_13_users_of_one_resource_never_run_together", "started before ProbeA"),
    (SkipsTheLast, "rule_13_users_of_one_resource_never_run_together", "in round 1 ran ['ProbeA', 'ProbeB']; wanted"),
    (DrawsAnywhere, "rule_13_random_numbers_are_drawn_on_the_training_thread", "on another thread in round "),
    (Backwards, "rule_13_random_numbers_are_drawn_on_the_training_thread", "random numbers in another order"),
    (Draws, "rule_13_it_comes_to_the_serial_result", "cbstate.total differs from the serial run"),
    (Backwards, "rule_13_it_comes_to_the_serial_result", "['Loss'][0][0] differs from the serial run"),
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
