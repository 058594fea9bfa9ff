"""Inline or parallel: what is decided from which times, with a clock that only the handlers move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from flowtrain import BatchEnd, Callback, Event, LearnerView, Phase, TrainingPhase, on
from flowtrain.graph.executor import Runner, SerialExecutor
from flowtrain.graph.plan import Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinySite
from flowtrain_dask.parallel.decision import Race
from flowtrain_dask.parallel.firing import Crew, Ways
from flowtrain_dask.parallel.strands import pack
from flowtrain_dask.parallel.task_graph import direct_predecessors


class Site(TinySite):
    """The loop as far as a race needs it: the runner in use, and what has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.used: Runner | None = None
        self.swaps = 0

    def swap(self, plan: Plan, runner: Runner) -> None:
        self.used = runner
        self.swaps += 1


class Works(Callback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    @on(BatchEnd)
    def work(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act()


class Two:
    """Two independent handlers; the test says what a firing takes, inline by handler, in parallel as a whole."""

    def __init__(self, crew: Crew, one: float, other: float, parallel: float) -> None:
        self.costs = [one, other]
        self.parallel = parallel
        self.now = 0.0
        self.ways: list[str] = []
        self.error: Exception | None = None
        self.crew = crew
        self.site = Site()
        callbacks = [Works(partial(self.work, 0)), Works(partial(self.work, 1))]
        self.plan = plan = Callbacks(callbacks, LearnerState()).plan(BatchEnd, TrainingPhase)
        serial = SerialExecutor()
        serial.bind(self.site)
        self.serial = serial.compile(plan)
        ways = Ways(plan, crew, self.site, self.clock)
        before = direct_predecessors(plan)
        self.race = Race(
            plan, ways, lambda costs: pack(before, costs, crew.workers), self.serial, self.site.swap, self.clock
        )
        self.site.used = self.race.runner

    def clock(self) -> float:
        return self.now

    def work(self, number: int) -> None:
        if not self.crew.busy:
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
            assert self.site.used is not None
            self.site.used(BatchEnd(), TrainingPhase())
        return list(self.ways)


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(2)
    yield made
    made.close()


RACE = ["parallel", *["inline", "parallel"] * 5]


def test_cheap_handlers_get_the_serial_runner_after_one_firing(crew: Crew) -> None:
    two = Two(crew, 20e-6, 10e-6, parallel=1e-6)
    assert two.fire() == ["inline"]
    assert two.site.used is two.serial, "not a wrapper of it"
    assert two.race.mode == "inline"
    assert two.race.reason == "the handlers take 0.03 ms, running them together saves less than the effort"
    assert two.fire(1000) == ["inline"] * 1000
    assert two.site.swaps == 1


def test_long_handlers_run_in_parallel_at_once(crew: Crew) -> None:
    two = Two(crew, 6e-3, 7e-3, parallel=7.2e-3)
    assert two.fire(3) == ["inline", "parallel", "parallel"]
    assert two.race.mode == "parallel"
    assert two.race.reason == "the handlers take 13.00 ms one after the other"


@pytest.mark.parametrize(
    ("parallel", "mode"), [(2.2e-3, "parallel"), (3.7e-3, "parallel"), (3.9e-3, "inline"), (5e-3, "inline")]
)
def test_in_between_a_race_decides(crew: Crew, parallel: float, mode: str) -> None:
    """5% is what parallel must gain; the first parallel firing does not count, it starts threads."""
    two = Two(crew, 2e-3, 2e-3, parallel)
    assert two.fire(12) == ["inline", *RACE]
    assert two.race.mode == mode
    assert two.race.reason == f"in a race it took {parallel * 1e3:.2f} ms in parallel and 4.00 ms inline"
    assert two.fire(3) == [mode] * 3


def test_one_slow_firing_decides_nothing(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=2.5e-3)
    two.fire(2)
    two.parallel = 1.0
    two.fire(2)
    two.parallel = 2.5e-3
    two.fire(8)
    assert two.race.mode == "parallel"


def test_a_plan_that_got_cheap_goes_back_inline(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    two.costs, two.parallel = [1e-6, 1e-6], 150e-6
    assert two.fire(5) == ["parallel"] * 3 + ["inline"] * 2
    assert two.site.used is two.serial


def test_a_plan_that_takes_longer_is_raced_again(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    two.costs, two.parallel = [4e-3, 4e-3], 9e-3  # now they hold each other up
    assert two.fire(15) == ["parallel"] * 3 + ["inline"] + RACE
    assert two.race.mode == "inline"


def test_a_decision_for_parallel_is_raced_again_now_and_then(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    inline = two.fire(2000).count("inline")
    assert 0 < inline <= 40, "a few firings of thousands, ever fewer"
    assert two.race.mode == "parallel"


def test_looking_again_at_a_clear_win_costs_one_firing_inline(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    ways = two.fire(1000)
    assert ways.count("inline") == 4, "after 64, 128, 256 and 512 more"
    assert two.race.reason == "it took 2.20 ms in parallel and 4.00 ms inline"


def test_looking_again_races_where_the_first_firing_inline_is_no_longer_slow(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=2.2e-3)
    two.fire(12)
    two.costs = [1e-3, 1.1e-3]
    ways = two.fire(64 + 10)
    assert ways == ["parallel"] * 64 + ["inline", "parallel"] * 5
    assert two.race.mode == "inline"


def test_who_lost_a_race_is_measured_again_and_raced_only_with_other_costs(crew: Crew) -> None:
    two = Two(crew, 2e-3, 2e-3, parallel=5e-3)
    two.fire(12)
    assert "parallel" not in two.fire(2000)
    two.costs, two.parallel = [4e-3, 4e-3], 4.2e-3
    ways = two.fire(5000)
    assert two.race.mode == "parallel"
    assert ways[-1] == "parallel"


def test_a_cheap_plan_is_looked_at_again_when_told(crew: Crew) -> None:
    two = Two(crew, 1e-6, 1e-6, parallel=2.2e-3)
    two.fire()
    two.costs = [2e-3, 2e-3]
    two.race.rearm()
    assert two.site.used is two.serial, "that was a moment ago"
    two.now += 2.0
    two.race.rearm()
    assert two.fire(12) == ["inline", *RACE]
    assert two.race.mode == "parallel"
    swaps = two.site.swaps
    two.race.rearm()
    assert two.site.swaps == swaps, "only a plan that is not counted needs it"


def test_a_firing_that_fails_is_not_a_time(crew: Crew) -> None:
    """What was skipped took no time; the failure is reported whatever the race is doing."""
    two = Two(crew, 2e-3, 2e-3, parallel=2.2e-3)
    two.error = ValueError("broken")
    assert two.fire(3) == ["inline"] * 3
    assert two.race.mode == "measuring"
    two.error = None
    two.fire(2)
    two.error = ValueError("broken")
    assert two.fire(2) == ["inline"] * 2, "the turn is taken again"
    two.error = None
    assert two.fire(10) == RACE[1:]
    assert [str(failure) for _, failure in two.site.failures] == ["broken"] * 5
