"""A plan run inline and on strands: the times and the failures of each, and what is done with them afterwards."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest

from flowtrain import BatchEnd, Callback, Event, LearnerView, Phase, TrainingPhase
from flowtrain.graph.plan import Failed, Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.serial import SerialExecutor
from flowtrain.testing import TinySite
from flowtrain_dask.parallel.firing import HandlerFailures, StrandPool, TimedPlan
from flowtrain_dask.parallel.strands import pack
from flowtrain_dask.parallel.task_graph import direct_predecessors
from tests.support.handlers import TIMEOUT, A, B, C, nothing


class Own(Event):
    def __init__(self, number: int) -> None:
        self.number = number


class Raises(TinySite):
    """Raises for failures, as the loop does."""

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
        super().fail(plan, event, phase, failures)
        raise failures[0][1]


class Batch:
    """What a handler holds when it fails."""


class Bench:
    """A plan with a clock that only handlers move."""

    def __init__(self, pool: StrandPool, *callbacks: Callback, site: TinySite | None = None) -> None:
        self.now = 100.0
        self.site = TinySite() if site is None else site
        self.site.state.fired = self.site.fired
        self.plan = Callbacks(callbacks, self.site.state).plan(BatchEnd, TrainingPhase)
        serial = SerialExecutor()
        serial.bind(self.site)
        self.waited = 0.0
        self.timed = TimedPlan(
            self.plan, pool, self.site, serial.compile(self.plan), lambda: self.now, lambda: self.now - self.waited
        )
        self.strands = pack(direct_predecessors(self.plan), [1.0] * len(self.plan), pool.workers)

    def takes(self, seconds: float) -> Callable[[LearnerView], None]:
        """Return what a handler does that takes so long."""

        def act(learner: LearnerView) -> None:
            self.now += seconds

        return act

    def inline(self) -> tuple[list[float], HandlerFailures]:
        return self.timed.inline(BatchEnd(), TrainingPhase())

    def parallel(self) -> tuple[float, HandlerFailures]:
        return self.timed.parallel(self.strands, BatchEnd(), TrainingPhase())

    def end_event(self, failures: HandlerFailures) -> None:
        self.timed.end_event(failures, BatchEnd(), TrainingPhase())


def fail(learner: LearnerView) -> None:
    raise ValueError("broken")


def names(failures: HandlerFailures) -> list[tuple[str, str]]:
    return [(planned.node.name, str(failure)) for planned, failure in failures]


def test_inline_runs_in_serial_order_on_this_thread_and_times_each_handler(pool: StrandPool) -> None:
    ran: list[tuple[str, int]] = []
    bench: Bench

    def act(name: str, seconds: float) -> Callable[[LearnerView], None]:
        def run(learner: LearnerView) -> None:
            bench.takes(seconds)(learner)
            ran.append((name, threading.get_ident()))

        return run

    bench = Bench(pool, A(act("A", 1.0), (B,)), B(act("B", 2.0)), C(act("C", 4.0)))
    times, failures = bench.inline()
    here = threading.get_ident()
    assert [planned.node.name for planned in bench.plan.handlers] == [name for name, _ in ran]
    assert {thread for _, thread in ran} == {here}
    assert times == [{"A": 1.0, "B": 2.0, "C": 4.0}[name] for name, _ in ran]
    assert failures == []


def test_inline_skips_what_depends_on_a_failure_and_times_only_what_ran(pool: StrandPool) -> None:
    """Rule 15."""
    ran: list[str] = []
    bench = Bench(pool, A(fail), B(lambda _: ran.append("B"), (A,)), C(lambda _: ran.append("C")))
    times, failures = bench.inline()
    assert ran == ["C"]
    assert len(times) == 2, "the failed one, and C"
    assert names(failures) == [("A", "broken")]
    assert bench.site.failures == [], "nothing is raised before the event ends"


def test_inline_lets_an_interrupt_through(pool: StrandPool) -> None:
    ran: list[str] = []

    def leave(learner: LearnerView) -> None:
        raise KeyboardInterrupt

    bench = Bench(pool, A(leave), B(lambda _: ran.append("B")))
    with pytest.raises(KeyboardInterrupt):
        bench.inline()
    assert ran == []


def test_in_parallel_the_whole_firing_is_timed_and_failures_are_in_serial_order(pool: StrandPool) -> None:
    second = threading.Event()
    bench: Bench

    def late(learner: LearnerView) -> None:
        assert second.wait(TIMEOUT)
        bench.now += 3.0
        raise ValueError("A")

    def early(learner: LearnerView) -> None:
        second.set()
        raise ValueError("B")

    bench = Bench(pool, A(late), B(early))
    took, failures = bench.parallel()
    assert took == 3.0
    assert names(failures) == [("A", "A"), ("B", "B")]
    assert bench.site.failures == []


def test_strands_are_running_only_while_they_are(pool: StrandPool) -> None:
    busy: list[bool] = []
    bench: Bench

    def look(learner: LearnerView) -> None:
        busy.append(bench.timed.busy)

    bench = Bench(pool, A(look), B(look))
    bench.inline()
    assert busy == [False, False]
    bench.parallel()
    assert busy == [False, False, True, True]
    assert not bench.timed.busy


def test_events_are_drained_in_serial_order_of_who_fired_them(pool: StrandPool) -> None:
    """Rule 18: B fires first in time, A comes first in order; the events of one callback keep their order."""
    fired = threading.Event()

    def late(learner: LearnerView) -> None:
        assert fired.wait(TIMEOUT)
        learner.fire(Own(1))
        learner.fire(Own(2))

    def early(learner: LearnerView) -> None:
        learner.fire(Own(3))
        learner.fire(Own(4))
        fired.set()

    bench = Bench(pool, A(late), B(early))
    waiting = ("somebody", Own(0))
    bench.site.fired.append(waiting)  # of an event outside of this one: it keeps its place
    _, failures = bench.parallel()
    assert bench.site.drained == []
    bench.end_event(failures)
    [drained] = bench.site.drained
    assert drained[0] is waiting
    assert [event.number for _, event in drained if isinstance(event, Own)] == [0, 1, 2, 3, 4]
    assert bench.site.fired == []


def test_what_inline_handlers_fire_is_drained_in_their_order(pool: StrandPool) -> None:
    bench = Bench(pool, A(lambda learner: learner.fire(Own(1))), B(lambda learner: learner.fire(Own(2))))
    _, failures = bench.inline()
    bench.end_event(failures)
    [drained] = bench.site.drained
    assert [event.number for _, event in drained if isinstance(event, Own)] == [1, 2]


def test_where_nothing_failed_and_nothing_was_fired_there_is_nothing_to_do(pool: StrandPool) -> None:
    bench = Bench(pool, A(nothing), B(nothing), site=Raises())
    for _, failures in (bench.inline(), bench.parallel()):
        bench.end_event(failures)
    assert bench.site.failures == []
    assert bench.site.drained == []


def test_failures_are_told_and_what_was_fired_is_drained_where_they_do_not_raise(pool: StrandPool) -> None:
    bench = Bench(pool, A(fail), B(lambda learner: learner.fire(Own(1))))
    _, failures = bench.inline()
    bench.end_event(failures)
    assert failures == [], "the list is emptied"
    assert [(name, str(failure)) for name, failure in bench.site.failures] == [("A", "broken")]
    assert len(bench.site.drained) == 1


def test_a_failure_that_raises_drains_nothing(pool: StrandPool) -> None:
    """Rule 18: what was fired is dropped if the event raises; the loop does that."""
    bench = Bench(pool, A(fail), B(lambda learner: learner.fire(Own(1))), site=Raises())
    _, failures = bench.inline()
    with pytest.raises(ValueError, match="broken"):
        bench.end_event(failures)
    assert failures == []
    assert bench.site.drained == []


@pytest.mark.parametrize("way", ["inline", "parallel"])
def test_no_frame_keeps_a_failure_alive(pool: StrandPool, way: str) -> None:
    """A failure holds the frames that it went through, and those the batch."""

    class Forgets(Raises):
        def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
            raise failures[0][1]

    held: list[weakref.ref[Batch]] = []

    def note(learner: LearnerView) -> None:
        batch = Batch()
        held.append(weakref.ref(batch))
        raise ValueError("broken")

    bench = Bench(pool, A(note), B(nothing), site=Forgets())

    def fire() -> None:
        _, failures = bench.inline() if way == "inline" else bench.parallel()
        bench.end_event(failures)

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            fire()
        assert [each() for each in held] == [None]
    finally:
        gc.enable()


def test_a_handler_waits_if_it_computes_less_than_half_of_its_time(pool: StrandPool) -> None:
    """By the processor time of its thread; after a failure nothing is known, and the last answer holds."""
    bench: Bench

    def act(seconds: float, waits: float, fails: bool = False) -> Callable[[LearnerView], None]:
        def do(learner: LearnerView) -> None:
            bench.now += seconds
            bench.waited += waits
            if fails and bench.now > 110.0:
                raise ValueError

        return do

    bench = Bench(pool, A(act(1.0, 0.9)), B(act(2.0, 0.9)), C(act(3.0, 3.0, fails=True)))
    assert bench.inline() == ([1.0, 2.0, 3.0], [])
    assert bench.timed.waiting == {0, 2}
    bench.inline()
    assert bench.timed.waiting == {0, 2}
