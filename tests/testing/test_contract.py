"""The contract of executors: two of ours pass it, and one that is installed; each broken one fails the right test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
import torch

from flowtrain import SerialExecutor
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError
from flowtrain.graph.executor import Executor, Runner, Site, find_executor
from flowtrain.graph.plan import Plan, Step
from flowtrain.testing import ExecutorContract, ShuffledExecutor, tiny_learner
from flowtrain_dask.parallel.torch_state import TorchState


class TestSerialExecutor(ExecutorContract):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class TestShuffledExecutor(ExecutorContract):
    def make_executor(self) -> Executor:
        return ShuffledExecutor(1)


# --- executors that break a promise


class Threads:
    """An executor that keeps every promise with one thread for each handler; those below break one each."""

    name = "threads"

    def __init__(self) -> None:
        self.site: Site | None = None
        self.pool = ThreadPoolExecutor(8, "test-threads")
        self.plans: list[Plan] = []
        self.closed = False

    def bind(self, site: Site) -> None:
        if self.closed or (self.site is not None and self.site is not site):
            raise ExecutorError("closed, or another learner's")
        self.site = site

    def check(self, nodes: object, state: object) -> None: ...

    def compile(self, plan: Plan) -> Runner:
        if self.closed or self.site is None:
            raise ExecutorError("closed, or no learner's")
        site = self.site
        self.plans.append(plan)

        def run(event: Event, phase: Phase) -> None:
            start = len(site.fired)
            failures = self.run(plan, event, phase)
            self.ended(plan, site, start)
            if failures:
                self.fail(site, plan, event, phase, failures)
            if site.fired:
                site.drain(phase)

        return run

    def run(self, plan: Plan, event: Event, phase: Phase) -> list[tuple[Step, BaseException]]:
        """Run what is ready, all of it at once, until nothing is left."""
        failures: dict[int, BaseException] = {}
        left, done, lost = list(range(len(plan))), 0, 0
        interrupt: BaseException | None = None
        while left and interrupt is None:
            ready = [position for position in left if self.may_start(plan, position, done)]
            running: list[tuple[int, Future[BaseException | None]]] = []
            for position in ready:
                left.remove(position)
                if plan.ancestors[position] & lost and not plan.always:
                    lost |= 1 << position
                else:
                    running.append((position, self.start(plan.steps[position], event, phase)))
            for position, future in running:
                failure = future.result()
                if failure is not None:
                    lost |= 1 << position
                    failures[position] = failure
                    if not isinstance(failure, Exception):
                        interrupt = failure
            done |= sum(1 << position for position in ready)
        if interrupt is not None and not plan.always:
            raise interrupt
        return [(plan.steps[position], failure) for position, failure in sorted(failures.items())]

    def may_start(self, plan: Plan, position: int, done: int) -> bool:
        return plan.ancestors[position] & ~done == 0

    def start(self, step: Step, event: Event, phase: Phase) -> Future[BaseException | None]:
        """Run handlers that draw random numbers here, and others on another thread, in this thread's state."""
        if any(path[:2] == ("resource", "rng") for path, _ in step.node.access[step.handler]):
            found: Future[BaseException | None] = Future()
            found.set_result(self.call(step, event, phase))
            return found
        return self.pool.submit(self.surrounded(self.call), step, event, phase)

    def surrounded(self, call: Callable[..., BaseException | None]) -> Callable[..., BaseException | None]:
        return _in_this_state(TorchState.capture(), call)

    def call(self, step: Step, event: Event, phase: Phase) -> BaseException | None:
        try:
            step.call(event, phase, step.view)
        except BaseException as failure:  # a value here, raised by `fail`
            return failure
        return None

    def ended(self, plan: Plan, site: Site, start: int) -> None:
        rank = {step.node.name: position for position, step in enumerate(plan.steps)}
        site.fired[start:] = sorted(site.fired[start:], key=lambda one: rank[one[0]])

    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        site.fail(plan, event, phase, failures)

    def explain(self, plan: Plan) -> str:
        return "a thread for each handler"

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        self.pool.shutdown()
        for plan in self.plans:
            if self.site is not None:
                self.site.swap(plan, _refuse)


def _in_this_state(state: TorchState, call: Callable[..., BaseException | None]) -> Callable[..., BaseException | None]:
    context = copy_context()

    def run(*args: object) -> BaseException | None:
        found: list[BaseException | None] = []
        context.run(state.call, lambda: found.append(call(*args)))
        return found[0]

    return run


def _refuse(event: Event, phase: Phase) -> None:
    raise ExecutorError("closed")


class Swallows(Threads):
    """Raises nothing."""

    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None: ...


class RaisesTheFirstOnly(Threads):
    """Loses the failures that came with it."""

    def fail(
        self, site: Site, plan: Plan, event: Event, phase: Phase, failures: list[tuple[Step, BaseException]]
    ) -> None:
        site.fail(plan, event, phase, failures[:1])


class LeavesThreads(Threads):
    def close(self) -> None:
        self.closed = True
        for plan in self.plans:
            if self.site is not None:
                self.site.swap(plan, _refuse)


class ForAnybody(Threads):
    def bind(self, site: Site) -> None:
        self.site = site


