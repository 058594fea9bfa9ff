"""Prefetch: the next batch goes to the device while this one is computed.

`ahead` takes one batch more from the loader than it has given, and begins to move it (`Transfer.start`) before it gives
the one before. So the copy of batch *i + 1* runs beside the computation of batch *i*, and who asks is told which
batch is the last. What holds:

- At most one batch more is in memory than without it.
- What the loader raises comes after the batches before it: they are trained first, as without prefetch.
- The loader is asked for batch *i + 1* before batch *i* is trained. One that draws from the same random numbers as the
  model draws them in another order than without prefetch, in the same order in every run.

`CudaTransfer` moves through pinned memory on a stream of its own
(https://docs.pytorch.org/docs/stable/notes/cuda.html#use-pinned-memory-buffers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from flowtrain.core.devices import rebuild

__all__ = ["CudaTransfer", "Transfer", "ahead", "counted", "transfer_to"]

_END = object()


@runtime_checkable
class Transfer(Protocol):
    """How a batch gets to the device in two steps, with computation in between."""

    def start(self, raw: Any) -> Any:
        """Begin to move a batch; return what `finish` takes. Must not wait for the device."""

    def finish(self, moving: Any) -> Any:
        """Return the batch on the device, for use on the current stream. Must not make the host wait."""


def transfer_to(
    device: torch.device, arrived: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> Transfer | None:
    """Return how batches get to a device ahead of time; ``None`` where that gains nothing.

    Args:
        device: The device.
        arrived: What to do with each tensor there.
    """
    return CudaTransfer(device, arrived) if device.type == "cuda" else None


class CudaTransfer:
    """Copies on a stream of its own, from pinned memory.

    A tensor that the loader has pinned is copied as it is (``DataLoader(pin_memory=True)``); another is pinned first. A
    loader that fills one pinned buffer again and again must not be used with it: the copy may still be running.
    Objects with a ``to`` of their own are moved by it, on the current stream.
    """

    def __init__(self, device: torch.device, arrived: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._device = device
        self._arrived = arrived
        self._stream = torch.cuda.Stream(device)

    def start(self, raw: Any) -> tuple[Any, list[torch.Tensor], Any]:
        """Begin the copies."""
        moved: list[torch.Tensor] = []

        def send(tensor: torch.Tensor) -> torch.Tensor:
            """Begin to copy one tensor, unless it is on a device."""
            if not tensor.is_cpu:
                return tensor
            if tensor.layout is torch.strided and not tensor.is_pinned():
                tensor = tensor.pin_memory()
            moved.append(self._arrived(tensor.to(self._device, non_blocking=True)))
            return moved[-1]

        with torch.cuda.stream(self._stream):
            data = rebuild(raw, send, _stays)
            return data, moved, self._stream.record_event()

    def finish(self, moving: tuple[Any, list[torch.Tensor], Any]) -> Any:
        """Let the current stream wait for the copies, and tell the allocator that it uses them."""
        data, moved, event = moving
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in moved:
            # Its memory belongs to the other stream, which would reuse it as soon as the last reference is gone.
            tensor.record_stream(current)
        return rebuild(data, _stays, lambda item: item.to(self._device))


def _stays(item: Any) -> Any:
    return item


def ahead(batches: Iterable[Any], transfer: Transfer | None, tell: Callable[[bool], None]) -> Iterator[Any]:
    """Yield the batches on the device, each when the next one has been asked for.

    Args:
        batches: What the loader gives.
        transfer: How they get to the device; ``None`` leaves them where they are.
        tell: Called before each batch is given with whether it is the last.
    """
    source = iter(batches)
    failure: list[Exception] = []

    def take() -> Any:
        """Return the next batch on its way, or `_END`; what the loader raises is kept for later."""
        try:
            raw = next(source, _END)
            return raw if transfer is None or raw is _END else transfer.start(raw)
        except Exception as raised:  # the batches before it are trained first
            failure.append(raised)
            return _END

    held = [take()]
    while held[0] is not _END:
        moving = held.pop()
        held.append(take())
        batch = [moving if transfer is None else transfer.finish(moving)]
        del moving
        tell(held[0] is _END and not failure)
        yield batch.pop()  # whose memory is the receiver's alone from here on
    if failure:
        try:
            raise failure[0]
        finally:
            failure.clear()  # its frames hold this one


def counted(batches: Iterable[Any], total: int, tell: Callable[[bool], None]) -> Iterator[Any]:
    """Yield the batches as they are, and tell which is the last of `total`, without looking ahead.

    Args:
        batches: What the loader gives.
        total: How many that are, as it says.
        tell: As for `ahead`.
    """
    for number, raw in enumerate(batches, start=1):
        tell(number == total)
        yield raw
