"""Placement: batches on the device of a core, one by one (`place`) or an epoch of them, ahead of time (`feed`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from flowtrain.core.accumulation import Groups
from flowtrain.core.devices import rebuild
from flowtrain.core.prefetch import Transfer, ahead, counted, transfer_to
from flowtrain.core.settings import Settings
from flowtrain.state.device_values import DEFAULT_LAG

__all__ = ["Placement"]


class Placement:
    """How batches get to a device.

    Args:
        settings: What the core was told.
        device: Where to.
        groups: The accumulation groups, which are told before each batch of an epoch whether it is the last.

    Attributes:
        needed: Whether a batch is to be placed at all.
        lag: After how many batches values are read from there.
    """

    def __init__(self, settings: Settings, device: torch.device, groups: Groups) -> None:
        self._device = device
        self._groups = groups
        self._ends_groups = settings.accumulate > 1
        self._channels_last = settings.channels_last
        self._fed: Any = None
        self._transfer: Transfer | None = None
        if isinstance(settings.prefetch, Transfer):
            self._transfer = settings.prefetch
        elif settings.prefetch:
            self._transfer = transfer_to(device, self._arrived)
        self.lag = settings.lag if settings.lag is not None else DEFAULT_LAG if device.type != "cpu" else 0
        self.needed = device.type != "cpu" or settings.channels_last or self._transfer is not None
        if settings.tf32 is not None and device.type == "cuda":
            torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = settings.tf32

    def feed(self, batches: Iterable[Any], total: int | None) -> Iterable[Any]:
        """Return the batches of an epoch as its steps get them: ahead on the device, the last one known as such.

        Args:
            batches: What the loader gives.
            total: How many that are, if it is known.
        """
        if self._transfer is not None:
            return map(self._remember, ahead(batches, self._transfer, self._tell))
        if not self._ends_groups:
            return batches
        if total is None:
            return ahead(batches, None, self._tell)
        return counted(batches, total, self._tell)

    def _tell(self, last: bool) -> None:
        self._groups.last_batch = last

    def _remember(self, raw: Any) -> Any:
        self._fed = raw
        return raw

    def forget(self) -> None:
        """Hold no batch any more."""
        self._fed = None

    def place(self, data: Any) -> Any:
        """Return the data on the device: tensors in containers and dataclasses, and objects with ``.to(device)``."""
        fed, self._fed = self._fed, None
        if data is fed:
            return data  # it came ahead
        return rebuild(data, self._send, lambda item: item.to(self._device))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._arrived(tensor.to(self._device, non_blocking=True))

    def _arrived(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._channels_last and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor
