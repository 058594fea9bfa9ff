"""Values of the device, read a fixed number of batches late.

To read a number from a device is to wait until it has computed everything that it was given. So what only displays,
records or decides reads values that are *lag* batches old: their copy to the host was begun when they were new, and is
done by then. How many batches is fixed, never "when it is ready", so that a run does the same again.

- `Reading`: values on their way to the host, through pinned memory, on the current stream.
- `Lagged`: gives every value back as a number, a fixed number of values later.
- `Kept`: the values of a series that are still on the device, at most `CHUNK` of them.

On the CPU nothing has to wait, so the lag is 0. ``TorchCore(lag=2)`` makes the library treat the CPU as a device, which
shows without one what a device would do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["CHUNK", "DEFAULT_LAG", "Kept", "Lagged", "Reading", "reading"]

DEFAULT_LAG = 2
"""Batches between a value on a device and its use on the host."""

CHUNK = 256
"""How many values of one series are on the device at most."""

_depth = 0
_lock = threading.RLock()  # a lane reads a series that the training thread writes; one for all, as it is rarely wanted


def reading() -> bool:
    """Tell whether the library itself reads numbers that it has waited for; see `flowtrain.diagnostics.sync_audit`."""
    return _depth > 0


@contextmanager
def _own() -> Generator[None]:
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


class Reading:
    """Values of one element each, on their way to the host.

    Args:
        values: Tensors; their values of now are read, whatever is written into them later.
    """

    __slots__ = ("_count", "_done", "_parts")

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for position, value in enumerate(values):
            by_kind.setdefault((value.dtype, value.device), []).append(position)
        self._count = len(values)
        self._parts: list[tuple[list[int], torch.Tensor]] = []
        self._done: list[torch.cuda.Event] = []
        for positions in by_kind.values():
            flat = [values[position].detach().reshape(()) for position in positions]
            self._parts.append((positions, self._send(flat[0] if len(flat) == 1 else torch.stack(flat), len(flat))))

    def _send(self, source: torch.Tensor, count: int) -> torch.Tensor:
        if source.is_cuda:
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(source.device))
            self._done.append(done)
            return host
        # A stack is a copy already. Other accelerators have no pinned memory here: they wait in `numbers`.
        return source.clone() if count == 1 else source

    def numbers(self) -> list[Any]:
        """Return the values as Python numbers, in the order given; waits for their copy alone."""
        for done in self._done:
            done.synchronize()
        found: list[Any] = [None] * self._count
        with _own():
            for positions, host in self._parts:
                for position, number in zip(positions, host.reshape(-1).tolist(), strict=True):
                    found[position] = number
        return found


class Lagged:
    """Gives each value back as a number, `lag` values later.

    Args:
        lag: How many values are on their way.

    >>> late = Lagged(2)
    >>> [late.push(torch.tensor(number), name) for number, name in ((1, "a"), (2, "b"), (3, "c"))]
    [None, None, ('a', 1)]
    >>> late.flush()
    [('b', 2), ('c', 3)]
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[Any, Reading]] = deque()

    def push(self, value: torch.Tensor, tag: Any = None) -> tuple[Any, Any] | None:
        """Begin to read a value; return the tag and the number of the one `lag` values ago, if there is one."""
        self._waiting.append((tag, Reading([value])))
        return self._next() if len(self._waiting) > self.lag else None

    def flush(self) -> list[tuple[Any, Any]]:
        """Return the tags and numbers of all that are on their way."""
        return [self._next() for _ in range(len(self._waiting))]

    def _next(self) -> tuple[Any, Any]:
        tag, value = self._waiting.popleft()
        return tag, value.numbers()[0]


class Kept:
    """Which values of a series are on the device, or on their way from it.

    A full chunk is begun to be read as one; its numbers are put into the series when the next chunk is full, or when
    somebody asks.
    """

    __slots__ = ("_moving", "_positions")

    def __init__(self) -> None:
        self._positions: list[int] = []
        self._moving: tuple[list[int], Reading] | None = None

    def add(self, values: list[Any]) -> None:
        """Take notice of the newest value, a tensor of one element."""
        with _lock:
            self._positions.append(len(values) - 1)
            if len(self._positions) >= CHUNK:
                self._arrive(values)
                self._leave(values)

    def settle(self, values: list[Any]) -> None:
        """Make numbers of all values; waits for the device if there are any."""
        with _lock:
            self._arrive(values)
            if self._positions:
                self._leave(values)
                self._arrive(values)

    def settle_one(self, values: list[Any], position: int) -> None:
        """Make a number of one value."""
        with _lock:
            if position in self._positions:
                self._positions.remove(position)
                values[position] = Reading([values[position]]).numbers()[0]
            else:
                self._arrive(values)

    def forget(self, values: list[Any], start: int) -> None:
        """Forget the values from a position on, which are about to be deleted."""
        with _lock:
            self._arrive(values)
            self._positions = [position for position in self._positions if position < start]

    def __bool__(self) -> bool:
        return bool(self._positions) or self._moving is not None

    def _leave(self, values: list[Any]) -> None:
        positions, self._positions = self._positions, []
        self._moving = (positions, Reading([values[position] for position in positions]))
        for position in positions:
            values[position] = None  # lets go of the device's memory

    def _arrive(self, values: list[Any]) -> None:
        if self._moving is not None:
            (positions, numbers), self._moving = self._moving, None
            for position, number in zip(positions, numbers.numbers(), strict=True):
                values[position] = number
