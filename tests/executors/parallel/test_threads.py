"""Wakes and the start of threads, which an interrupt before any instruction leaves usable."""

from __future__ import annotations

import threading

import pytest

from flowtrain_dask.parallel.threads import Wake, start
from tests.support.handlers import TIMEOUT
from tests.support.interrupts import interrupted
from tests.support.waiting import wait_for


def waits(wake: Wake) -> bool:
    """Tell whether a wait for the wake blocks; a wait that blocks is ended."""
    thread = threading.Thread(target=wake.wait, daemon=True)
    thread.start()
    thread.join(0.05)
    blocked = thread.is_alive()
    if blocked:
        wake.set()
        thread.join(TIMEOUT)
    assert not thread.is_alive()
    return blocked


def test_a_wake_ends_one_wait_also_one_that_comes_later() -> None:
    wake = Wake()
    assert waits(wake)
    wake.set()
    wake.set()  # two count as one
    assert not waits(wake)
    assert waits(wake)


def test_a_wake_that_is_forgotten_ends_no_wait() -> None:
    wake = Wake()
    wake.clear()
    assert waits(wake)
    wake.set()
    wake.clear()
    assert waits(wake)


def test_a_wait_has_a_limit() -> None:
    wake = Wake()
    wake.wait(0.001)  # ends without a wake
    wake.set()
    wake.wait(TIMEOUT)
    assert waits(wake)


def test_two_threads_may_wake_at_the_same_moment() -> None:
    wake, meet = Wake(), threading.Barrier(2, timeout=TIMEOUT)
    failures: list[BaseException] = []

    def set_often() -> None:
        try:
            meet.wait()
            for _ in range(1000):
                wake.set()
                wake.clear()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=set_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert failures == []
    wake.clear()
    assert waits(wake)


def test_a_thread_is_a_daemon_with_a_name() -> None:
    began, go = threading.Event(), threading.Event()

    def run() -> None:
        began.set()
        go.wait(TIMEOUT)

    thread = start(run, "flowtrain test")
    assert began.wait(TIMEOUT)
    assert thread.daemon
    assert thread.name == "flowtrain test"
    assert thread in threading.enumerate()
    go.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_no_interrupt_leaves_a_wake_that_nobody_can_use() -> None:
    wake = Wake()

    def use() -> None:
        wake.set()
        wake.wait()
        wake.set()
        wake.clear()

    for raised in interrupted(use, "parallel/threads.py"):
        assert raised
        wake.set()
        wake.wait(TIMEOUT)
        wake.clear()
    assert waits(wake)


@pytest.mark.filterwarnings("error")
def test_no_interrupt_leaves_a_lock_that_the_next_thread_waits_for() -> None:
    runs: list[threading.Event] = []

    def begin() -> None:
        ran = threading.Event()
        start(ran.set, "flowtrain test")
        runs.append(ran)

    for raised in interrupted(begin, "parallel/threads.py", "threading.py"):
        assert raised
        for ran in runs:
            assert ran.wait(TIMEOUT)  # what `start` returned from does run
        runs.clear()
        other = threading.Thread(target=int)
        other.start()
        other.join(TIMEOUT)
        assert not other.is_alive()
    wait_for(lambda: not any(thread.name == "flowtrain test" for thread in threading.enumerate() if thread.is_alive()))
