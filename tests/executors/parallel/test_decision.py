"""Inline or parallel: what is decided from which times, with a clock that only the handlers move."""

from __future__ import annotations

import pytest

from flowtrain import BatchEnd, TrainingPhase
from flowtrain.graph.executor import Runner
from flowtrain.graph.serial import SerialExecutor
from flowtrain.testing import TinySite
from flowtrain_dask.parallel.decision import Decision, Mode
from flowtrain_dask.parallel.firing import StrandPool, TimedPlan
from flowtrain_dask.parallel.strands import pack
from flowtrain_dask.parallel.task_graph import direct_predecessors
from tests.support.handlers import Does, plan_of


class Two:
    """Two independent handlers; the test says what a firing takes, inline by handler, in parallel as a whole."""

    def __init__(self, pool: StrandPool, one: float, other: float, parallel: float, key: str | None = None) -> None:
        self.costs = [one, other]
        self.parallel = parallel
        self.now = 0.0
        self.ways: list[str] = []
        self.error: Exception | None = None
        self.pool = pool
        self.site = TinySite()
        self.used: list[Runner] = []
        callbacks = [Does(lambda _: self.work(0)), Does(lambda _: self.work(1))]
        plan = plan_of(*callbacks)
        serial = SerialExecutor()
        serial.bind(self.site)
        self.serial = serial.compile(plan)
        timed = TimedPlan(plan, pool, self.site, self.serial, self.clock, self.clock)
        before = direct_predecessors(plan)
        self.decision = Decision(
            timed, lambda costs, waiting: pack(before, costs, pool.workers), self.used.append, self.clock, key
        )
        self.used.append(self.decision.first)

    def clock(self) -> float:
        return self.now

    def mode(self) -> Mode:
        return self.decision.mode

    def work(self, number: int) -> None:
        if not self.pool.busy:
            self.now += self.costs[number]
            self.ways += ["inline"] if number else []
        elif number:  # one of the two moves the clock for both
            self.now += self.parallel
            self.ways.append("parallel")
        if self.error is not None and number:
            raise self.error

    def fire(self, times: int = 1) -> list[str]:
        """Fire so many times; return how each went."""
        self.ways.clear()
        for _ in range(times):
            self.used[-1](BatchEnd(), TrainingPhase())
        return list(self.ways)


ROUND = ["parallel", "inline"]


def test_cheap_handlers_get_the_serial_runner_after_one_firing(pool: StrandPool) -> None:
    two = Two(pool, 20e-6, 10e-6, parallel=1e-6)
    assert two.fire() == ["inline"]
    assert two.used[1:] == [two.serial], "not a wrapper of it"
    assert two.mode() == "inline"
    assert two.decision.reason == "the handlers take 0.03 ms, running them together saves less than the effort"
    assert two.fire(1000) == ["inline"] * 1000


@pytest.mark.parametrize("longer", [1, 100, 10_000])
def test_a_clear_win_is_seen_after_two_rounds(pool: StrandPool, longer: int) -> None:
    """Handlers that take seconds are raced as well: an estimate would be wrong for those that hold the lock."""
    two = Two(pool, 2e-3 * longer, 2e-3 * longer, parallel=2.2e-3 * longer)
    assert two.fire(8) == ["inline", *ROUND * 2, *["parallel"] * 3]
    assert two.mode() == "parallel"
    assert two.decision.reason == f"in a race it took {2.2 * longer:.2f} ms in parallel and {4 * longer:.2f} ms inline"


def test_a_clear_loss_is_seen_after_two_rounds(pool: StrandPool) -> None:
    two = Two(pool, 2e-3, 2e-3, parallel=7e-3)
    assert two.fire(8) == ["inline", *ROUND * 2, *["inline"] * 3]
    assert two.used[-1] == two.serial
    assert two.decision.reason == "in a race it took 7.00 ms in parallel and 4.00 ms inline"


@pytest.mark.parametrize(
    ("parallel", "mode"), [(2.7e-3, "parallel"), (3.7e-3, "parallel"), (3.9e-3, "inline"), (5e-3, "inline")]
)
def test_in_between_the_medians_of_five_rounds_decide(pool: StrandPool, parallel: float, mode: str) -> None:
    """5% is what parallel must gain."""
    two = Two(pool, 2e-3, 2e-3, parallel)
    assert two.fire(11) == ["inline", *ROUND * 5]
    assert two.mode() == mode
    assert two.decision.reason == f"in a race it took {parallel * 1e3:.2f} ms in parallel and 4.00 ms inline"
    assert two.fire(3) == [mode] * 3


@pytest.mark.parametrize("slow", range(5))
@pytest.mark.parametrize(("parallel", "mode"), [(2.2e-3, "parallel"), (4.2e-3, "inline")])
def test_one_slow_firing_decides_nothing(pool: StrandPool, parallel: float, mode: str, slow: int) -> None:
    """Neither one that runs in parallel, such as the first, which starts threads, nor one that runs inline."""
    for way in ROUND:
        two = Two(pool, 2e-3, 2e-3, parallel)
        two.fire(1 + 2 * slow)
        if two.mode() != "racing":
            continue
        if way == "inline":
            two.fire()
            two.costs = [1.0, 1.0]
        else:
            two.parallel = 1.0
        two.fire()
        two.costs, two.parallel = [2e-3, 2e-3], parallel
        two.fire(10)
        assert two.mode() == mode


