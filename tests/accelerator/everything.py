"""The plugin for ``python -m tests.accelerator --all``: the ordinary tests, with the learners on the simulated device.

Learners of ordinary tests say ``device="cpu"``, or nothing. Here both mean the simulated device, under the schedule
that the environment variable ``FLOWTRAIN_SCHEDULE`` names, ``eager`` without it. So what is tried is that everything in
flowtrain works on a device, not only what the tests of this folder train. Tests that look into tensors of the CPU, at
their memory, at counts of calls or at other processes, which know no such device, fail here for reasons of their own.
"""

from __future__ import annotations

import os
from typing import Any

from flowtrain.core import core, devices
from tests.accelerator.simulated.backend import install
from tests.accelerator.simulated.machine import Schedule

_find_device = devices.find_device


def _schedule() -> Schedule:
    said: Any = os.environ.get("FLOWTRAIN_SCHEDULE", "eager").replace("_", " ")
    found: Schedule = int(said) if said.isdigit() else said
    return found


def _found(wanted: Any, models: Any) -> Any:
    """Find a device for a learner: the simulated one instead of the CPU."""
    found = _find_device(wanted, models)
    return _find_device("sim", models) if found.type == "cpu" else found


install().machine.begin(_schedule())
core.__dict__["find_device"] = _found
