"""Placement and prefetch: batches get to the device of a core, one by one or ahead of time.

`BatchMover` is the part of a core that moves data. Where copies can run beside computation, it moves the next
batch while the current one is computed; this is *prefetch*. `ahead` takes one batch more from the loader than it has
given, and begins to move it (`Transfer.start`) before it gives the batch before. So the copy of batch *i + 1* runs
beside the computation of batch *i*, and it is known of every batch whether it is the last one. Prefetch keeps these
promises:

- It holds at most one batch more in memory.
- An exception of the loader comes after the batches before it: they are trained first, as without prefetch.
- The loader is asked for batch *i + 1* before batch *i* is trained. A loader that draws from the same generators as the
  model draws in another order than without prefetch, but in the same order in every run.

`StreamTransfer` moves batches through pinned memory on a stream of its own
(https://docs.pytorch.org/docs/stable/notes/cuda.html#use-pinned-memory-buffers), on every accelerator that has both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from flowtrain.core.accumulation import Groups
from flowtrain.core.devices import change_tensors
from flowtrain.data.loaders import END_OF_DATA
from flowtrain.state.accelerator import has_streams, on_stream
from flowtrain.state.device_values import DEFAULT_LAG

__all__ = ["BatchMover", "StreamTransfer", "Transfer", "ahead", "counted", "transfer_to", "warn_unable"]


@runtime_checkable
class Transfer(Protocol):
    """A way to move a batch to the device in two calls, with computation between them."""

    def start(self, raw: Any) -> Any:
        """Begin to move a batch; return the argument for `finish`. Must not wait for the device."""

    def finish(self, moving: Any) -> Any:
        """Return the batch on the device, for use on the current stream. Must not make the host wait."""


class BatchMover:
    """Moves batches to a device.

    Args:
        device: The device.
        groups: The accumulation groups, which are told before each batch of an epoch whether it is the last one.
        prefetch: ``False`` to move no batch ahead of time, also where that gains something; or a way to do it.
        channels_last: Whether tensors of shape ``(batch, channels, height, width)`` get the memory format in which
            convolutions are fast.
        lag: The number of batches after which values of the device are read; ``None`` for the default of the device.

    Attributes:
        needed: Whether a batch needs to be placed at all.
        lag: The number of batches after which values of the device are read.
        prefetches: Whether batches are moved ahead of time.
    """

    def __init__(
        self,
        device: torch.device,
        groups: Groups,
        *,
        prefetch: bool | Transfer | None = None,
        channels_last: bool = False,
        lag: int | None = None,
    ) -> None:
        self._device = device
        self._groups = groups
        # A method of this object here would hold the object through the transfer: learners would not be freed at once.
        self._arrived = _in_channels_last if channels_last else _stays
        self._ahead: Any = None  # the batch that `feed` gave last, which is on the device already
        self._transfer: Transfer | None = None
        if isinstance(prefetch, Transfer):
            self._transfer = prefetch
        elif prefetch is not False:
            self._transfer = transfer_to(device, self._arrived)
        self.prefetches = self._transfer is not None
        self.lag = lag if lag is not None else DEFAULT_LAG if has_streams(device) else 0
        self.needed = device.type != "cpu" or channels_last or self._transfer is not None

    def feed(self, batches: Iterable[Any], total: int | None) -> Iterable[Any]:
        """Return the batches of an epoch for its steps, and tell the groups which batch is the last one.

        Args:
            batches: The batches of the loader.
            total: The number of batches, if it is known. Without it the next batch is taken from the loader early, so
                that the last one is known as such.
        """
        if self._transfer is not None:
            return map(self._remember, ahead(batches, self._transfer, self._groups.note_last))
        if self._groups.size == 1:
            return batches  # every batch ends its group, so nobody needs to know the last one
        if total is None:
            return ahead(batches, None, self._groups.note_last)
        return counted(batches, total, self._groups.note_last)

    def _remember(self, raw: Any) -> Any:
        self._ahead = raw
        return raw

    def forget(self) -> None:
        """Drop the reference to the batch that was fed last: a step that never placed it has left it here."""
        self._ahead = None

    def place(self, data: Any) -> Any:
        """Return the data on the device: tensors in containers and dataclasses, and objects with ``.to(device)``."""
        placed, self._ahead = self._ahead, None
        if data is placed:
            return data
        return change_tensors(data, self._send, lambda item: item.to(self._device))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        sent: torch.Tensor = self._arrived(tensor.to(self._device, non_blocking=True))
        return sent


def _in_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the device in the memory format in which convolutions are fast."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def transfer_to(
    device: torch.device, arrived: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> Transfer | None:
    """Return the way in which batches get to a device ahead of time; ``None`` where that gains nothing.

    Args:
        device: The device.
        arrived: A function that is applied to each tensor on the device.
    """
    return StreamTransfer(device, arrived) if has_streams(device) else None


def warn_unable(device: torch.device, prefetch: bool | Transfer | None, lag: int | None) -> None:
    """Warn that an accelerator cannot do what the user has asked for. The defaults need no warning, nor does the CPU.

    Args:
        device: The device.
        prefetch: The setting of the user.
        lag: The setting of the user.
    """
    if device.type == "cpu" or has_streams(device):
        return
    found = f"on {device}, for which torch has no side streams or no pinned memory"
    if prefetch is True:
        warnings.warn(
            f"prefetch=True does nothing {found}: each batch is moved when its turn comes. Leave prefetch= out: then "
            f"batches are moved ahead of time on every device that can do it.",
            UserWarning,
            stacklevel=4,
        )
    if lag:
        warnings.warn(
            f"lag={lag} saves no time {found}: values are read {lag} batches late, and each read still waits for all "
            f"work of the device. Leave lag= out: then values are read late on every device that gains by it.",
            UserWarning,
            stacklevel=4,
        )


class StreamTransfer:
    """Copies batches on a stream of its own, from pinned memory.

    A tensor that the loader has pinned is copied as it is (``DataLoader(pin_memory=True)``); any other is pinned first.
    A loader that fills one pinned buffer again and again must not be used with it, since the copy may still be running.
    Objects with a ``to`` of their own are moved by it, on the current stream.

    Args:
        device: The device.
        arrived: A function that is applied to each tensor on the device.
    """

    def __init__(self, device: torch.device, arrived: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._device = device
        self._arrived = arrived
        self._stream = torch.Stream(device)

    def start(self, raw: Any) -> tuple[Any, list[torch.Tensor], Any]:
        """Begin the copies; return the batch, its tensors that are being copied, and the event of their end."""
        moved: list[torch.Tensor] = []

        def send(tensor: torch.Tensor) -> torch.Tensor:
            """Begin to copy one tensor, unless it is on a device."""
            if not tensor.is_cpu:
                return tensor
            if tensor.layout is torch.strided and not tensor.is_pinned():
                tensor = tensor.pin_memory()
            moved.append(self._arrived(tensor.to(self._device, non_blocking=True)))
            return moved[-1]

        with on_stream(self._stream):
            data = change_tensors(raw, send, _stays)
            return data, moved, self._stream.record_event()

    def finish(self, moving: tuple[Any, list[torch.Tensor], Any]) -> Any:
        """Let the current stream wait for the copies, and tell the allocator that it uses them."""
        data, moved, event = moving
        current = torch.accelerator.current_stream(self._device)
        current.wait_event(event)
        for tensor in moved:
            # Its memory belongs to the other stream, which would reuse it as soon as the last reference is gone.
            tensor.record_stream(current)
        return change_tensors(data, _stays, lambda item: item.to(self._device))


def _stays(item: Any) -> Any:
    return item


def ahead(batches: Iterable[Any], transfer: Transfer | None, tell: Callable[[bool], None]) -> Iterator[Any]:
    """Yield the batches on the device, each one after the loader was asked for the next one.

    Args:
        batches: The batches of the loader.
        transfer: The way in which they get to the device; ``None`` leaves them where they are.
        tell: Called before each batch is given, with whether the batch is the last one.
    """
    source = iter(batches)
    failure: list[Exception] = []

    def take() -> Any:
        """Return the next batch while it is being moved, or `END_OF_DATA`; keep an error of the loader for later."""
        try:
            raw = next(source, END_OF_DATA)
            return raw if transfer is None or raw is END_OF_DATA else transfer.start(raw)
        except Exception as raised:  # the batches before it are trained first
            failure.append(raised)
            return END_OF_DATA

    # Lists, whose items are popped: a variable here would keep the memory of a batch while the next one is computed.
    held = [take()]
    while held[0] is not END_OF_DATA:
        moving = held.pop()
        held.append(take())
        batch = [moving if transfer is None else transfer.finish(moving)]
        del moving
        tell(held[0] is END_OF_DATA and not failure)
        yield batch.pop()
    if failure:
        try:
            raise failure[0]
        finally:
            failure.clear()  # the frames of the exception hold this list


def counted(batches: Iterable[Any], total: int, tell: Callable[[bool], None]) -> Iterator[Any]:
    """Yield the batches as they are, and tell which one is the last of `total`, without asking for one early.

    Args:
        batches: The batches of the loader.
        total: The number of batches that the loader says it has.
        tell: As for `ahead`.
    """
    for number, raw in enumerate(batches, start=1):
        tell(number == total)
        yield raw
