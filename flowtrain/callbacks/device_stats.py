"""DeviceStats: the memory and the processor time that this process and its GPU use, without further packages."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from numbers import Real

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.conditions import Every
from flowtrain.callback.events import BatchEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.state.accelerator import accelerator

__all__ = ["DeviceStats"]

_MEBIBYTE = 2**20


class DeviceStats(Callback):
    """Record how much memory and processor time this process uses, every `every` batches.

    Writes series to ``cbstate.tracehistory[phase]``; the step of a value is the number of complete batches. Memory is
    in MiB:

    - ``"Device.Memory"``: resident memory (Linux), ``"Device.MemoryPeak"``: its largest value (Linux and macOS);
    - ``"Device.Cpu"``: processor time divided by the time since the last record: 1 is one core that is always busy;
    - ``"Device.CudaMemory"``, ``"Device.CudaReserved"``, ``"Device.CudaPeak"``: memory of torch's allocator on the
      current GPU (https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management), if there is a GPU. Another
      accelerator has its own name there, as in ``"Device.XpuMemory"``, if its module in torch reports memory.

    In a training of several ranks each rank records its own process and its own GPU.

    Reads ``cbstate.history``, so it runs after `Recorder`. Costs a call of the driver for each name when it records,
    and an addition otherwise. There is no synchronisation with a GPU.

    Args:
        every: Record at the n-th, 2n-th, ... batch, counted for each phase.
        measure: A function that returns other numbers by name, always with the same names.

    Raises:
        UsageError: `every` is no whole number or below 1, or `measure` does not return numbers by name. At a batch: it
            returns other names than at first.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(DeviceStats(every=8), n_batches=16)
    >>> history = learner.fit(1)
    >>> [step for step, share in learner.cbstate.tracehistory[TrainingPhase]["Device.Cpu"]]
    [8, 16]
    """

    def __init__(self, every: int = 100, measure: Callable[[], Mapping[str, float]] | None = None) -> None:
        self.every = whole_number("DeviceStats(): every", every)
        self.conditions = (Every(BatchEnd, self.every),)
        if measure is not None and not callable(measure):
            raise UsageError(f"DeviceStats(measure={measure!r}): measure is a function that returns numbers by name.")
        self.measure: Callable[[], Mapping[str, float]] = _Usage() if measure is None else measure
        found = self.measure()
        if not is_a(found, Mapping) or not found or not all(is_a(name, str) and name for name in found):
            raise _no_numbers(found)
        if not all(is_a(value, Real) or hasattr(value, "numel") for value in found.values()):
            raise _no_numbers(found)
        self.names = tuple(found)

    def state_access(self) -> Access:
        """Declare a read of ``cbstate.history``, and a write of each recorded series."""
        writes: Access = {f"cbstate.tracehistory.Device.{name}": Write() for name in self.names}
        return {"cbstate.history": Read(), **writes}

    @on(BatchEnd)
    def record(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Measure and record at every n-th batch."""
        step, series = learner.cbstate.history[phase].steps, learner.cbstate.tracehistory[phase]
        found = self.measure()
        if {*found} != {*self.names}:
            raise UsageError(
                f"DeviceStats: measure() returned {sorted(found)}, and {sorted(self.names)} at first; return the same "
                f"names at every call."
            )
        for name, value in found.items():
            series.push(f"Device.{name}", value, step)


def _no_numbers(found: object) -> UsageError:
    return UsageError(f'DeviceStats: measure() returned {found!r}; return numbers by name: {{"Watt": 250.0}}.')


class _Usage:
    """Measures the memory of this process, and its processor time since the previous call."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        passed, worked = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return {**_memory(), "Cpu": worked / passed if passed > 0 else 0.0, **_accelerator()}


def _memory() -> dict[str, float]:
    found: dict[str, float] = {}
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # https://man7.org/linux/man-pages/man5/proc.5.html
            found["Memory"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MEBIBYTE
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but on macOS in bytes
        found["MemoryPeak"] = peak / _MEBIBYTE if sys.platform == "darwin" else peak / 1024
    return found


def _accelerator() -> dict[str, float]:
    found = accelerator()
    if found is None:
        return {}
    module, name = torch.get_device_module(found), found.type.capitalize()
    told = {"Memory": "memory_allocated", "Reserved": "memory_reserved", "Peak": "max_memory_allocated"}
    return {
        f"{name}{what}": getattr(module, function)() / _MEBIBYTE
        for what, function in told.items()
        if hasattr(module, function)
    }
