"""Tensors of the device: storages of torch over the machine's memory, and how the CPU sees them.

A tensor gets its storage through DLPack, whose type ``kDLExtDev`` torch takes for its device ``PrivateUse1``
(https://dmlc.github.io/dlpack/latest/c_api.html). So its memory has an address, and it is shared by views, counted, and
freed as with every other device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.accelerator.simulated.machine import Machine
from tests.accelerator.simulated.memory import HOST, POISON, Block, Memory

__all__ = ["DEVICE", "INTERNALS", "KIND", "Tensors", "is_simulated"]

DEVICE = "sim"
"""The name of the device in torch."""

KIND = 20
"""The number of ``PrivateUse1`` among torch's types of devices."""

INTERNALS: Any = vars(torch)["_C"]
"""The internals of torch that a device needs and that have no public name."""

_EXTERNAL_DEVICE = 12
_CODES = {torch.bool: 6, torch.bfloat16: 4, torch.uint8: 1, torch.uint16: 1, torch.uint32: 1, torch.uint64: 1}


class _Managed(ctypes.Structure):
    """``DLManagedTensor`` of the C API of DLPack."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_capsule: Any = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _code(dtype: torch.dtype) -> int:
    if dtype.is_complex:
        return 5
    return _CODES.get(dtype, 2 if dtype.is_floating_point else 0)


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return how many elements lie between the first and the last one, both included."""
    return 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


class Tensors:
    """Makes tensors in the memory of a machine.

    Args:
        machine: The machine.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.memory = Memory(machine)

    def empty(self, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Return a tensor of the device, which its stream fills with NaN."""
        machine = self.machine
        with machine.lock:
            block = self.memory.allocate(_extent(size, stride) * dtype.itemsize, machine.current_stream)
            dimensions = (ctypes.c_int64 * max(1, 2 * len(size)))(*size, *stride)
            at = ctypes.addressof(dimensions)
            managed = _Managed(
                block.address, _EXTERNAL_DEVICE, 0, len(size), _code(dtype), 8 * dtype.itemsize, 1,
                at, at + 8 * len(size), 0, None, None,
            )  # fmt: skip
            made: Tensor = INTERNALS._from_dlpack(_capsule(ctypes.addressof(managed), b"dltensor", None))
            block.lend(made, (managed, dimensions))
            poison = 1 if dtype is torch.bool else POISON
            machine.submit("allocate", lambda: block.bytes.fill_(poison), writes=[block.uses], past=block.marks)
            return made

    def empty_like(self, plan: Tensor) -> Tensor:
        """Return a tensor of the device with the dtype, the size and the strides of another tensor."""
        return self.empty(plan.dtype, plan.size(), plan.stride())

    def pinned(self, plan: Tensor) -> Tensor:
        """Return a tensor of the CPU in pinned memory, with the dtype, the size and the strides of another tensor."""
        block = self.memory.allocate(_extent(plan.size(), plan.stride()) * plan.dtype.itemsize, HOST)
        memory = (ctypes.c_char * block.nbytes).from_address(block.address)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        block.lend(flat, block.bytes)
        return flat.view(plan.dtype).as_strided(plan.size(), plan.stride())

    def block(self, tensor: Tensor) -> Block:
        """Return the memory of a tensor of the device, or of one in pinned memory."""
        found = self.memory.find(tensor)
        assert found is not None, f"a tensor of {tensor.device} in memory that the simulated device has not given out"
        return found

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the device, or one in pinned memory, as a tensor of the CPU in the same memory.

        It is for work that runs later, and does not keep the memory from being given out again.
        """
        return self.block(tensor).view(tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def is_simulated(value: object) -> bool:
    """Tell whether a value is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == DEVICE
