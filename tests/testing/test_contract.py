"""The contract of executors: correct executors pass it, and a broken one fails the test of the rule that it breaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from copy import copy

import pytest
import torch

from flowtrain import SerialExecutor
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase, ValidationPhase
from flowtrain.graph.executor import Executor, Runner, Site
from flowtrain.graph.plan import Plan, PlannedHandler
from flowtrain.testing import ExecutorContract, ShuffledExecutor
from flowtrain.testing.probes import TORCH_SETTINGS, Trace, catching, messages, torch_state
from tests.support.executors import Call, Failures, Threads
from tests.support.programs import Programs


class TestSerialExecutor(ExecutorContract):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class TestShuffledExecutor(ExecutorContract):
    def make_executor(self) -> Executor:
        return ShuffledExecutor(1)


class TestThreads(ExecutorContract):
    """The executor behind the broken ones passes the contract, and runs independent handlers in parallel."""

    def make_executor(self) -> Executor:
        return Threads()


class Defers(Threads):
    """Runs deferrable callbacks when it is flushed, and counts their events; keeps every promise."""

    def __init__(self) -> None:
        super().__init__()
        self.events = 0
        self.pending: list[tuple[PlannedHandler, Event, Phase]] = []

    def call(self, planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
        if not planned.callback.deferrable:
            return super().call(planned, event, phase)
        self.events += 1
        self.pending.append((planned, event, phase))
        return None

    def flush(self) -> None:
        while self.pending:
            super().call(*self.pending.pop(0))

    def close(self) -> None:
        self.flush()
        super().close()

    def state_dict(self) -> Mapping[str, int]:
        self.flush()
        return {"events": self.events}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.events = state["events"]


class TestDefers(ExecutorContract):
    def make_executor(self) -> Executor:
        return Defers()


# --- executors that break one promise


class SavesUnflushed(Defers):
    def state_dict(self) -> Mapping[str, int]:
        return {"events": self.events}


class CountsAnew(Defers):
    """Forgets the events before the checkpoint."""

    def load_state_dict(self, state: Mapping[str, int]) -> None: ...


class Nameless(Threads):
    name = ""


class ForAnybody(Threads):
    def bind(self, site: Site) -> None:
        self.site = site


class CompilesForNobody(Threads):
    def compile(self, plan: Plan) -> Runner:
        return self.refuse if self.site is None else super().compile(plan)


class ExplainsAtLength(Threads):
    def explain(self, plan: Plan) -> str:
        return "one line\nand another"


class KeepsPlans(Threads):
    """Runs the first plan for an event even after the callbacks have changed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[type, type], Runner] = {}

    def compile(self, plan: Plan) -> Runner:
        made = super().compile(plan)
        return self.known.setdefault((plan.event_type, plan.phase_type), made)


class ClosesOnce(Threads):
    def close(self) -> None:
        assert not self.closed, "closed twice"
        super().close()


class RunsWhenClosed(Threads):
    """Still runs handlers after `close`."""

    def close(self) -> None:
        self.pool.shutdown()
        self.pool = ThreadPoolExecutor(8)


class BindsWhenClosed(Threads):
    def bind(self, site: Site) -> None:
        self.closed = False
        super().bind(site)


class LeavesThreads(Threads):
    def close(self) -> None:
        pool, self.pool = self.pool, ThreadPoolExecutor()
        super().close()
        self.pool = pool


class IgnoresEdges(Threads):
    def may_start(self, plan: Plan, position: int, done: int) -> bool:
        return True


class IgnoresTheLastEdge(Threads):
    """Does not wait for the last predecessor of a handler."""

    def may_start(self, plan: Plan, position: int, done: int) -> bool:
        ancestors = plan.ancestors[position]
        needed = ancestors & ~(1 << ancestors.bit_length() - 1) if ancestors else 0
        return needed & ~done == 0


