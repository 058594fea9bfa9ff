"""The memory of the simulated device: given out again by stream, full of NaN, and pinned memory of the host."""

from __future__ import annotations

import pytest
import torch

from tests.accelerator.simulated.backend import Device
from tests.accelerator.simulated.machine import SCHEDULES, DeviceFailure, Machine, Schedule


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(3, device="sim").isnan().all().item()
    assert torch.empty(3, dtype=torch.int64, device="sim").tolist() == [-1] * 3
    assert torch.empty(2, dtype=torch.bool, device="sim").tolist() == [True, True]


def test_a_default_device_holds_for_functions_that_make_tensors() -> None:
    with torch.device("sim"):
        assert torch.empty(3).device.type == torch.empty_strided((3,), (1,)).device.type == torch.ones(3).device.type
        assert torch.empty(3).device.type == "sim"


def test_memory_is_given_out_again_to_the_stream_that_it_came_from() -> None:
    kept = torch.zeros(500, device="sim")
    first = torch.zeros(500, device="sim")
    place = address(first)
    del first
    side = torch.Stream()
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(side)
    other = torch.zeros(500, device="sim")
    torch.accelerator.set_stream(before)
    again = torch.zeros(500, device="sim")
    assert address(again) == place
    assert len({address(kept), address(other), place}) == 3


def test_a_view_keeps_the_memory() -> None:
    whole = torch.zeros(500, device="sim")
    place, part = address(whole), whole[100:200]
    del whole
    assert address(part) == place
    assert address(torch.zeros(500, device="sim")) != place


def test_the_bytes_in_use_and_a_limit(simulated: Device) -> None:
    before = simulated.memory.nbytes
    held = torch.zeros(1000, device="sim")
    assert simulated.memory.nbytes == before + 4032  # in pieces of 64 bytes
    simulated.memory.limit = before + 5000
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 4032 bytes. It has \d+ bytes, of which"):
        torch.zeros(1000, device="sim")
    del held
    torch.zeros(1000, device="sim")


def test_memory_comes_back_after_a_failure(simulated: Device, machine: Machine) -> None:
    before, side = simulated.memory.nbytes, torch.Stream()
    held = [torch.zeros(500, device="sim"), torch.zeros(500, device="sim")]
    held[0].record_stream(side)
    held[1].record_stream(side)
    machine.fail_after(0)
    with pytest.raises(DeviceFailure):
        held[0].add_(1)[0].item()
    held.clear()
    with pytest.raises(DeviceFailure):
        torch.zeros(500, device="sim")
    machine.begin("eager")
    assert simulated.memory.nbytes == before


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pinned_memory_waits_for_the_copies_from_it(machine: Machine, schedule: Schedule) -> None:
    machine.begin(schedule)
    arrived = []
    for number in range(5):
        host = torch.full((500,), float(number)).pin_memory()
        assert host.is_pinned()
        arrived.append(host.to("sim", non_blocking=True))
    assert machine.waits == {}
    assert [each.sum().item() for each in arrived] == [500.0 * number for number in range(5)]


def test_pinned_memory_that_the_host_changes_too_early(machine: Machine) -> None:
    machine.begin("lazy")
    host = torch.zeros(3).pin_memory()
    there = host.to("sim", non_blocking=True)
    host.fill_(7)
    assert there.tolist() == [7, 7, 7]


def test_a_copy_to_the_host_that_is_read_too_early(machine: Machine) -> None:
    machine.begin("lazy")
    host = torch.empty(3, pin_memory=True)
    host.copy_(torch.ones(3, device="sim"), non_blocking=True)
    event = torch.accelerator.current_stream().record_event()
    assert host.isnan().all()
    event.synchronize()
    assert host.tolist() == [1, 1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_which_copies_make_the_host_wait(machine: Machine, schedule: Schedule) -> None:
    machine.begin(schedule)
    there = torch.ones(3, device="sim")
    pinned = torch.zeros(3).pin_memory()
    there.copy_(pinned, non_blocking=True)
    pinned.copy_(there, non_blocking=True)
    there.to("cpu", non_blocking=True)
    there.mul_(2.0)
    assert machine.waits == {}
    there.copy_(pinned)
    there.cpu()
    assert machine.waits == {"copy": 2}
    torch.zeros(3).to("sim", non_blocking=True)
    torch.zeros(3).copy_(there, non_blocking=True)
    assert machine.waits == {"copy": 2, "pageable": 2}
    there[0].item()
    bool(there.sum() > 1)
    torch.equal(there, there)
    there[there > 0]
    torch.accelerator.current_stream().synchronize()
    torch.accelerator.synchronize()
    counted = dict(machine.waits)
    assert counted.pop("device") >= 1
    assert counted.pop("value") >= 2  # torch asks for the elements of the mask, and then for the result
    assert counted == {"copy": 2, "pageable": 2, "item": 2, "stream": 1}
