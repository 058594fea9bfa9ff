"""One firing on several strands, with real threads: rules 13 to 15, interrupts, and whose threads they are."""

from __future__ import annotations

import contextvars
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowtrain import BatchEnd, Callback, ExecutorError, LearnerView, TrainingPhase
from flowtrain.graph.plan import Plan
from flowtrain_dask.parallel.firing import POOL_CLOSED, Firing, StrandPool
from flowtrain_dask.parallel.strands import Strands, needs_training_thread, pack
from flowtrain_dask.parallel.task_graph import direct_predecessors
from tests.support.handlers import TIMEOUT, A, B, C, Does, nothing, own_threads, plan_of
from tests.support.interrupts import interrupted
from tests.support.waiting import wait_for


def strands_of(plan: Plan, workers: int = 2) -> Strands:
    return pack(direct_predecessors(plan), [1.0] * len(plan), workers, needs_training_thread(plan))


def runner_of(pool: StrandPool, *callbacks: Callback) -> Callable[[], list[tuple[str, Exception]]]:
    """Return what fires the event, and returns the failures with the names of their callbacks."""
    plan = plan_of(*callbacks)
    strands = strands_of(plan, pool.workers)

    def run() -> list[tuple[str, Exception]]:
        failures = pool.fire(plan, strands, BatchEnd(), TrainingPhase())
        return [(planned.node.name, failure) for planned, failure in failures]

    return run


# --- at the same time, and never before what they wait for


def test_independent_handlers_run_at_the_same_time(pool: StrandPool) -> None:
    """Each waits for the other, so nothing but running both at once gets through."""
    meet = threading.Barrier(2, timeout=TIMEOUT)
    run = runner_of(pool, A(lambda _: meet.wait()), B(lambda _: meet.wait()))
    assert run() == []
    assert run() == []


def test_a_handler_waits_for_a_predecessor_on_another_strand(pool: StrandPool) -> None:
    """Rule 13: C runs after A and B, which are on two strands and end in either order."""
    for slow in (0, 1):
        ended: list[str] = []
        gate = threading.Event()

        def last(learner: LearnerView, ended: list[str] = ended, gate: threading.Event = gate) -> None:
            assert gate.wait(TIMEOUT)
            ended.append("slow")

        def first(learner: LearnerView, ended: list[str] = ended, gate: threading.Event = gate) -> None:
            ended.append("fast")
            gate.set()

        acts = [last, first] if slow == 0 else [first, last]
        callbacks = [A(acts[0]), B(acts[1]), C(lambda _, ended=ended: ended.append("C"), (A, B))]  # type: ignore[misc]  # a default
        assert runner_of(pool, *callbacks)() == []
        assert ended == ["fast", "slow", "C"]


def test_the_first_strand_is_the_training_threads(pool: StrandPool) -> None:
    threads: dict[str, int] = {}
    meet = threading.Barrier(2, timeout=TIMEOUT)

    def note(name: str) -> Callable[[LearnerView], None]:
        def act(learner: LearnerView) -> None:
            threads[name] = threading.get_ident()
            meet.wait()

        return act

    plan = plan_of(A(note("A")), B(note("B")))
    for first, home in ((0, "A"), (1, "B")):
        strands = Strands(((first,), (1 - first,)), (0, 0), 0, 2.0, 1.0)
        assert pool.fire(plan, strands, BatchEnd(), TrainingPhase()) == []
        assert [name for name, thread in threads.items() if thread == threading.get_ident()] == [home]


def test_the_training_thread_may_have_no_handler(pool: StrandPool) -> None:
    """All it does then is to wait."""
    threads: list[int] = []
    plan = plan_of(A(lambda _: threads.append(threading.get_ident())))
    assert pool.fire(plan, Strands(((), (0,)), (0,), 0, 1.0, 1.0), BatchEnd(), TrainingPhase()) == []
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_more_strands_than_two_all_run_at_the_same_time() -> None:
    meet = threading.Barrier(4, timeout=TIMEOUT)
    pool = StrandPool(4)
    callbacks = [Does(lambda _: meet.wait()) for _ in range(4)]
    assert runner_of(pool, *callbacks)() == []
    pool.close()


