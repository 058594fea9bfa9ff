"""Lanes in this process: handlers run on the thread that calls, on the live callbacks, and stop when told (rule 23)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flowtrain.logging.records import Identity
from flowtrain_dask.lanes import transport as threads
from flowtrain_dask.lanes.gate import Gate
from flowtrain_dask.lanes.transport import SLOW, ThreadTransport, Transport
from tests.support.lanes import job_of
from tests.support.transports import Adder, MakeTransport, StoppedBy, TransportContract, entries_of


class Rig:
    """A transport with one callback."""

    def __init__(self, **changes: Any) -> None:
        self.callback = Adder()
        self.job = job_of(self.callback, **changes)
        self.transport = ThreadTransport(self.job, [self.callback])
        self.context = StoppedBy()

    def run(self, *numbers: int, first: int = 0, stopped: Callable[[], bool] = lambda: False) -> Any:
        self.context.stopped = stopped
        return self.transport.run_batch(entries_of(*numbers, first=first), self.context)


class TestContract(TransportContract):
    @pytest.fixture
    def make(self) -> MakeTransport:
        return ThreadTransport


def test_it_is_a_transport_whose_place_is_a_thread() -> None:
    transport: Transport = Rig().transport
    assert (transport.where, transport.is_remote) == ("thread", False)


def test_handlers_run_on_the_thread_that_calls_and_on_the_callback_itself() -> None:
    rig = Rig(first=10)
    rig.transport.open(1.0)
    thread = threading.Thread(target=lambda: rig.run(1, 2))
    thread.start()
    number = thread.ident
    thread.join(20)
    assert rig.callback.total == 3
    assert rig.callback.seen == [
        (number, Identity("run", "Adder", 10), False),
        (number, Identity("run", "Adder", 11), False),
    ]


def test_a_lane_that_is_closed_has_the_event_at_work_and_no_more() -> None:
    rig = Rig()
    result = rig.run(1, 2, 3, 4, stopped=lambda: rig.callback.total >= 3)
    assert (result.done, rig.callback.total) == (2, 3)
    assert rig.run(5, 6, first=2, stopped=lambda: True).done == 1


def test_records_do_not_wait_for_all_of_a_long_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is over, what is done is handed back; what is left comes again."""
    monkeypatch.setattr(threads, "_SECONDS", -1.0)
    rig = Rig()
    assert [rig.run(*range(first, 4), first=first).done for first in range(4)] == [1] * 4
    assert rig.callback.total == 0 + 1 + 2 + 3
    monkeypatch.setattr(threads, "_SECONDS", 1e6)
    assert rig.run(1, 2, 3, first=4).done == 3


def test_the_gate_is_entered_around_each_event() -> None:
    """Between two of them the lane can be made to stand still."""
    rig = Rig()
    told: list[str] = []

    class Noted(Gate):
        def __enter__(self) -> None:
            super().__enter__()
            told.append(f"in at {rig.callback.total}")

        def __exit__(self, *exc: object) -> None:
            told.append(f"out at {rig.callback.total}")
            super().__exit__(*exc)

    rig.context.gate = Noted()
    rig.run(1, 2)
    assert told == ["in at 0", "out at 1", "in at 1", "out at 3"]


def test_a_lane_that_is_held_does_not_begin() -> None:
    rig = Rig()
    assert rig.context.gate.hold(1.0)
    thread = threading.Thread(target=lambda: rig.run(1), daemon=True)
    thread.start()
    thread.join(0.05)
    assert rig.callback.total == 0
    rig.context.gate.release()
    thread.join(20)
    assert rig.callback.total == 1


def test_events_that_take_long_and_the_first_one_do_not_gather() -> None:
    """They are processed as they come, so that a short fit does not wait for them at its end; until they are quick."""

    def slowly() -> bool:
        time.sleep(2 * SLOW)
        return False

    rig = Rig()
    assert rig.transport.linger == 0.0
    rig.run(1, 2, stopped=slowly)
    assert rig.transport.linger == 0.0
    rig.run(*range(1000), first=2)
    assert rig.transport.linger == 0.05
