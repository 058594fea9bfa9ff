"""The plugin for ``python -m tests.accelerator --all``: the ordinary tests, with the learners on the simulated device.

Learners of ordinary tests say ``device="cpu"``, or nothing. Here both mean the simulated device, under the schedule
that the environment variable ``FLOWTRAIN_SCHEDULE`` names, ``eager`` without it. So what is tried is that everything in
flowtrain works on a device, not only what the tests of this folder train.

Some tests are about the CPU and fail here. They make numpy arrays of tensors, give CPU gradients or tensors to
parameters of the device, look for the tensor of the loader itself in the batch, ask for ``torch.autocast("cpu")``, for
a lag of 0 or for the bits of CPU autocast, compile (which cannot trace the streams of a device in Python), use complex
numbers in a loss that the CPU has no kernel for (which breaks the device instead of the call), or start other
processes, which know no such device.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from flowtrain.core import devices, optimizers, torch_core
from tests.accelerator.simulated.backend import install
from tests.accelerator.simulated.machine import Schedule
from tests.support import examples

_find_device = devices.find_device


def _schedule() -> Schedule:
    said: Any = os.environ.get("FLOWTRAIN_SCHEDULE", "eager").replace("_", " ")
    found: Schedule = int(said) if said.isdigit() else said
    return found


def _found(wanted: Any, models: Any) -> Any:
    """Find a device for a learner: the simulated one instead of the CPU."""
    found = _find_device(wanted, models)
    # Where the CPU is meant, optimizers go through the parameters one by one: fused ones round differently.
    optimizers.fused.__defaults__ = (("cpu", "sim") if found.type == "cpu" else ("cpu",),)
    return _find_device("sim", models) if found.type == "cpu" else found


_device = install()
_device.machine.begin(_schedule())
# Tests compare parameters of a learner, which are on the device here, with those of a loop by hand, which are not.
_device.operators.refuses_the_cpu = False
# Both draw the same: work runs at once here, unless a schedule is asked for.
_device.operators.draws = torch.default_generator
# A parameter that moves stays the same object, as on CUDA, whose tensors are of the same kind as the CPU's.
torch.__future__.set_swap_module_params_on_conversion(True)
torch_core.__dict__["find_device"] = _found
examples.__dict__["ORDINARY"] = 10  # drawn examples in a test: each operation takes a hundred times as long here
# So do optimizers for lists of parameters, which are the default on a device.
sys.modules["torch.optim.optimizer"].__dict__["_get_foreach_kernels_supported_devices"] = list


def pytest_runtest_setup() -> None:
    """Begin each test with a device that works: a kernel that fails in one test would fail all that come after it."""
    _device.machine.begin(_schedule())