# --- failures, rule 15


def test_when_the_event_has_failed_no_handler_is_running(pool: StrandPool) -> None:
    """A raises at once; B, on the other thread, ends long after that, and still before the failure is reported."""
    raised, ended = threading.Event(), threading.Event()

    def fail(learner: LearnerView) -> None:
        raised.set()
        raise ValueError("A is broken")

    def slow(learner: LearnerView) -> None:
        assert raised.wait(TIMEOUT)
        opened = threading.Event()
        timer = threading.Timer(0.05, opened.set)
        timer.start()
        assert opened.wait(TIMEOUT)
        timer.join(TIMEOUT)
        ended.set()

    failures = runner_of(pool, A(fail), B(slow))()
    assert ended.is_set()
    assert [(name, str(error)) for name, error in failures] == [("A", "A is broken")]


def test_failures_come_in_serial_order_whoever_fails_first(pool: StrandPool) -> None:
    second = threading.Event()

    def early(learner: LearnerView) -> None:
        assert second.wait(TIMEOUT)
        raise ValueError("first in order, last in time")

    def late(learner: LearnerView) -> None:
        second.set()
        raise KeyError("last in order, first in time")

    failures = runner_of(pool, A(early), B(late), C(nothing, (B,)))()
    assert [name for name, _ in failures] == ["A", "B"]
    assert [type(error) for _, error in failures] == [ValueError, KeyError]


def test_exactly_what_depends_on_a_failure_is_skipped_on_any_strand(pool: StrandPool) -> None:
    """C depends on D, which is skipped because of A, and on B; what depends on B alone runs."""
    ran: list[str] = []
    lock = threading.Lock()

    class D(Does): ...

    class E(Does): ...

    def note(name: str) -> Callable[[LearnerView], None]:
        def act(learner: LearnerView) -> None:
            with lock:
                ran.append(name)

        return act

    def fail(learner: LearnerView) -> None:
        raise ValueError("A is broken")

    run = runner_of(pool, A(fail), B(note("B")), D(note("D"), (A,)), C(note("C"), (B, D)), E(note("E"), (B,)))
    for _ in range(20):
        assert [name for name, _ in run()] == ["A"]
        assert sorted(ran) == ["B", "E"]
        ran.clear()


class Batch:
    """What a handler holds when it fails."""


def test_a_firing_that_has_failed_keeps_nothing_alive(pool: StrandPool) -> None:
    """A failure holds the frames that it went through, and their callers; who got the list empties it."""
    held: list[weakref.ref[Batch]] = []

    def fail(learner: LearnerView) -> None:
        batch = Batch()
        held.append(weakref.ref(batch))
        raise ValueError

    plan = plan_of(A(fail), B(fail))
    gc.disable()
    try:
        failures = pool.fire(plan, strands_of(plan), BatchEnd(), TrainingPhase())
        assert None not in [each() for each in held]
        failures.clear()
        runner_of(pool, A(nothing), B(nothing))()  # a thread of the pool may hold its last task for another moment
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


# --- one firing by itself


def test_a_firing_runs_what_it_is_told_and_returns_failures_in_serial_order() -> None:
    def fail(learner: LearnerView) -> None:
        raise ValueError

    ran: list[str] = []
    plan = plan_of(A(fail), B(fail), C(lambda _: ran.append("C"), (A,)))
    firing = Firing(plan, Strands(((0, 1, 2),), (0, 0, 0), 0, 3.0, 3.0), BatchEnd(), TrainingPhase())
    for position in (1, 0, 2):
        firing.run(position)
    assert [position for position, _ in firing.failures] == [1, 0]
    assert [planned.node.name for planned, _ in firing.finish()] == ["A", "B"]
    assert ran == []
    assert firing.failures == []


def test_a_firing_that_is_stopped_starts_no_handler() -> None:
    ran: list[str] = []
    strands = Strands(((), (0,)), (0,), 0, 1.0, 1.0)
    firing = Firing(plan_of(A(lambda _: ran.append("A"))), strands, BatchEnd(), TrainingPhase())
    firing.stop()
    firing.help(1)
    firing.join_running()
    firing.join()
    assert ran == []
    assert firing.finish() == []


