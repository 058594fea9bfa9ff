"""The tests of this folder need the simulated device, which the command ``python -m tests.accelerator`` installs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.accelerator.simulated.backend import Device, device
from tests.accelerator.simulated.machine import Machine

collect_ignore_glob = [] if device() else ["test_*.py"]  # an ordinary run starts them in a process of their own


@pytest.fixture(autouse=True)
def simulated() -> Iterator[Device]:
    """The device, with nothing left over from other tests: all work done, nothing counted, every seed 0."""
    found = device()
    assert found is not None
    found.machine.begin("eager")
    found.memory.limit = None
    torch.manual_seed(0)
    yield found
    found.memory.limit = None
    found.machine.begin("eager")


@pytest.fixture
def machine(simulated: Device) -> Machine:
    """The machine of the device."""
    return simulated.machine
