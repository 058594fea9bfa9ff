"""The gate that makes a lane stand still, also for a fork beside it, as a data loader does (rule 30)."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from flowtrain import BatchEnd, Callback, LearnerView, TrainingPhase, on
from flowtrain.callback.access import declare
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import Run, Value
from flowtrain.logging.records import log
from flowtrain.state.partial_view import Owner
from flowtrain_dask.lanes.gate import Gate
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.threads import LaneThreads
from flowtrain_dask.lanes.transport import ThreadTransport
from flowtrain_dask.lanes.work import Job, LaneHandler
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


def test_who_holds_a_gate_goes_first() -> None:
    gate = Gate()
    inside = 0
    end = threading.Event()

    def work() -> None:
        nonlocal inside
        while not end.is_set():
            with gate:
                inside += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            assert gate.hold(10)
            before = inside
            time.sleep(0.002)
            assert inside == before
            gate.release()
    finally:
        end.set()
        thread.join()


def test_a_gate_that_does_not_come_free_is_given_up() -> None:
    gate = Gate()
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gate:
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(20)
    assert not gate.hold(0.02)
    leave.set()
    thread.join()
    with gate:
        assert not gate.hold(10)  # by the thread that is inside: it would wait for itself
    assert gate.hold(1)
    gate.release()


# --- forks beside a running lane


class Locking(Callback):
    """Holds a lock nearly all the time while its handler runs."""

    name = "Locking"

    def __init__(self, backend: JsonlBackend) -> None:
        self.backends = (backend,)
        self.lock = threading.Lock()
        self.count = 0

    @on(BatchEnd, TrainingPhase)
    def hold(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Hold the lock for a moment."""
        with self.lock:
            time.sleep(0.0005)
            log(self.backends, Value(self.count), "Count", self.count, ("Step",))
            self.count += 1


def test_children_find_no_lock_taken_and_write_nothing(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log.jsonl")
    backend.open(Run("run"))
    callback = Locking(backend)
    [(_, handler)] = callback.handlers()
    nothing = declare({}, "test")
    lane_handler = LaneHandler(0, "Locking", handler, nothing, Owner("Locking", "Locking", "state_access", nothing))
    job = Job("Locking", "run", ("Locking",), (callback.backends,), (lane_handler,))
    transport, threads = ThreadTransport(job, [callback], 0.001), LaneThreads()
    lane = Lane(job, transport, Limits(), threads, raise_on_training_thread=print)
    event, phase = BatchEnd(), TrainingPhase()
    for _ in range(60):
        for _ in range(5):
            lane.put(0, event, phase, {}, 0)
        child = os.fork()
        if child == 0:
            free = callback.lock.acquire(timeout=2)
            alone = not lane.put(0, event, phase, {}, 0) and lane.flush(1)
            os._exit(0 if free and alone and vars(backend)["_file"] is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lane.flush(30)
    lane.close()
    threads.close()
    backend.close()
    assert callback.count == 300
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 300