def test_a_strand_that_waits_leaves_when_the_firing_is_stopped() -> None:
    ran: list[str] = []
    strands = Strands(((0,), (1,)), (0, 1), 1, 2.0, 2.0)
    firing = Firing(plan_of(A(nothing), B(lambda _: ran.append("B"))), strands, BatchEnd(), TrainingPhase())
    strand = threading.Thread(target=firing.help, args=(1,), daemon=True)
    strand.start()
    firing.stop()
    strand.join(TIMEOUT)
    assert not strand.is_alive()
    firing.join()
    assert ran == []


# --- interrupts


def test_an_interrupt_of_the_training_thread_waits_for_the_others(pool: StrandPool) -> None:
    """Ctrl-C while the training thread waits for a handler: it goes on when that has ended, and C never starts."""
    ended, ran = threading.Event(), list[str]()

    def interrupts(learner: LearnerView) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        signal.raise_signal(signal.SIGINT)
        timer = threading.Timer(0.05, ended.set)
        timer.start()
        timer.join(TIMEOUT)

    run = runner_of(pool, A(interrupts), B(interrupts), C(lambda _: ran.append("C"), (A, B)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert ended.is_set()
        assert ran == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_an_interrupt_no_handler_starts_on_any_strand(pool: StrandPool) -> None:
    main = threading.main_thread().ident
    assert main is not None
    ran: list[str] = []

    def interrupts(learner: LearnerView) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        wait_for(lambda: vars(pool)["_firing"].stopped)  # until the training thread has seen it, and waits
        ran.append("B")

    plan = plan_of(A(nothing), B(interrupts), C(lambda _: ran.append("C")))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.fire(plan, Strands(((0,), (1, 2)), (0, 0, 0), 0, 3.0, 2.0), BatchEnd(), TrainingPhase())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran == ["B"]


def test_a_second_interrupt_leaves_at_once_and_the_next_firing_waits_for_what_was_left(pool: StrandPool) -> None:
    main = threading.main_thread().ident
    assert main is not None
    opened, order = threading.Event(), list[str]()

    def interrupts(learner: LearnerView) -> None:
        if threading.get_ident() == main:
            return
        signal.pthread_kill(main, signal.SIGINT)
        wait_for(lambda: vars(pool)["_firing"].stopped)  # until the training thread has seen it, and waits
        signal.pthread_kill(main, signal.SIGINT)
        assert opened.wait(TIMEOUT)
        order.append("left behind")

    run = runner_of(pool, A(interrupts), B(interrupts))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert order == []
    timer = threading.Timer(0.05, opened.set)
    timer.start()
    assert runner_of(pool, A(lambda _: order.append("next")), B(nothing))() == []
    timer.join(TIMEOUT)
    assert order == ["left behind", "next"]


def test_no_interrupt_anywhere_in_a_firing_leaves_it_hanging() -> None:
    """Ctrl-C before each instruction: it is raised, no handler runs any more, and the next firing and `close` end."""
    running = set[str]()

    def act(name: str) -> Callable[[LearnerView], None]:
        def run(learner: LearnerView) -> None:
            try:
                running.add(name)
                time.sleep(0.0002)  # so that the strands wait for each other
            finally:
                running.discard(name)

        return run

    plan = plan_of(A(act("A")), B(act("B")), C(act("C"), (A, B)))
    strands = Strands(((0, 2), (1,)), (0, 0, 0b010), 0b010, 3.0, 2.0)
    pools: list[StrandPool] = []

    def fire() -> None:
        pools.append(StrandPool(2))  # one whose thread is started here
        assert pools[-1].fire(plan, strands, BatchEnd(), TrainingPhase()) == []
        pools[-1].close()

    points = 0
    for raised in interrupted(fire, "parallel/firing.py", "parallel/threads.py", "threading.py", "contextlib.py"):
        points += 1
        assert raised
        assert not running
        for pool in pools:
            assert not pool.busy
            if not pool.closed:
                assert pool.fire(plan, strands, BatchEnd(), TrainingPhase()) == []
            pool.close()
        pools.clear()
    assert points > 300
    assert own_threads() == []


@pytest.mark.parametrize("where", ["training thread", "pool"])
def test_an_exit_raised_by_a_handler_goes_on_when_nothing_runs(pool: StrandPool, where: str) -> None:
    here = threading.get_ident()
    meet, running = threading.Barrier(2, timeout=TIMEOUT), set[int]()

    def leave(learner: LearnerView) -> None:
        running.add(threading.get_ident())
        meet.wait()
        try:
            if (threading.get_ident() == here) == (where == "training thread"):
                raise SystemExit(3)
        finally:
            running.discard(threading.get_ident())

    run = runner_of(pool, A(leave), B(leave), C(nothing, (A, B)))
    with pytest.raises(SystemExit, match="3"):
        run()
    assert not running
    assert not pool.busy
    assert runner_of(pool, A(nothing), B(nothing))() == []


# --- what a handler sees, rule 14


def test_handlers_see_the_callers_torch_state_and_context(pool: StrandPool) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")
    seen: dict[int, tuple[Any, ...]] = {}
    meet = threading.Barrier(2, timeout=TIMEOUT)

    def look(learner: LearnerView) -> None:
        meet.wait()
        autocast = torch.is_autocast_enabled("cpu")
        seen[threading.get_ident()] = (variable.get(), torch.is_grad_enabled(), autocast, torch.get_num_threads())

    run = runner_of(pool, A(look), B(look))
    for value in ("one", "two"):  # threads that are warm see what has changed since
        token = variable.set(value)
        with torch.no_grad(), torch.autocast("cpu"):
            assert run() == []
        variable.reset(token)
        assert len(seen) == 2
        assert set(seen.values()) == {(value, False, True, torch.get_num_threads())}


def test_what_a_handler_on_another_thread_sets_stays_there(pool: StrandPool) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")
    meet = threading.Barrier(2, timeout=TIMEOUT)
    here = threading.get_ident()

    def change(learner: LearnerView) -> None:
        meet.wait()
        if threading.get_ident() != here:
            variable.set("changed")
            torch.set_grad_enabled(False)

    seen: list[tuple[str, bool]] = []
    assert runner_of(pool, A(change), B(change))() == []
    assert (variable.get(), torch.is_grad_enabled()) == ("default", True)

    def look(learner: LearnerView) -> None:
        meet.wait()
        seen.append((variable.get(), torch.is_grad_enabled()))

    assert runner_of(pool, A(look), B(look))() == []
    assert seen == [("default", True)] * 2


# --- threads


def test_threads_start_with_the_first_firing_and_end_with_close() -> None:
    pool, meet = StrandPool(3), threading.Barrier(3, timeout=TIMEOUT)
    assert own_threads() == []
    run = runner_of(pool, *(Does(lambda _: meet.wait()) for _ in range(3)))
    assert own_threads() == []
    run()
    threads = own_threads()
    run()
    assert own_threads() == threads
    assert len(threads) == 2, "and the training thread is the third"
    pool.close()
    assert not any(thread.is_alive() for thread in threads)
    pool.close()  # once more does nothing


def test_a_pool_that_nobody_holds_leaves_no_thread() -> None:
    pool = StrandPool(2)
    runner_of(pool, A(nothing), B(nothing))()
    threads = own_threads()
    assert len(threads) == 1
    del pool
    gc.collect()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)


def test_a_closed_pool_runs_nothing() -> None:
    pool, ran = StrandPool(2), list[str]()
    run = runner_of(pool, A(lambda _: ran.append("A")), B(nothing))
    assert not pool.closed
    pool.close()
    assert pool.closed
    with pytest.raises(ExecutorError) as caught:
        run()
    assert str(caught.value) == POOL_CLOSED
    assert ran == []
    assert own_threads() == []


def test_close_in_a_handler_is_an_error_and_closes_nothing(pool: StrandPool) -> None:
    busy: list[bool] = []

    def close(learner: LearnerView) -> None:
        busy.append(pool.busy)
        pool.close()

    [(_, error)] = runner_of(pool, A(close), B(nothing))()
    assert type(error) is ExecutorError
    assert str(error) == "close() was called in a handler, whose own thread it would end. Call it after fit()."
    assert busy == [True]
    assert not pool.closed
    assert not pool.busy
