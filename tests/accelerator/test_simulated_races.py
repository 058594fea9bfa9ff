"""The simulated device finds every pair of uses of one memory that nothing orders, and no other."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from tests.accelerator.simulated.backend import Device
from tests.accelerator.simulated.clocks import Race
from tests.accelerator.simulated.machine import SCHEDULES, Machine, Schedule

N = 1000


def on(stream: torch.Stream, function: Callable[[], object]) -> None:
    """Call a function while a stream is the current one."""
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)
    try:
        function()
    finally:
        torch.accelerator.set_stream(before)


@pytest.fixture(params=SCHEDULES, autouse=True)
def schedule(request: pytest.FixtureRequest, machine: Machine) -> Schedule:
    """Each schedule; races are found under all of them."""
    machine.begin(request.param)
    found: Schedule = request.param
    return found


def test_a_read_that_does_not_wait_for_the_write() -> None:
    side, values = torch.Stream(), torch.zeros(N, device="sim")
    with pytest.raises(Race) as raised:
        on(side, lambda: values + 1)
    assert str(raised.value) == (
        f"add on stream {side.stream_id} reads memory that zero_ on stream 0 may still be writing: no event, no stream "
        f"and no wait of the host orders them."
    )


def test_a_write_that_does_not_wait_for_the_read() -> None:
    side, values = torch.Stream(), torch.zeros(N, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    on(side, lambda: values + 1)
    with pytest.raises(Race, match=rf"^mul on stream 0 writes memory that add on stream {side.stream_id} may still"):
        values.mul_(2)


def test_a_write_that_does_not_wait_for_another_one() -> None:
    side, values = torch.Stream(), torch.zeros(N, device="sim")
    with pytest.raises(
        Race, match=rf"^zero_ on stream {side.stream_id} writes memory that zero_ on stream 0 may still"
    ):
        on(side, values.zero_)


def test_an_event_that_is_recorded_again_stands_for_the_later_place() -> None:
    side, values, event = torch.Stream(), torch.zeros(N, device="sim"), torch.Event()
    event.record()
    values.add_(1)
    event.record()
    side.wait_event(event)
    on(side, lambda: values + 1)


def test_order_passes_through_a_third_stream() -> None:
    between, side, values, found = torch.Stream(), torch.Stream(), torch.zeros(N, device="sim"), []
    between.wait_stream(torch.accelerator.current_stream())
    side.wait_stream(between)
    on(side, lambda: found.append(values + 1))
    between.wait_stream(side)
    torch.accelerator.current_stream().wait_stream(between)
    values.mul_(2)
    assert found[0].tolist() == [1] * N


def test_two_reads_need_no_order() -> None:
    side, values = torch.Stream(), torch.zeros(N, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    on(side, lambda: values + 1)
    assert (values + 2).tolist() == [2] * N


def test_a_stream_that_waits_for_an_event() -> None:
    side, values, found = torch.Stream(), torch.zeros(N, device="sim"), []
    event = torch.accelerator.current_stream().record_event()
    side.wait_event(event)
    on(side, lambda: found.append(values + 1))
    torch.accelerator.current_stream().wait_stream(side)
    values.mul_(2)
    assert found[0].tolist() == [1] * N


def test_an_event_covers_what_was_before_it_alone() -> None:
    side, values = torch.Stream(), torch.zeros(N, device="sim")
    event = torch.accelerator.current_stream().record_event()
    values.add_(1)
    side.wait_event(event)
    with pytest.raises(Race, match=r"reads memory that add on stream 0"):
        on(side, lambda: values + 1)


def test_the_host_orders_what_it_has_waited_for() -> None:
    side, values = torch.Stream(), torch.zeros(N, device="sim")
    torch.accelerator.synchronize()
    on(side, lambda: values.add_(1))
    side.synchronize()
    assert values.tolist() == [1] * N


def test_one_thread_does_not_wait_for_another_one() -> None:
    side, values, found = torch.Stream(), torch.zeros(N, device="sim"), []
    other = threading.Thread(target=torch.accelerator.synchronize)
    other.start()
    other.join()
    with pytest.raises(Race):
        on(side, lambda: found.append(values + 1))


def test_memory_that_another_stream_uses_and_nobody_recorded(simulated: Device) -> None:
    side, made = torch.Stream(), []
    on(side, lambda: made.append(torch.ones(N, device="sim")))
    torch.accelerator.current_stream().wait_stream(side)
    total = made.pop().sum()
    with pytest.raises(Race, match=r"^allocate on stream \d+ writes memory that sum on stream 0 may still be reading"):
        on(side, lambda: torch.ones(N, device="sim"))
    assert total.item() == N


def test_memory_that_another_stream_uses_and_that_was_recorded() -> None:
    side, made, again = torch.Stream(), [], []
    on(side, lambda: made.append(torch.ones(N, device="sim")))
    torch.accelerator.current_stream().wait_stream(side)
    made[0].record_stream(torch.accelerator.current_stream())
    total = made.pop().sum()
    for _ in range(3):
        on(side, lambda: again.append(torch.zeros(N, device="sim")))
    assert total.item() == N


def test_a_third_stream_must_be_recorded_too() -> None:
    side, third, main, made = torch.Stream(), torch.Stream(), torch.accelerator.current_stream(), []
    on(side, lambda: made.append(torch.ones(N, device="sim")))
    main.wait_stream(side)
    third.wait_stream(side)
    on(third, lambda: made[0] + 1)
    made[0].record_stream(main)
    made.clear()

    def twice() -> None:
        """Ask for memory again: it comes back once the main stream is past it."""
        for _ in range(2):
            on(side, lambda: made.append(torch.ones(N, device="sim")))
            main.synchronize()

    with pytest.raises(Race, match=rf"writes memory that add on stream {third.stream_id} may still be reading"):
        twice()


def test_pinned_memory_is_ordered_between_copies() -> None:
    side, host = torch.Stream(), torch.empty(N, pin_memory=True)
    host.copy_(torch.ones(N, device="sim"), non_blocking=True)
    values = torch.zeros(N, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    on(side, lambda: values.copy_(host, non_blocking=True))
    with pytest.raises(Race, match=r"^copy to the host on stream 0 writes memory that copy to the device on stream"):
        host.copy_(torch.ones(N, device="sim"), non_blocking=True)
