"""The gate that makes a lane stand still (rule 30)."""

from __future__ import annotations

import threading
import time

from flowtrain_dask.lanes.gate import Gate


def test_who_is_inside_cannot_hold_it() -> None:
    """A handler that forks would wait for itself; it is told at once, and others are not shut out by it."""
    gate = Gate()
    with gate:
        assert not gate.hold(20)
    assert gate.hold(1)
    gate.release()
    with gate:
        pass


def test_the_lane_waits_outside_while_it_is_held() -> None:
    gate = Gate()
    entered = threading.Event()

    def lane() -> None:
        with gate:
            entered.set()

    assert gate.hold(1)
    thread = threading.Thread(target=lane)
    thread.start()
    assert not entered.wait(0.05)
    gate.release()
    assert entered.wait(20)
    thread.join(20)


def test_an_exception_inside_leaves_it_open() -> None:
    gate = Gate()
    try:
        with gate:
            raise ValueError("in a handler")
    except ValueError:
        pass
    assert gate.hold(1)
    gate.release()


def test_two_can_hold_it_one_after_the_other_before_the_lane_goes_on() -> None:
    gate = Gate()
    order: list[str] = []

    def second() -> None:
        assert gate.hold(20)
        order.append("second")
        gate.release()

    def lane() -> None:
        with gate:
            order.append("lane")

    assert gate.hold(1)
    holder = threading.Thread(target=second)
    holder.start()
    while gate._wanted < 2:  # pyright: ignore[reportPrivateUsage]  # until it waits
        time.sleep(0.001)
    entering = threading.Thread(target=lane)
    entering.start()
    gate.release()
    holder.join(20)
    entering.join(20)
    assert order == ["second", "lane"]
