"""The plugin for ``python -m tests.accelerator --all``: the ordinary tests, with the learners on the simulated device.

Learners of ordinary tests say ``device="cpu"``, or nothing. Here both mean the simulated device, under the schedule
that the environment variable ``FLOWTRAIN_SCHEDULE`` names, ``eager`` without it. So what is tried is that everything in
flowtrain works on a device, not only what the tests of this folder train.

Tests that can hold on the CPU only are left out: those marked ``cpu_only("reason")``, and those that start other
processes, which know no such device. The end of the run tells how many were left out for which reason.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from flowtrain.core import devices, optimizers, torch_core
from flowtrain.core.prefetch import Transfer
from tests.accelerator.simulated.backend import install
from tests.accelerator.simulated.machine import Schedule
from tests.accelerator.simulated.tensors import is_simulated
from tests.support import examples

_find_device = devices.find_device
_attach = torch_core.TorchCore.attach
_swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors


def _schedule() -> Schedule:
    said: Any = os.environ.get("FLOWTRAIN_SCHEDULE", "eager").replace("_", " ")
    found: Schedule = int(said) if said.isdigit() else said
    return found


def _found(wanted: Any, models: Any, number: int | None = None) -> Any:
    """Find a device for a learner: the simulated one instead of the CPU."""
    found = _find_device(wanted, models, number)
    # Where the CPU is meant, optimizers go through the parameters one by one: fused ones round differently.
    optimizers.fused.__defaults__ = (("cpu", "sim") if found.type == "cpu" else ("cpu",),)
    return _find_device("sim", models) if found.type == "cpu" else found


def _attach_there(self: torch_core.TorchCore, state: Any, optimizer: Any) -> None:
    """Attach a core on the simulated device, unless it has a transfer of its own, which leaves batches on the CPU."""
    torch_core.__dict__["find_device"] = _find_device if isinstance(self.settings.prefetch, Transfer) else _found
    _attach(self, state, optimizer)


def _swap_unless_shared(here: torch.Tensor, there: torch.Tensor) -> None:
    """Swap two tensors, unless they share their storage: a parameter that is on the device already stays as it is.

    torch refuses to swap a frozen parameter that was trained before, and other devices let it be.
    """
    if not is_simulated(here) or here.untyped_storage().data_ptr() != there.untyped_storage().data_ptr():
        _swap(here, there)


_device = install()
_device.machine.begin(_schedule())
# Tests compare parameters of a learner, which are on the device here, with those of a loop by hand, which are not.
_device.operators.refuses_the_cpu = False
# Both draw the same: work runs at once here, unless a schedule is asked for.
_device.operators.draws = torch.default_generator
# A parameter that moves stays the same object, as on CUDA, whose tensors are of the same kind as the CPU's.
torch.__future__.set_swap_module_params_on_conversion(True)
torch.utils.swap_tensors = _swap_unless_shared
torch_core.TorchCore.attach = _attach_there  # type: ignore[method-assign]  # for all tests
examples.__dict__["ORDINARY"] = 10  # drawn examples in a test: each operation takes a hundred times as long here
# So do optimizers for lists of parameters, which are the default on a device.
sys.modules["torch.optim.optimizer"].__dict__["_get_foreach_kernels_supported_devices"] = list


_STARTING_PROCESSES = {"dask_processes", "make_dask_processes", "programs", "ranks"}
"""Fixtures of tests that start other processes."""


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Leave out the tests that can hold on the CPU only."""
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"on the CPU only: {mark.args[0]}"))
        elif _STARTING_PROCESSES & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.skip(reason="on the CPU only: other processes know no such device"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how many tests were left out for each reason."""
    skipped = Counter(str(report.longrepr[2]) for report in terminalreporter.getreports("skipped"))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"{count} left out: {reason.removeprefix('Skipped: ')}")


def pytest_runtest_setup() -> None:
    """Begin each test with a device that works: a kernel that fails in one test would fail all that come after it."""
    _device.machine.begin(_schedule())
