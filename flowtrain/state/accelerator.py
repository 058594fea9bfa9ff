"""The accelerator of this process, of any kind: CUDA, ROCm, XPU, NPU, MPS, or one that registers itself with torch.

flowtrain uses streams, events, pinned memory and the generators of a device only through this module, or through
`torch.accelerator`, `torch.Stream` and `torch.Event`, which all kinds share. The abilities of a kind are tried out
(`has_streams`), so there is no list of kinds. The streams and events of one kind, such as ``torch.cuda.Event``, must
not be mixed with the common ones: up to torch 2.11 that fails, and it crashes on XPU
(https://github.com/pytorch/pytorch/issues/173792).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = [
    "accelerator",
    "accelerator_kind",
    "current_stream",
    "has_streams",
    "on_stream",
    "random_states",
    "seed",
    "select",
    "set_random_states",
]


def accelerator_kind() -> str | None:
    """Return the type of accelerator that this torch was built for, such as ``"cuda"``, or ``None``.

    The accelerator may not be usable: a build for CUDA has the type ``"cuda"`` also on a machine without a driver.
    """
    try:
        found = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6 raises where later ones return `None`
        return None
    return None if found is None else found.type


def accelerator() -> torch.device | None:
    """Return the accelerator, or ``None`` if this process cannot use one."""
    kind = accelerator_kind()
    return torch.device(kind) if kind is not None and torch.accelerator.is_available() else None


def _module_in_use() -> Any:
    """Return ``torch.cuda`` or the module of another kind if the accelerator is in use; otherwise ``None``.

    Most functions of the module would initialise the accelerator.
    """
    kind = accelerator_kind()
    if kind is None:
        return None
    module = torch.get_device_module(kind)
    in_use = getattr(module, "is_initialized", module.is_available)  # torch.mps is in use whenever it is available
    return module if in_use() else None


def has_streams(device: torch.device) -> bool:
    """Tell whether copies can run beside the computation on a device: it has several streams, and pinned memory."""
    return device.type != "cpu" and device.type == accelerator_kind() and _has_streams(device.type)


@cache
def _has_streams(kind: str) -> bool:
    try:  # a kind without them raises, or returns something else: MPS pins nothing, and has a single stream
        host = torch.empty(1, pin_memory=True)
        if not host.is_cpu or not host.is_pinned():
            return False
        stream = torch.Stream(kind)
        if stream == torch.accelerator.current_stream(stream.device):
            return False
        torch.empty(1, device=stream.device).record_stream(stream)
    except RuntimeError:
        return False
    return True


def select(device: torch.device) -> None:
    """Make an accelerator with a number the current one of this process."""
    name = "set_device_index" if hasattr(torch.accelerator, "set_device_index") else "set_device_idx"  # in torch 2.6
    getattr(torch.accelerator, name)(device.index)


def current_stream() -> torch.Stream | None:
    """Return the current stream of this thread, with its device; ``None`` while no accelerator is in use."""
    return None if _module_in_use() is None else torch.accelerator.current_stream()


@contextmanager
def on_stream(stream: torch.Stream) -> Generator[None]:
    """Make a stream and its device the current ones of this thread; restore both afterwards.

    This replaces ``with stream:``, which torch 2.6 does not have. Later versions store the previous stream on the
    entered stream itself, so that no second thread and no second block may enter it
    (https://github.com/pytorch/pytorch/issues/176560).

    Args:
        stream: A stream of the accelerator. Several threads may enter it at the same time.
    """
    here = torch.accelerator.current_stream()
    there = here if here.device == stream.device else torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(there)
        if here is not there:
            torch.accelerator.set_stream(here)  # with its device


def random_states() -> list[torch.Tensor]:
    """Return the states of the generators of all devices; an empty list while no accelerator is in use."""
    module = _module_in_use()
    if module is None:
        return []
    count = module.device_count()
    # torch.mps has one device, and its functions take no number.
    return [module.get_rng_state()] if count == 1 else [module.get_rng_state(index) for index in range(count)]


def set_random_states(states: Sequence[torch.Tensor]) -> None:
    """Restore the states that `random_states` returned, as far as there are as many devices."""
    kind = accelerator_kind()
    if not states or kind is None or not torch.accelerator.is_available():
        return
    module = torch.get_device_module(kind)
    count = module.device_count()
    if count == 1:
        module.set_rng_state(states[0])
    else:
        for index, state in zip(range(count), states, strict=False):
            module.set_rng_state(state, index)


def seed(number: int) -> None:
    """Seed the generators of all devices, if the accelerator is in use."""
    module = _module_in_use()
    if module is not None:
        (getattr(module, "manual_seed_all", None) or module.manual_seed)(number)