def look(two: Two, seconds: float) -> bool:
    """Tell whether a plan is timed again when an epoch begins so long after the last firing."""
    two.now += seconds
    count = len(two.used)
    two.decision.look_again()
    return len(two.used) > count and two.mode() == "measuring"


def test_a_cheap_plan_is_looked_at_again_after_a_second(pool: StrandPool) -> None:
    two = Two(pool, 1e-6, 1e-6, parallel=2.2e-3)
    two.fire()
    two.costs = [2e-3, 2e-3]
    assert not look(two, 0.9)
    assert look(two, 0.2)
    assert two.fire(5) == ["inline", *ROUND * 2]
    assert two.mode() == "parallel"


@pytest.mark.parametrize(("parallel", "mode"), [(2.2e-3, "parallel"), (7e-3, "inline")])
def test_looking_again_takes_a_hundredth_of_the_time_at_most(pool: StrandPool, parallel: float, mode: str) -> None:
    two = Two(pool, 2e-3, 2e-3, parallel)
    two.fire(5)
    spent = 3 * 4e-3 + 2 * parallel
    assert spent * 100 > 1
    assert not look(two, spent * 99)
    assert look(two, spent * 2)
    assert not look(two, 1e6), "it is being timed"
    assert two.fire(5) == ["inline", *ROUND * 2]
    assert two.mode() == mode


def test_a_plan_that_got_cheap_goes_back_inline(pool: StrandPool) -> None:
    two = Two(pool, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    two.costs, two.parallel = [1e-6, 1e-6], 150e-6
    assert two.fire(5) == ["parallel"] * 5
    assert look(two, 10.0)
    assert two.fire(2) == ["inline"] * 2
    assert two.used[-1] == two.serial


def test_a_plan_whose_handlers_hold_each_other_up_now_goes_back_inline(pool: StrandPool) -> None:
    two = Two(pool, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    two.parallel = 5e-3
    assert look(two, 10.0)
    two.fire(11)
    assert two.mode() == "inline"
    two.parallel = 2.2e-3
    assert look(two, 10.0)
    two.fire(5)
    assert two.mode() == "parallel"


def test_before_the_first_firing_there_is_nothing_to_look_at_again(pool: StrandPool) -> None:
    two = Two(pool, 2e-3, 2e-3, parallel=2.2e-3)
    assert two.decision.reason == "not fired yet"
    assert not look(two, 1e6)
    assert two.decision.reason == "not fired yet"


def test_a_firing_that_fails_is_not_a_time(pool: StrandPool) -> None:
    """What was skipped took no time; the failure is reported whatever is being timed."""
    two = Two(pool, 2e-3, 2e-3, parallel=3.5e-3)
    two.error = ValueError("broken")
    assert two.fire(3) == ["inline"] * 3
    assert two.mode() == "measuring"
    two.error = None
    two.fire(2)
    two.error = ValueError("broken")
    assert two.fire(2) == ["inline"] * 2, "the turn is taken again"
    two.error = None
    assert two.fire(9) == (ROUND * 5)[1:]
    assert two.mode() == "parallel"
    two.error = ValueError("broken")
    two.fire()
    assert [str(failure) for _, failure in two.site.failures] == ["broken"] * 6


def test_an_event_that_a_handler_fires_on_a_strand_runs_inline(pool: StrandPool) -> None:
    """Whatever is being done with its plan: the threads are taken."""
    two = Two(pool, 2e-3, 2e-3, parallel=2.2e-3)
    for runner in (two.decision.measure, two.decision.race):
        pool.busy = True
        runner(BatchEnd(), TrainingPhase())
        pool.busy = False
    assert two.mode() == "measuring"
    assert len(two.used) == 1


def test_a_plan_for_which_parallel_has_won_in_this_process_begins_in_parallel(pool: StrandPool) -> None:
    """A further learner with the same handlers; if it loses there, it begins inline the next time."""
    key = "test_decision"
    two = Two(pool, 2e-3, 2e-3, 2.2e-3, key)
    two.fire(5)
    assert two.mode() == "parallel"
    again = Two(pool, 2e-3, 2e-3, 2.2e-3, key)
    assert (again.mode(), again.decision.strands.work) == ("racing", 4e-3)
    assert again.fire(6) == [*ROUND * 2, *["parallel"] * 2]
    loses = Two(pool, 2e-3, 2e-3, 7e-3, key)
    assert loses.fire(5) == [*ROUND * 2, "inline"]
    assert Two(pool, 2e-3, 2e-3, 2.2e-3, key).fire() == ["inline"]
    assert Two(pool, 2e-3, 2e-3, 2.2e-3, "another").mode() == "measuring"
