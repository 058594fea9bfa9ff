"""The device as torch sees it: registered once in a process, before the first backward pass.

torch counts the devices when it starts the threads of its first backward pass, and a registration cannot be taken
back; so tests with this device run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import _device, backend_registration

from tests.accelerator.simulated.copies import Copies
from tests.accelerator.simulated.machine import Machine
from tests.accelerator.simulated.operators import Operators
from tests.accelerator.simulated.streams import Event, Stream, current_stream, set_stream
from tests.accelerator.simulated.tensors import DEVICE, INTERNALS, Tensors, is_simulated

__all__ = ["Device", "can_install", "device", "install"]

_HOOK = "_setup_privateuseone_for_python_backend"
_IN_LOWER_PRECISION = ("linear", "matmul", "mm", "addmm", "bmm", "conv1d", "conv2d")
"""The operators that autocast computes in its type here, as it does on the CPU and on every accelerator."""

_IN_FLOAT32 = ("cross_entropy_loss", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
"""The losses that autocast computes in float32, as it does on the CPU and on every accelerator."""

_OTHERWISE_COMPOSED = ("native_layer_norm", "native_group_norm")
"""Operators that torch makes of others on a device without a kernel, which rounds differently from that of the CPU."""

_libraries: list[torch.library.Library] = []  # a library that nobody refers to takes its kernels back
_installed: list[Device] = []


class Device:
    """The simulated device: its machine, its memory and its random numbers."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.tensors = Tensors(self.machine)
        self.memory = self.tensors.memory
        self.copies = Copies(self.tensors)
        self.operators = Operators(self.tensors)
        self.generator = self.operators.generator


class _Module:
    """``torch.sim``, as torch's modules for devices, ``torch.cuda`` and others, are."""

    def __init__(self, found: Device) -> None:
        self._device = found

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        self._device.generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self._device.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self._device.generator.set_state(state)


def _guard() -> Any:
    """Return the object that torch asks for the current device: it knows the type, and there is one device of it."""
    kind = INTERNALS._autograd.DeviceType.PrivateUse1
    return type("Guard", (INTERNALS._acc.DeviceGuard,), {"type_": lambda self: kind})()


def can_install() -> bool:
    """Tell whether this torch can have a device that is written in Python."""
    return hasattr(backend_registration, _HOOK)


def device() -> Device | None:
    """Return the device, if it is installed."""
    return _installed[0] if _installed else None


def install() -> Device:
    """Register the device with torch; the accelerator of this process is ``sim`` from now on."""
    if _installed:
        return _installed[0]
    found = Device()
    Stream.machine = found.machine
    getattr(backend_registration, _HOOK)(DEVICE, backend_module=_Module(found), device_guard=_guard())
    _register_kernels(found)
    vars(_device)["_device_constructors"]()  # caches torch's own functions: ``with torch.device(...)`` knows no others
    instead: list[tuple[Any, dict[str, Any]]] = [
        (torch, {"Stream": Stream, "Event": Event}),
        (torch, {name: _with_pinned_memory(found, getattr(torch, name)) for name in ("empty", "empty_strided")}),
        (INTERNALS, {"_accelerator_getStream": current_stream, "_accelerator_setStream": set_stream}),
        (INTERNALS, {"_accelerator_synchronizeDevice": lambda index: found.machine.wait_for_all()}),
        (torch.UntypedStorage, {"clone": _cloning(found.copies, torch.UntypedStorage.clone)}),
    ]
    for owner, functions in instead:
        for name, function in functions.items():
            setattr(owner, name, function)
    _installed.append(found)
    return found


def _register_kernels(found: Device) -> None:
    copies, operators = found.copies, found.operators
    every, ops = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([every, ops])
    every.fallback(operators.call, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _IN_LOWER_PRECISION:
        op = getattr(torch.ops.aten, name).default
        ops.impl(name, _casting(op, lambda: torch.get_autocast_dtype(DEVICE)), "AutocastPrivateUse1")
    for name in _IN_FLOAT32:
        op = getattr(torch.ops.aten, name).default
        ops.impl(name, _casting(op, lambda: torch.float32), "AutocastPrivateUse1")
    for name in _OTHERWISE_COMPOSED:
        ops.impl(name, partial(operators.call, getattr(torch.ops.aten, name).default), "PrivateUse1")
    kernels = {
        "empty.memory_format": copies.empty,
        "empty_strided": copies.empty_strided,
        "resize_": copies.resize_,
        "set_.source_Storage_storage_offset": copies.set_,
        "_copy_from": copies.copy_from,
        "_to_copy": copies.to_copy,
        "_local_scalar_dense": copies.item,
        "record_stream": copies.record_stream,
        "convolution_overrideable": operators.convolution,
        "convolution_backward_overrideable": operators.convolution_backward,
    }
    for name, kernel in kernels.items():
        ops.impl(name, kernel, "PrivateUse1")
    ops.impl("is_pinned", copies.is_pinned, "CPU")
    ops.impl("_pin_memory", copies.pin, "CPU")


def _casting(op: Any, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """Return the operator, with its arguments in the type that autocast computes it in."""
    autocast = INTERNALS.DispatchKeySet(INTERNALS._parse_dispatch_key("AutocastPrivateUse1"))

    def cast(value: Any) -> Any:
        if is_simulated(value) and value.is_floating_point():
            return value.to(dtype())
        return value

    def call(*args: Any) -> Any:
        """Call the operator without autocast, on the arguments in its type."""
        with INTERNALS._ExcludeDispatchKeyGuard(autocast):
            return op(*map(cast, args))

    return call


def _with_pinned_memory(found: Device, plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function of torch that makes tensors, which gives the machine's memory for ``pin_memory=True``."""

    def make(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        """Call torch's own function, unless pinned memory is wanted."""
        if not pin_memory:
            return plain(*args, **options)
        return found.tensors.pinned(plain(*args, **{**options, "device": "meta"}))

    return make


def _cloning(
    copies: Copies, plain: Callable[[torch.UntypedStorage], torch.UntypedStorage]
) -> Callable[[torch.UntypedStorage], torch.UntypedStorage]:
    """Return the function that copies a storage for `copy.deepcopy`: torch's own asks for an allocator in C++."""

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Copy a storage."""
        return copies.clone_storage(storage) if storage.device.type == DEVICE else plain(storage)

    return clone
