"""What executors promise about torch's state: the serial one keeps it, and broken ones are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Executor, SerialExecutor, Site
from flowtrain.graph.plan import Plan, Step
from flowtrain.testing.surroundings import TorchPromises
from tests.testing.test_contract import TESTS, Threads, contract_of, failing


class TestSerialExecutor(TorchPromises):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class BareThreads(Threads):
    """Its threads have the state that threads begin with."""

    def surrounded(self, call: Callable[..., BaseException | None]) -> Callable[..., BaseException | None]:
        return call


class MoreThreads(Threads):
    """Sums with more threads than are set, and makes float32 whatever is set."""

    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        torch.set_num_threads(max(2, threads) + 1)
        torch.set_default_dtype(torch.float32)
        try:
            return super().call(step, event, phase)
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)

    def start(self, step: Step, event: Event, phase: Phase) -> Future[BaseException | None]:
        found: Future[BaseException | None] = Future()
        found.set_result(self.call(step, event, phase))
        return found


class LeavesGradMode(Threads):
    """Leaves the training thread without gradients."""

    def ended(self, plan: Plan, site: Site, start: int) -> None:
        super().ended(plan, site, start)
        torch.set_grad_enabled(False)


BROKEN: list[tuple[type[Threads], str, str]] = [
    (BareThreads, "rule_14_grad_mode", "saw True inside of the context, in round 2; the training thread has False"),
    (BareThreads, "rule_14_inference_mode", "saw (False, True) inside of the context, in round 2; "),
    (BareThreads, "rule_14_autocast", "saw (False, torch.bfloat16, True) inside of the context, in round 2; "),
    (BareThreads, "rule_14_default_device_and_dtype", "saw device(type='cpu') inside of the context, in round 2; "),
    (MoreThreads, "rule_14_default_device_and_dtype", "saw torch.float32 inside of the context, in round 2; "),
    (MoreThreads, "rule_14_threads_within_an_operation", " outside of the context, in round 1; "),
    (BareThreads, "rule_14_context_variables", "saw 'unset' inside of the context, in round 2; "),
    (LeavesGradMode, "rule_14_grad_mode", "the training thread had True before the event, and False after"),
]


@pytest.fixture
def grad_mode() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.mark.parametrize(
    ("kind", "test", "message"), BROKEN, ids=[f"{each.__name__}-{test}" for each, test, _ in BROKEN]
)
@pytest.mark.usefixtures("grad_mode")
def test_a_broken_executor_fails_the_test_of_what_it_breaks(kind: type[Threads], test: str, message: str) -> None:
    contract = contract_of(kind)
    contract.patience = 0.1  # the machine may be busy
    said = failing(contract, f"test_{test}")
    assert said.startswith("AssertionError: "), said
    assert message in said


def test_what_bare_threads_miss() -> None:
    """Rule 14 has a test for each thing that torch keeps for a thread, and for context variables."""
    contract = contract_of(BareThreads)
    missed = [name for name in TESTS if "rule_14" in name and failing(contract, name)]
    # A thread takes over the number of intra-op threads when it starts, and the default dtype is one for all.
    wanted = {"grad_mode", "inference_mode", "autocast", "default_device_and_dtype", "context_variables"}
    assert {name.removeprefix("test_rule_14_") for name in missed} >= wanted