class KeepsPlans(Threads):
    """Runs the first plan that it was given for an event, whatever came later."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[type, type], Runner] = {}

    def compile(self, plan: Plan) -> Runner:
        made = super().compile(plan)
        return self.known.setdefault((plan.event_type, plan.phase_type), made)


class GoesOnWhenClosed(Threads):
    def close(self) -> None:
        """Nothing ends, but the threads."""
        self.pool.shutdown()
        self.pool = ThreadPoolExecutor(8)


BROKEN: dict[type[Threads], str] = {
    LeavesThreads: "close_ends_the_threads",
    ForAnybody: "bind_takes_one_learner",
    KeepsPlans: "a_change_of_callbacks_counts_from_the_next_event_on",
    GoesOnWhenClosed: "a_closed_executor_runs_nothing",
}


class TestThreads(ExecutorContract):
    """Nothing is wrong with what the broken ones are made of, and it runs what it may at the same time."""

    def make_executor(self) -> Executor:
        return Threads()


def contract_of(kind: Callable[[], Executor]) -> ExecutorContract:
    class Contract(ExecutorContract):
        rounds = 2

        def make_executor(self) -> Executor:
            return kind()

    return Contract()


TESTS = [name for name in dir(ExecutorContract) if name.startswith("test_")]


def failing(contract: ExecutorContract, name: str) -> str:
    """What a test of the contract says; empty if it passes."""
    try:
        getattr(contract, name)()
    except Exception as error:  # whichever way it fails
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(("kind", "test"), BROKEN.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_broken_executor_fails_the_test_of_what_it_breaks(kind: type[Threads], test: str) -> None:
    assert f"test_{test}" in TESTS
    said = failing(contract_of(kind), f"test_{test}")
    assert said.startswith("AssertionError: "), said


@pytest.mark.parametrize(
    ("kind", "test", "message"),
    [
        (LeavesThreads, "close_ends_the_threads", "these threads run after close(): ['test-threads"),
    ],
)
def test_what_a_failing_test_says(kind: type[Threads], test: str, message: str) -> None:
    assert message in failing(contract_of(kind), f"test_{test}")


def test_every_rule_has_a_test_that_says_what_is_promised() -> None:
    for rule in range(12, 19):
        assert any(f"rule_{rule}_" in name for name in TESTS), f"no test of rule {rule}"
    for name in TESTS:
        assert getattr(ExecutorContract, name).__doc__, f"{name} does not say what is promised"
        if "rule_" in name:
            number = name.split("_")[2]
            assert number in getattr(ExecutorContract, name).__doc__, f"{name} does not name its rule"


def test_a_contract_without_an_executor_says_what_to_define() -> None:
    class Contract(ExecutorContract):
        pass

    with pytest.raises(NotImplementedError) as caught:
        Contract().make_executor()
    assert str(caught.value) == "Contract must define make_executor(): return a new executor."


def test_it_needs_no_pytest() -> None:
    """Only who runs the contract needs pytest."""
    source = "import sys; sys.modules['pytest'] = None; import flowtrain.testing; flowtrain.testing.ExecutorContract"
    subprocess.run([sys.executable, "-c", source], check=True)


# --- an executor that somebody else has installed

PACKAGE = '''
"""Runs handlers by whoever waits longest; written without a line of flowtrain's own executors."""

from flowtrain.errors import ExecutorError


class BackwardsExecutor:
    name = "backwards"

    def __init__(self):
        self.site, self.plans, self.closed, self.ran = None, [], False, 0

    def bind(self, site):
        if self.closed or self.site not in (None, site):
            raise ExecutorError("This BackwardsExecutor is closed, or belongs to another learner.")
        self.site = site

    def check(self, nodes, state):
        pass

    def compile(self, plan):
        if self.closed or self.site is None:
            raise ExecutorError("This BackwardsExecutor is closed, or has no learner.")
        site, ranks = self.site, {step.node.name: rank for rank, step in enumerate(plan.steps)}
        self.plans.append(plan)

        def run(event, phase):
            start, left, done, lost, failures = len(site.fired), set(range(len(plan))), 0, 0, {}
            while left:
                position = max(one for one in left if not plan.ancestors[one] & ~done)
                left.remove(position)
                done |= 1 << position
                if plan.ancestors[position] & lost and not plan.always:
                    lost |= 1 << position
                    continue
                step = plan.steps[position]
                self.ran += 1
                try:
                    step.call(event, phase, step.view)
                except Exception as failure:
                    failures[position] = failure
                    lost |= 1 << position
            site.fired[start:] = sorted(site.fired[start:], key=lambda one: ranks[one[0]])
            if failures:
                site.fail(plan, event, phase, [(plan.steps[one], failures[one]) for one in sorted(failures)])
            if site.fired:
                site.drain(phase)

        return run

    def explain(self, plan):
        return "backwards"

    def flush(self):
        pass

    def close(self):
        self.closed = True
        for plan in self.plans:
            self.site.swap(plan, self.refuse)

    def refuse(self, event, phase):
        raise ExecutorError("This BackwardsExecutor is closed.")
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with an entry point, in a folder on ``sys.path``: installed as far as Python knows."""
    (tmp_path / "backwards_executors.py").write_text(PACKAGE, "utf-8")
    info = tmp_path / "backwards_executors-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backwards-executors\nVersion: 0.1\n", "utf-8")
    points = "[flowtrain.executors]\nbackwards = backwards_executors:BackwardsExecutor\n"
    (info / "entry_points.txt").write_text(points, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "backwards"
    sys.modules.pop("backwards_executors", None)


def test_an_installed_executor_is_used_by_its_name(installed: str) -> None:
    with tiny_learner(executor=installed) as learner, tiny_learner() as serial:
        learner.fit(1)
        serial.fit(1)
        assert type(learner.executor).__name__ == "BackwardsExecutor"
        assert vars(learner.executor)["ran"] > 0
        assert torch.equal(learner.model.coeff, serial.model.coeff)


@pytest.mark.parametrize("test", TESTS)
def test_an_installed_executor_keeps_the_contract(installed: str, test: str) -> None:
    said = failing(contract_of(lambda: find_executor(installed)), test)
    assert not said
