"""The simulated machine: in which order work runs, and what the host waits for."""

from __future__ import annotations

import pytest
import torch

from flowtrain.diagnostics.sync_audit import watching
from tests.accelerator.simulated.machine import SCHEDULES, DeviceFailure, Machine, Schedule, Work


def submit(machine: Machine, done: list[str], name: str, stream: int = 0, after: Work | None = None) -> Work:
    """Submit work that writes its name down."""
    return machine.submit(name, lambda: done.append(name), stream=stream, after=after)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("eager", ["a", "b"]), ("lazy", []), ("side first", ["b"]), ("main first", ["a"])]
)
def test_what_runs_before_anybody_waits(machine: Machine, schedule: Schedule, expected: list[str]) -> None:
    machine.begin(schedule)
    done: list[str] = []
    submit(machine, done, "a")
    submit(machine, done, "b", stream=1)
    assert done == expected


def test_a_seed_runs_some_of_it_and_the_same_again(machine: Machine) -> None:
    orders: list[list[str]] = []
    for _ in range(2):
        machine.begin(5)
        done: list[str] = []
        for number in range(20):
            submit(machine, done, f"{number}", stream=number % 3)
        orders.append(list(done))
    assert orders[0] == orders[1]
    assert 0 < len(orders[0]) <= 20
    assert orders[0] != sorted(orders[0], key=int), "streams overtake each other"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_streams_keep_their_order_and_wait_for_events(machine: Machine, schedule: Schedule) -> None:
    machine.begin(schedule)
    done: list[str] = []
    submit(machine, done, "first")
    mark = machine.submit("mark", stream=0)
    submit(machine, done, "second", stream=1, after=mark)
    last = submit(machine, done, "third", stream=1)
    machine.wait(last, "event")
    assert done == ["first", "second", "third"]


def test_a_wait_does_what_it_needs_and_no_more(machine: Machine) -> None:
    machine.begin("lazy")
    done: list[str] = []
    first = submit(machine, done, "first")
    submit(machine, done, "later")
    submit(machine, done, "other", stream=2)
    needed = submit(machine, done, "needed", stream=1, after=first)
    machine.wait(needed, "event")
    assert done == ["first", "needed"]
    machine.forget_counts()
    machine.wait_for_all()
    assert sorted(done) == ["first", "later", "needed", "other"]
    assert machine.waits == {"device": 1}, "the host waits once for all streams"


def test_waits_are_counted_and_the_slack_of_events(machine: Machine) -> None:
    machine.begin("lazy")
    done: list[str] = []
    first = submit(machine, done, "a")
    event = machine.submit("mark")
    submit(machine, done, "b")
    machine.submit("mark")
    last = submit(machine, done, "c")
    submit(machine, done, "other", stream=1)
    for work in (first, event, last, machine.submit("mark")):
        machine.wait(work, "event")
    machine.wait(first, "item")
    assert machine.waits == {"event": 4, "item": 1}
    assert machine.slack == [2, 2, 0, 0], "marks, and what other streams have to do, do not count"
    assert machine.ran == {(0, "a"): 1, (0, "b"): 1, (0, "c"): 1, (0, "mark"): 3, (1, "other"): 1}


def test_work_runs_without_the_modes_of_the_caller(machine: Machine) -> None:
    seen: list[bool] = []
    with torch.inference_mode():
        machine.submit("look", lambda: seen.append(torch.is_inference_mode_enabled()))
    machine.submit("look", lambda: seen.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), watching(lambda sync: pytest.fail(str(sync))):
        machine.submit("look", lambda: seen.append(torch.ones(2, 2).mm(torch.ones(2, 2)).sum().item() != 8))
    assert seen == [False, False, False]


def test_a_failure_comes_up_later_and_stays(machine: Machine) -> None:
    machine.begin("lazy")
    machine.fail_after(1)
    first = machine.submit("first", lambda: None)
    second = machine.submit("second", lambda: None)
    machine.wait(first, "event")
    with pytest.raises(DeviceFailure, match=r"The device has failed: the device was told to fail at second"):
        machine.wait(second, "event")
    with pytest.raises(DeviceFailure):
        machine.submit("third")
    machine.begin("eager")
    machine.submit("fourth")