class SkipsTheLast(Threads):
    """Leaves out the last handler of a plan."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        for planned in plan.handlers[:-1]:
            self.call(planned, event, phase)
        return []


class FiresACopy(Threads):
    def call(self, planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
        return super().call(planned, copy(event), phase)


class AnotherPhase(Threads):
    def call(self, planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
        return super().call(planned, event, ValidationPhase())


class OneViewForAll(Threads):
    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        for planned in plan.handlers:
            planned.call(event, phase, plan.handlers[0].view)
        return []


class DoesNotWait(Threads):
    """Returns while handlers still run."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        for planned in plan.handlers:
            self.pool.submit(self.call, planned, event, phase)
        return []


class RaisesAtOnce(Threads):
    """Does not wait for the other handlers after an exception of one kind."""

    kind: type[BaseException] = Exception

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        started = [self.start(planned, event, phase) for planned in plan.handlers]
        first = started[0].result()
        if isinstance(first, self.kind):
            raise first
        for each in started:
            each.result()
        return [] if first is None else [(plan.handlers[0], first)]


class InterruptsAtOnce(RaisesAtOnce):
    kind = KeyboardInterrupt


class HidesInterrupts(Threads):
    def call(self, planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
        failure = super().call(planned, event, phase)
        return None if isinstance(failure, KeyboardInterrupt) else failure


class ReversesResources(Threads):
    """Runs the users of one resource in reverse list order."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        if all(planned.node.union for planned in plan.handlers) and len(plan) == 3:
            for planned in reversed(plan.handlers):
                self.call(planned, event, phase)
            return []
        return super().run(plan, event, phase)


class DrawsAnywhere(Threads):
    def start(self, planned: PlannedHandler, event: Event, phase: Phase) -> Future[BaseException | None]:
        return self.pool.submit(self.surrounded(self.call), planned, event, phase)


class Draws(Threads):
    """Draws a random number from the generator of training."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        torch.rand(())
        return super().run(plan, event, phase)


class BareThreads(Threads):
    """Does not copy the training thread's torch state to its threads."""

    def surrounded(self, call: Call) -> Call:
        return call


class LeavesGradMode(Threads):
    """Turns gradients off in the training thread."""

    def ended(self, plan: Plan, site: Site, start: int) -> None:
        super().ended(plan, site, start)
        torch.set_grad_enabled(False)


class StopsAtTheFirstFailure(Threads):
    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        for planned in plan.handlers:
            failure = self.call(planned, event, phase)
            if failure is not None:
                return [(planned, failure)]
        return []


class RunsAfterFailures(Threads):
    """Runs handlers that depend on a failed one."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        found = [(planned, self.call(planned, event, phase)) for planned in plan.handlers]
        return [(planned, failure) for planned, failure in found if failure is not None]


class GivesUpOnWhoFailed(Threads):
    """Never again calls a handler that has failed once."""

    def __init__(self) -> None:
        super().__init__()
        self.given_up: set[str] = set()

    def call(self, planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
        failure = None if planned.node.name in self.given_up else super().call(planned, event, phase)
        if failure is not None:
            self.given_up.add(planned.node.name)
        return failure


class Swallows(Threads):
    """Loses every failure."""

    def fail(self, site: Site, plan: Plan, event: Event, phase: Phase, failures: Failures) -> None: ...


class FailuresBackwards(Threads):
    def fail(self, site: Site, plan: Plan, event: Event, phase: Phase, failures: Failures) -> None:
        site.fail(plan, event, phase, failures[::-1])


class RaisesTheFirstOnly(Threads):
    """Raises the first failure without the others."""

    def fail(self, site: Site, plan: Plan, event: Event, phase: Phase, failures: Failures) -> None:
        site.fail(plan, event, phase, failures[:1])


class TakesTheNotes(Threads):
    def fail(self, site: Site, plan: Plan, event: Event, phase: Phase, failures: Failures) -> None:
        try:
            site.fail(plan, event, phase, failures)
        except Exception as error:
            error.__notes__ = []
            raise


class SkipsAtFitEnd(Threads):
    """Ignores `Plan.always`, so that FitEnd skips handlers."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        failures, lost = Failures(), 0
        for position, planned in enumerate(plan.handlers):
            failure = None if plan.ancestors[position] & lost else self.call(planned, event, phase)
            if failure is not None:
                failures.append((planned, failure))
            if failure is not None or plan.ancestors[position] & lost:
                lost |= 1 << position
        return failures


class DropsFired(Threads):
    def ended(self, plan: Plan, site: Site, start: int) -> None:
        site.fired.clear()


class FiresInAnyOrder(Threads):
    def ended(self, plan: Plan, site: Site, start: int) -> None:
        random.Random(0).shuffle(site.fired)


class FiresAtOnce(Threads):
    """Fires the events of a handler when it returns, not at the end of the current event."""

    def start(self, planned: PlannedHandler, event: Event, phase: Phase) -> Future[BaseException | None]:
        found: Future[BaseException | None] = Future()
        found.set_result(self.call(planned, event, phase))
        if self.site is not None and self.site.fired:
            self.site.drain(phase)
        return found


class FiresWhatRaised(Threads):
    """Fires the events of handlers even if the current event failed."""

    def fail(self, site: Site, plan: Plan, event: Event, phase: Phase, failures: Failures) -> None:
        site.drain(phase)
        site.fail(plan, event, phase, failures)


BROKEN: list[tuple[str, type[Threads], str]] = [
    ("it_is_an_executor", Nameless, "name is empty; reports show it"),
    ("bind_takes_one_learner", ForAnybody, "no ExecutorError was raised"),
    ("compile_needs_a_learner", CompilesForNobody, "no ExecutorError was raised"),
    ("explain_is_one_line", ExplainsAtLength, "explain() is more than a line: 'one line\\nand another'"),
    ("a_change_of_callbacks_counts_from_the_next_event_on", KeepsPlans, "['ProbeA', 'ProbeC', 'ProbeD']"),
    ("flush_and_close_may_be_repeated", ClosesOnce, "closed twice"),
    ("a_closed_executor_runs_nothing", RunsWhenClosed, "no ExecutorError was raised"),
    ("a_closed_executor_runs_nothing", BindsWhenClosed, "no ExecutorError was raised"),
    (
        "a_resumable_executor_flushes_and_continues_its_counts",
        SavesUnflushed,
        "state_dict() returned when 0 of 1 events were done",
    ),
    (
        "a_resumable_executor_flushes_and_continues_its_counts",
        CountsAnew,
        "1 event, a resume and 1 event give the counts {'events': 1}; 2 events give {'events': 2}",
    ),
    ("close_ends_the_threads", LeavesThreads, "these threads run after close(): ['test-threads"),
    ("rule_12_no_handler_starts_before_those_it_waits_for", IgnoresEdges, "started before ProbeD returned"),
    ("rule_12_no_handler_starts_before_those_it_waits_for", IgnoresTheLastEdge, " started before "),
    ("rule_12_no_handler_starts_before_those_it_waits_for", SkipsTheLast, "'ProbeF']; wanted are "),
    ("rule_12_every_handler_gets_its_event_phase_and_view", FiresACopy, "and not the event that was fired"),
    ("rule_12_every_handler_gets_its_event_phase_and_view", AnotherPhase, "got ValidationPhase; TrainingPhase was"),
    ("rule_12_every_handler_gets_its_event_phase_and_view", OneViewForAll, "ProbeB got the view of another handler"),
    ("rule_13_an_event_ends_when_all_its_handlers_have", DoesNotWait, "the event ended while "),
    ("rule_13_an_event_ends_when_all_its_handlers_have", RaisesAtOnce, "the event ended while ['ProbeB'"),
    (
        "rule_13_an_event_ends_when_all_its_handlers_have",
        InterruptsAtOnce,
        "the event ended while ['ProbeB'",
    ),
    ("rule_13_an_event_ends_when_all_its_handlers_have", HidesInterrupts, "no KeyboardInterrupt was raised"),
    ("rule_13_what_must_not_run_together_runs_in_the_serial_order", IgnoresEdges, " started before ProbeA"),
    ("rule_13_what_must_not_run_together_runs_in_the_serial_order", ReversesResources, "started before ProbeA"),
    ("rule_13_random_numbers_are_drawn_on_the_training_thread", DrawsAnywhere, "on another thread in round "),
    ("rule_13_it_comes_to_the_serial_result", Draws, "cbstate.total differs from the serial run"),
    (
        "rule_14_a_handler_sees_the_training_threads_state_of_torch",
        BareThreads,
        "saw grad mode True in round 1; ",
    ),
    ("rule_14_a_handler_sees_the_training_threads_state_of_torch", LeavesGradMode, "the training thread, after the"),
    ("rule_15_those_that_depend_on_no_failed_one_still_run", StopsAtTheFirstFailure, "ran ['ProbeA', 'ProbeB']; "),
    ("rule_15_those_that_depend_on_no_failed_one_still_run", RunsAfterFailures, "'ProbeB', 'ProbeC', 'ProbeD'"),
    ("rule_15_those_that_depend_on_no_failed_one_still_run", GivesUpOnWhoFailed, "in round 1 ran after a failure ['"),
    ("rule_15_the_first_in_serial_order_is_raised", FailuresBackwards, "were raised [\"'second'\", 'first']; wanted"),
    ("rule_15_the_first_in_serial_order_is_raised", RaisesTheFirstOnly, "were raised ['first']; wanted"),
    ("rule_15_the_first_in_serial_order_is_raised", TakesTheNotes, "no note on the other: ValueError('first')"),
    ("rule_15_errors_go_before_cancels", RaisesTheFirstOnly, "in a fit were raised []; wanted are ['fit', 'epoch', 'b"),
    ("rule_15_every_exception_says_where_it_was_raised", RaisesTheFirstOnly, "two handlers failed, and "),
    ("rule_15_every_exception_says_where_it_was_raised", TakesTheNotes, "do not say 'raised in ProbeA.act at "),
    ("rule_16_every_begin_has_one_end", Swallows, "after CancelFittingException at FitBegin came "),
    ("rule_17_fit_end_runs_for_every_callback", SkipsAtFitEnd, "got FitEnd ['ProbeA', 'ProbeC']; wanted"),
    ("rule_17_fit_end_runs_for_every_callback", FailuresBackwards, "were raised ['end ProbeC', "),
    ("rule_18_fired_events_wait_for_the_current_one", DropsFired, "were fired []; wanted are ['ProbeA 0', "),
    ("rule_18_fired_events_wait_for_the_current_one", FiresInAnyOrder, "in round 1 were fired ["),
    ("rule_18_fired_events_wait_for_the_current_one", FiresAtOnce, "handled while its asker's event was running"),
    ("rule_18_fired_events_are_dropped_if_the_event_raises", FiresWhatRaised, "although their event raised ['later']"),
    (
        "rule_18_fired_events_are_dropped_if_the_event_raises",
        DropsFired,
        "after the next event []; wanted are ",
    ),
    ("rule_18_training_cannot_be_started_in_a_handler", Swallows, "no UsageError was raised"),
    (
        "rule_18_training_cannot_be_started_in_a_handler",
        RaisesTheFirstOnly,
        "only 1 of fit, epoch and step were",
    ),
]

TESTS = {name.removeprefix("test_") for name in dir(ExecutorContract) if name.startswith("test_")}


@pytest.mark.parametrize(("test", "kind", "message"), BROKEN, ids=[f"{kind.__name__}-{at}" for at, kind, _ in BROKEN])
def test_a_broken_executor_fails_the_test_of_the_rule_that_it_breaks(
    test: str, kind: type[Threads], message: str
) -> None:
    class Contract(ExecutorContract):
        rounds = 2
        patience = 0.1  # long enough for a busy machine

        def make_executor(self) -> Executor:
            return kind()

    with torch.enable_grad(), pytest.raises(AssertionError) as caught:  # one executor turns gradients off
        getattr(Contract(), f"test_{test}")()
    assert message in str(caught.value)


def test_every_test_of_the_contract_has_caught_a_broken_executor() -> None:
    assert {test for test, _, _ in BROKEN} == TESTS
    assert {int(test.split("_")[1]) for test in TESTS if test.startswith("rule_")} == set(range(12, 19))


def test_every_test_of_the_contract_says_what_is_promised() -> None:
    for name in TESTS:
        said = getattr(ExecutorContract, f"test_{name}").__doc__
        assert said, f"{name} does not state its promise"
        assert not name.startswith("rule_") or name.split("_")[1] in said, f"{name} does not name its rule"


def test_a_contract_without_an_executor_says_what_to_define() -> None:
    class Contract(ExecutorContract):
        pass

    with pytest.raises(NotImplementedError) as caught:
        Contract().make_executor()
    assert str(caught.value) == "Contract must define make_executor(): return a new executor."


def test_it_needs_no_pytest(programs: Programs) -> None:
    """Only the contract itself imports pytest, so other users of `flowtrain.testing` need not have it."""
    source = """
import sys
for name in [name for name in sys.modules if name.startswith("flowtrain.testing")]:
    del sys.modules[name]
sys.modules["pytest"] = None
import flowtrain.testing
flowtrain.testing.ExecutorContract
"""
    done = programs.run(source)
    assert done.returncode == 0, done.stderr


# --- the parts of the contract


def test_the_settings_of_rule_14_change_each_part_of_torchs_state() -> None:
    before, changed = torch_state(), {"stream"}  # the setting exists only with an accelerator
    for setting in TORCH_SETTINGS:
        with ExitStack() as stack:
            for enter in setting:
                stack.enter_context(enter())
            changed |= {what for what, value in torch_state().items() if value != before[what]}
        assert torch_state() == before
    assert changed == set(before)


def test_a_trace_says_who_started_before_whom_and_who_still_runs() -> None:
    trace = Trace(0.0)
    trace.before = {"c": ["a", "b"]}
    trace.start("a")
    trace.end("a")
    trace.start("c")
    assert trace.wrong == ["c started before b returned"]
    assert trace.started == ["a", "c"]
    assert trace.running() == ["c"]
    assert trace.threads == dict.fromkeys("ac", threading.get_ident())
    trace.clear()
    assert trace.started == trace.ended == trace.wrong == []
    trace.start("c")
    trace.start("c")
    trace.end("c")
    assert trace.running() == ["c"], "a handler that runs twice at once runs until both have ended"


def test_a_trace_waits_until_it_changes_and_no_longer_than_its_patience() -> None:
    trace, returned = Trace(60.0), list[str]()

    def wait() -> None:
        trace.wait_for_start("a", "b")
        returned.append("ab")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    trace.start("a")
    assert not returned
    trace.start("b")
    waiting.join(30.0)
    assert returned == ["ab"]
    Trace(0.001).wait_for_start("a")


def test_catching_gives_the_exception_that_came_and_lets_others_through() -> None:
    error = KeyError("here")
    with catching(LookupError) as found:
        raise error
    assert found == [error]
    with pytest.raises(AssertionError, match=r"^no ValueError was raised"), catching(ValueError):
        pass
    with pytest.raises(KeyError, match="other"), catching(ValueError):
        raise KeyError("other")


def test_the_messages_of_an_exception_are_those_of_all_that_is_attached_too() -> None:
    a, b, c, d = (ValueError(letter) for letter in "abcd")
    vars(a)["others"] = [b, c, d]
    vars(b)["others"] = [c]
    assert messages(a) == ["a", "b", "c", "d"]
    assert messages(None) == []
