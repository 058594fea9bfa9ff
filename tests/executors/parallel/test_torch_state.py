"""Rule 14: a handler on another thread sees the training thread's torch state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from flowtrain.state.accelerator import on_stream
from flowtrain_dask.parallel.torch_state import TorchState
from tests.support.accelerator import needs_accelerator


@contextmanager
def threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """One thread, always the same."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def seen() -> dict[str, Any]:
    """What a handler can notice."""
    weight = torch.ones(2, 2, requires_grad=True)
    made = torch.ones(2, 2)
    product = weight @ made.to(weight.device)
    return {
        "grad": torch.is_grad_enabled(),
        "records": product.requires_grad,
        "inference": made.is_inference(),
        "dtype": product.dtype,
        "device": made.device.type,
        "autocast": torch.is_autocast_enabled("cpu"),
        "cache": torch.is_autocast_cache_enabled(),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Generator[None]:
    with one, other:
        yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad in inference": lambda: both(torch.inference_mode(), torch.enable_grad()),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast without cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    "device": lambda: torch.device("meta"),
    "three threads": lambda: threads(3),
    "everything": lambda: both(both(torch.autocast("cpu"), torch.no_grad()), both(torch.device("meta"), threads(3))),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_thread_sees_what_the_training_thread_sees(mode: str, other: ThreadPoolExecutor) -> None:
    found: list[dict[str, Any]] = []
    at_first = other.submit(seen).result(10)
    with MODES[mode]():
        here = seen()
        state = TorchState.capture()
        other.submit(state.call, lambda: found.append(seen())).result(10)
    assert found == [here]
    afterwards = other.submit(seen).result(10)
    assert afterwards | {"threads": 0} == at_first | {"threads": 0}, "and then its own again"


def test_a_thread_in_another_mode_comes_back_to_the_plain_state(other: ThreadPoolExecutor) -> None:
    """A handler can leave its thread in any mode; the next one does not see it."""

    def leave() -> None:
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_default_device("meta")

    state, found = TorchState.capture(), list[dict[str, Any]]()
    other.submit(leave).result(10)
    other.submit(state.call, lambda: found.append(seen())).result(10)
    assert found == [seen()]
    assert other.submit(torch.is_grad_enabled).result(10) is False


def test_a_thread_count_set_by_a_handler_is_put_back() -> None:
    """Otherwise threads that start later would begin with it, in this process for good."""
    state, counts = TorchState.capture(), list[int]()

    def start() -> None:
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join(10)

    def work() -> None:
        state.call(torch.set_num_threads, 5)
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    start()
    assert counts == [state.threads, state.threads]


def test_the_state_is_put_back_after_an_error(other: ThreadPoolExecutor) -> None:
    def fail() -> None:
        raise ValueError("broken")

    with torch.no_grad(), torch.autocast("cpu"):
        state = TorchState.capture()
    with pytest.raises(ValueError, match="broken"):
        other.submit(state.call, fail).result(10)
    assert other.submit(torch.is_grad_enabled).result(10) is True
    assert other.submit(torch.is_autocast_enabled, "cpu").result(10) is False


@needs_accelerator
def test_a_thread_works_on_the_training_threads_stream(other: ThreadPoolExecutor) -> None:
    streams: list[torch.Stream] = []
    side = torch.Stream()
    with on_stream(side):
        state = TorchState.capture()
    other.submit(state.call, lambda: streams.append(torch.accelerator.current_stream())).result(10)
    assert streams == [side]
    assert other.submit(torch.accelerator.current_stream).result(10) != side
