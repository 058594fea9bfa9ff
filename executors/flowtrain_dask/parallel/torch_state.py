"""The torch state of the training thread, given to handlers on other threads and in other processes.

torch keeps most of its modes for each thread separately, and a new thread starts with the defaults: gradients on, no
autocast, the first device and its default stream. `TorchState.capture` records the state of the calling thread, and
`TorchState.call` runs a handler on another thread in the recorded state. It consists of:

- grad mode and inference mode;
- autocast: enabled or not, its dtype and its cache, for the CPU and the accelerator;
- the default device (``torch.set_default_device`` and ``with torch.device(...)``);
- the default dtype, which is one for all threads, so that only `TorchState.dtype_set` in another process sets it;
- device and stream of the accelerator, once it is in use;
- the number of intra-op threads: a sum over another number of threads differs in its last bits.

A handler in a lane records no gradients, and its snapshot is in CPU memory. So its state has no stream, and no
accelerator as the default device.

If both threads have the same state, which is the common case, this costs one comparison. Context variables do not
belong to torch: each strand and each deferred event runs in a copy of the context of the training thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import _C

from flowtrain.state.accelerator import accelerator_kind, current_stream, on_stream

__all__ = ["TorchState"]

P = ParamSpec("P")

_modes = _C._len_torch_function_stack  # pyright: ignore[reportPrivateUsage]  # torch has no cheap public function

_Autocast = tuple[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class TorchState:
    """The state that torch keeps for one thread.

    Attributes:
        grad: Whether gradients are recorded.
        inference: Whether inference mode is on.
        autocast: The device types with autocast and the dtype of each.
        autocast_cache: Whether autocast caches the tensors that it casts.
        device: The default device; ``None`` if it was never set.
        stream: The current stream of the accelerator, which includes its device; ``None`` while there is none in use.
        threads: The number of intra-op threads.
        dtype: The default dtype.
    """

    grad: bool
    inference: bool
    autocast: tuple[_Autocast, ...]
    autocast_cache: bool
    device: torch.device | None
    stream: torch.Stream | None
    threads: int
    dtype: torch.dtype

    @staticmethod
    def capture(*, deferred: bool = False) -> TorchState:
        """Return the state of the calling thread for a handler; with `deferred`, for one that runs in a lane."""
        return TorchState(*_settings(deferred))

    @staticmethod
    def of_event() -> TorchState:
        """Return the state of the training thread for the handler of a deferred event."""
        global _last
        # Events share one object, which is quicker, and is sent to another process once for a batch.
        settings = _settings(deferred=True)
        if _last is None or settings != _last[0]:
            _last = settings, TorchState(*settings)
        return _last[1]

    def call(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a function on this thread, in this state. The result of the function is dropped.

        Afterwards the thread has its own state again, except for the number of intra-op threads, which stays that of
        this state. Setting it in any thread changes the number that later threads start with, so all threads must
        keep the number of the training thread.
        """
        before = TorchState.capture()
        try:
            if before == self:
                function(*args, **kwargs)
            else:
                with ExitStack() as stack:
                    self._enter(before, stack)
                    function(*args, **kwargs)
        finally:
            if torch.get_num_threads() != self.threads:  # the function has changed it
                torch.set_num_threads(self.threads)

    @contextmanager
    def dtype_set(self) -> Generator[None]:
        """Give a context with this default dtype, in a process that does not train."""
        before = torch.get_default_dtype()
        if self.dtype == before:
            yield
            return
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def _enter(self, before: TorchState, stack: ExitStack) -> None:
        if self.threads != before.threads:
            torch.set_num_threads(self.threads)
        if self.stream is not None and self.stream != before.stream:
            stack.enter_context(on_stream(self.stream))
        if self.device != before.device:
            device = torch.device("cpu") if self.device is None else self.device
            if before.device is None:
                stack.enter_context(device)
            else:  # a handler has set it in this thread; torch 2.6 cannot nest such contexts
                stack.callback(torch.set_default_device, before.device)
                torch.set_default_device(device)
        if (self.autocast, self.autocast_cache) != (before.autocast, before.autocast_cache):
            # Not by `torch.autocast`: its exit empties the cache of casts, which all threads share.
            stack.callback(before._set_autocast, {kind: torch.get_autocast_dtype(kind) for kind, _ in self.autocast})
            self._set_autocast(dict(self.autocast))
        if self.inference != before.inference:
            stack.enter_context(torch.inference_mode(self.inference))
        if self.grad != torch.is_grad_enabled():  # compared only now, because entering inference mode turns it off
            stack.enter_context(torch.set_grad_enabled(self.grad))

    def _set_autocast(self, dtypes: dict[str, torch.dtype]) -> None:
        for kind, dtype in dtypes.items():
            torch.set_autocast_dtype(kind, dtype)
        for kind in _autocast_devices():
            torch.set_autocast_enabled(kind, any(kind == each for each, _ in self.autocast))
        torch.set_autocast_cache_enabled(self.autocast_cache)


_Settings = tuple[bool, bool, tuple[_Autocast, ...], bool, torch.device | None, torch.Stream | None, int, torch.dtype]

_last: tuple[_Settings, TorchState] | None = None


def _settings(deferred: bool) -> _Settings:
    """Return the values of the attributes of `TorchState` on the calling thread."""
    # A default device is a mode on the stack, so an empty stack has none. Otherwise a new tensor tells it in 2
    # microseconds; `torch.get_default_device` of torch 2.6 does not know ``with torch.device(...)``.
    device = torch.empty(0).device if _modes() else None
    if deferred and device is not None and device.type not in ("cpu", "meta"):
        device = None
    kinds = [kind for kind in _autocast_devices() if torch.is_autocast_enabled(kind)]
    return (
        not deferred and torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple([(kind, torch.get_autocast_dtype(kind)) for kind in kinds]),
        torch.is_autocast_cache_enabled(),
        device,
        None if deferred else current_stream(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )


_devices: tuple[str, ...] = ()


def _autocast_devices() -> tuple[str, ...]:
    """Return the device types that may have autocast on."""
    global _devices
    if not _devices:
        kind = accelerator_kind()
        _devices = ("cpu",) if kind is None else ("cpu", kind)
    return _devices
