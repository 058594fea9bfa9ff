"""The gate that makes a lane stand still (rule 30)."""

from __future__ import annotations

import threading

from flowtrain_dask.lanes.gate import Gate
from tests.support.interrupts import interrupted


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


def test_two_can_hold_it_and_the_lane_goes_on_when_both_have_released_it() -> None:
    gate = Gate()
    order: list[str] = []
    held, leave = threading.Event(), threading.Event()

    def second() -> None:
        assert gate.hold(20)
        held.set()
        assert leave.wait(20)
        order.append("second")
        gate.release()

    def lane() -> None:
        with gate:
            order.append("lane")

    assert gate.hold(1)
    holder, entering = threading.Thread(target=second), threading.Thread(target=lane)
    holder.start()
    assert held.wait(20)
    entering.start()
    gate.release()
    entering.join(0.05)
    assert order == []
    leave.set()
    holder.join(20)
    entering.join(20)
    assert order == ["second", "lane"]


def test_an_interrupt_of_who_holds_it_keeps_nobody_out() -> None:
    """A fork goes on after Ctrl-C in the function that is called before it, and releases the gate in the end."""
    gate = Gate()
    for raised in interrupted(lambda: gate.hold(1), "lanes/gate.py"):
        assert raised
        gate.release()
        with gate:
            assert not gate.hold(1), "the lane is inside"
