"""The training thread's torch state, for handlers on other threads.

torch keeps most of its modes for each thread by itself, and a new thread starts with the defaults: gradients on, no
autocast, the first device and its default stream. `TorchState.capture` notes what a handler would see on this thread,
and `TorchState.call` runs a handler on another thread so that it sees the same:

- grad mode and inference mode;
- autocast: enabled or not, its dtype and its cache, for the CPU and the accelerator;
- the default device (``torch.set_default_device`` and ``with torch.device(...)``); the default dtype is one for all
  threads and needs nothing;
- CUDA device and stream, once CUDA is in use;
- the number of intra-op threads: a sum over another number of threads differs in its last bits.

Where both threads agree, which is the common case, this costs a comparison. Context variables are not torch's: each
strand runs in a copy of the caller's context.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ParamSpec

import torch
from torch import _C

__all__ = ["TorchState"]

P = ParamSpec("P")

_modes = _C._len_torch_function_stack  # pyright: ignore[reportPrivateUsage]  # torch has no public way that is cheap

_Autocast = tuple[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class TorchState:
    """What torch keeps for one thread.

    Attributes:
        grad: Whether gradients are recorded.
        inference: Whether inference mode is on.
        autocast: The device types with autocast and the dtype of each.
        autocast_cache: Whether autocast keeps what it casts.
        device: The default device; ``None`` where none was set.
        cuda: The current CUDA stream, which knows its device; ``None`` while CUDA is not in use.
        threads: The number of intra-op threads.
    """

    grad: bool
    inference: bool
    autocast: tuple[_Autocast, ...]
    autocast_cache: bool
    device: torch.device | None
    cuda: torch.cuda.Stream | None
    threads: int

    @staticmethod
    def capture() -> TorchState:
        """Return the state of the calling thread."""
        return TorchState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (kind, torch.get_autocast_dtype(kind))
                for kind in _autocast_devices()
                if torch.is_autocast_enabled(kind)
            ),
            torch.is_autocast_cache_enabled(),
            # Asking takes 2 microseconds; no mode at all on the stack means that there is no default device either.
            torch.get_default_device() if _modes() else None,
            torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
            torch.get_num_threads(),
        )

    def call(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a function on this thread, in this state.

        The thread's own state is put back, but for the number of intra-op threads: setting that in one thread also
        changes what threads that start later begin with, so what stays is the number that the training thread has.
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
            if torch.get_num_threads() != self.threads:  # the function has set it
                torch.set_num_threads(self.threads)

    def _enter(self, before: TorchState, stack: ExitStack) -> None:
        if self.threads != before.threads:
            torch.set_num_threads(self.threads)
        if self.cuda is not None and self.cuda != before.cuda:
            stack.enter_context(torch.cuda.device(self.cuda.device))
            stack.enter_context(torch.cuda.stream(self.cuda))
        if self.device != before.device:
            stack.enter_context(torch.device("cpu") if self.device is None else self.device)
        if (self.autocast, self.autocast_cache) != (before.autocast, before.autocast_cache):
            # Not `torch.autocast`: leaving it empties the cache of casts, which the threads share.
            stack.callback(before._set_autocast, {kind: torch.get_autocast_dtype(kind) for kind, _ in self.autocast})
            self._set_autocast(dict(self.autocast))
        if self.inference != before.inference:
            stack.enter_context(torch.inference_mode(self.inference))
        if self.grad != torch.is_grad_enabled():  # inference mode has changed it
            stack.enter_context(torch.set_grad_enabled(self.grad))

    def _set_autocast(self, dtypes: dict[str, torch.dtype]) -> None:
        for kind, dtype in dtypes.items():
            torch.set_autocast_dtype(kind, dtype)
        for kind in _autocast_devices():
            torch.set_autocast_enabled(kind, any(kind == each for each, _ in self.autocast))
        torch.set_autocast_cache_enabled(self.autocast_cache)


_devices: tuple[str, ...] = ()


def _autocast_devices() -> tuple[str, ...]:
    """Return the device types that may have autocast on."""
    global _devices
    if not _devices:
        accelerator = torch.accelerator.current_accelerator()
        _devices = ("cpu", "cuda" if accelerator is None else accelerator.type)
    return _devices
