"""The module through which flowtrain sees an accelerator, on one with streams, and on one that lacks them."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from flowtrain import TorchCore
from flowtrain.callbacks import DeviceStats
from flowtrain.core.devices import find_device
from flowtrain.diagnostics.lr_finder import find_learning_rate
from flowtrain.state import accelerator as seam
from flowtrain.state.accelerator import (
    accelerator,
    current_stream,
    has_streams,
    on_stream,
    random_states,
    seed,
    set_random_states,
)
from tests.accelerator import trainings
from tests.accelerator.simulated.backend import Device
from tests.accelerator.simulated.machine import Machine
from tests.accelerator.trainings import TRAININGS, learner_of, train

SIM = torch.device("sim")


def test_what_is_there() -> None:
    assert accelerator() == SIM
    assert has_streams(SIM)
    assert has_streams(torch.device("sim", 0))
    assert not has_streams(torch.device("cpu"))
    assert not has_streams(torch.device("cuda")), "it is not the accelerator of this process"
    assert current_stream() == torch.accelerator.current_stream()


def test_a_process_of_several_gets_the_device_of_its_number_among_those_that_it_sees() -> None:
    """A launcher may show each process one device only, whose number is 0 then, whatever its LOCAL_RANK is."""
    count, before = torch.accelerator.device_count(), torch.accelerator.current_device_index()
    try:
        for number in range(2 * count + 1):
            assert find_device("auto", [], number) == torch.device("sim", number % count)
            assert torch.accelerator.current_device_index() == number % count
        assert find_device("cpu", [], 1) == torch.device("cpu")
    finally:
        torch.accelerator.set_device_index(before)


def test_a_scope_puts_the_stream_back_whatever_ends_it() -> None:
    main, side, other = torch.accelerator.current_stream(), torch.Stream(), torch.Stream()
    with on_stream(side):
        assert current_stream() == side
        with on_stream(other), on_stream(side):
            assert current_stream() == side
        assert current_stream() == side
    assert current_stream() == main
    with pytest.raises(ValueError, match="broken"), on_stream(side):
        raise ValueError("broken")
    assert current_stream() == main


def test_two_threads_may_enter_one_stream_at_the_same_time() -> None:
    side, other, both = torch.Stream(), torch.Stream(), Barrier(2)

    def enter(before: torch.Stream) -> bool:
        """Enter the stream from another one, beside the other thread."""
        torch.accelerator.set_stream(before)
        both.wait(10)
        with on_stream(side):
            both.wait(10)
            inside = current_stream() == side
            both.wait(10)
        return inside and current_stream() == before

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(enter, [other, torch.Stream()])) == [True, True]


def test_random_numbers_of_the_device() -> None:
    states = random_states()
    first = torch.rand(3, device="sim").tolist()
    assert torch.rand(3, device="sim").tolist() != first
    set_random_states([*states, states[0]])  # those of a machine with more devices
    assert torch.rand(3, device="sim").tolist() == first
    seed(5)
    mine = torch.rand(3, device="sim").tolist()
    torch.manual_seed(5)
    assert torch.rand(3, device="sim").tolist() == mine


def test_random_numbers_of_several_devices(simulated: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = torch.get_device_module("sim")
    asked: list[Any] = []
    monkeypatch.setattr(module, "device_count", lambda: 3)
    monkeypatch.setattr(module, "get_rng_state", lambda device=None: torch.tensor([device]))
    monkeypatch.setattr(module, "set_rng_state", lambda state, device=None: asked.append((state.item(), device)))
    assert [each.item() for each in random_states()] == [0, 1, 2]
    set_random_states([torch.tensor([7]), torch.tensor([8])])
    assert asked == [(7, 0), (8, 1)]


# --- a device without side streams or pinned memory, as MPS is


def probe() -> bool:
    """Try out anew what the device has."""
    found: bool = vars(seam)["_has_streams"].__wrapped__("sim")
    return found


def test_pinned_memory_that_is_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS gives a tensor of the device for ``pin_memory=True``."""
    assert probe()
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(*size, device="sim"))
    assert not probe()


def test_one_stream_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", lambda kind: torch.accelerator.current_stream())
    assert not probe()


@pytest.mark.filterwarnings("ignore:lag=2 saves no time")
def test_without_streams_training_is_the_same_without_prefetch_and_lag(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "_has_streams", lambda kind: False)
    with learner_of(TRAININGS["the defaults"], "sim", lag=None) as learner:
        learner.fit(1)
        assert learner.state.lag == 0
        assert repr(learner.core) == (
            "TorchCore(device='sim', precision='fp32', accumulate=1, prefetch=False, lag=0)"
        ), "it says so"
    for name in ("the defaults", "deferred callbacks"):
        machine.begin("lazy")
        found = train(name, "sim")
        assert {stream for stream, _ in machine.ran} == {0}
        assert found == train(name, "cpu")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            {"prefetch": True, "lag": None},
            "prefetch=True does nothing on sim, for which torch has no side streams or no pinned memory: each batch is "
            "moved when its turn comes. Leave prefetch= out: then batches are moved ahead of time on every device that "
            "can do it.",
        ),
        (
            {"lag": 2},
            "lag=2 saves no time on sim, for which torch has no side streams or no pinned memory: values are read 2 "
            "batches late, and each read still waits for all work of the device. Leave lag= out: then values are read "
            "late on every device that gains by it.",
        ),
    ],
)
def test_who_asks_for_prefetch_or_lag_without_streams_is_told_once(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], text: str
) -> None:
    monkeypatch.setattr(seam, "_has_streams", lambda kind: False)
    with pytest.warns(UserWarning, match="does nothing|saves no time") as told:
        learner = learner_of(TRAININGS["the defaults"], "sim", **asked)
    assert [str(each.message) for each in told] == [text]
    assert told[0].filename == trainings.__file__, "the line that makes the learner"
    with learner:
        learner.fit(1)
        find_learning_rate(learner, start=1e-3, end=1.0, updates=4)  # trains a copy with the same core


@pytest.mark.parametrize("asked", [{"lag": None}, {"lag": 0}, {"lag": None, "prefetch": False}])
def test_the_defaults_and_less_need_no_warning(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    monkeypatch.setattr(seam, "_has_streams", lambda kind: False)
    learner_of(TRAININGS["the defaults"], "sim", **asked).close()
    learner_of(TRAININGS["the defaults"], "cpu", prefetch=True, lag=2).close()


def test_with_streams_a_core_says_that_it_uses_them() -> None:
    with learner_of(TRAININGS["the defaults"], "sim") as learner:
        assert repr(learner.core).endswith("prefetch=True, lag=2)")
    assert repr(learner.core).endswith("prefetch=True, lag=2)"), "a closed learner can still be read"
    assert repr(TorchCore("sim")) == "TorchCore(device='sim', precision='fp32', accumulate=1)"


def test_a_learner_with_prefetch_is_freed_at_once() -> None:
    """Its memory on the device would otherwise wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        learner = learner_of(TRAININGS["the defaults"], "sim")
        learner.fit(1)
        optimizer = weakref.ref(learner.optimizer)
        learner.close()
        del learner
        assert optimizer() is None
    finally:
        gc.enable()


def test_device_stats_ask_the_module_of_the_device(simulated: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [name for name in DeviceStats().names if name.startswith("Sim")]
    module: Any = torch.get_device_module("sim")
    monkeypatch.setattr(module, "memory_allocated", lambda: simulated.memory.nbytes, raising=False)
    assert "SimMemory" in DeviceStats().names
