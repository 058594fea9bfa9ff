"""Values of the device, which the host reads a fixed number of batches late.

Reading a number from a device waits until the device has computed everything that it was given. So code that displays,
records or decides reads values that are *lag* batches old: their copy to the host began when they were new, and has
ended since. The lag is a fixed number of batches, and never "when the copy is ready", so that a run can be repeated.

- `Reading` holds values that are being copied to the host, through pinned memory, on the current stream.
- `Lagged` returns every value as a number, a fixed number of values later.
- `Unread` holds the positions of the values of a series that are still on the device, at most `CHUNK` of them.

On the CPU nothing has to wait, so the lag is 0. ``TorchCore(lag=2)`` makes the library treat the CPU as a device, so
that tests without an accelerator take the same way.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flowtrain.state.accelerator import has_streams

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["CHUNK", "DEFAULT_LAG", "Lagged", "Reading", "Unread", "reading", "watched_waits"]

DEFAULT_LAG = 2
"""The number of batches between a value on a device and its use on the host."""

CHUNK = 256
"""The largest number of values of one series that stay on the device."""

_depth = 0  # how many calls of the library itself are reading a number now
# A lane may read a series while the training thread writes it. One lock serves all series, as it is rarely contended.
_lock = threading.RLock()
_watches: dict[object, Callable[[int, int], None]] = {}  # several fits may be watched at a time, in threads


@contextmanager
def watched_waits(watch: Callable[[int, int], None]) -> Generator[None]:
    """Return a context in which a function is told of each wait of the host for the device that the library makes.

    Args:
        watch: Called on the thread that has waited, with the begin and the end in ns of `time.perf_counter_ns`.
    """
    key = object()
    _watches[key] = watch
    try:
        yield
    finally:
        del _watches[key]


def reading() -> bool:
    """Tell whether the library itself reads a number now; `flowtrain.diagnostics.sync_audit` leaves that read out."""
    return _depth > 0


@contextmanager
def _own_read() -> Generator[None]:
    """Return a context in which `reading` is true."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


class Reading:
    """Tensors of one element each that are being copied to the host.

    Args:
        values: The tensors. Their present values are copied, whatever is written into them later.
    """

    __slots__ = ("_count", "_done", "_parts")

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}  # one copy for all tensors of a kind
        for position, value in enumerate(values):
            by_kind.setdefault((value.dtype, value.device), []).append(position)
        self._count = len(values)
        self._parts: list[tuple[list[int], torch.Tensor]] = []
        self._done: list[torch.Event] = []
        for positions in by_kind.values():
            # Stacked first: one copy of many values takes as long as one of a single value.
            flat = [values[position].detach().reshape(()) for position in positions]
            self._parts.append((positions, self._send(flat[0] if len(flat) == 1 else torch.stack(flat), len(flat))))

    def _send(self, source: torch.Tensor, count: int) -> torch.Tensor:
        """Begin to copy the values of one kind to the host, and return the tensor in which they arrive."""
        if has_streams(source.device):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source, non_blocking=True)
            self._done.append(torch.accelerator.current_stream(source.device).record_event())
            return host
        # A stack is a copy already. On a device without pinned memory `numbers` has to wait for the computation.
        return source.clone() if count == 1 else source

    def numbers(self) -> list[Any]:
        """Return the values as Python numbers, in the order given. Waits for their copy, and for no later work."""
        begin = time.perf_counter_ns() if _watches else 0
        for done in self._done:
            done.synchronize()
        numbers: list[Any] = [None] * self._count
        with _own_read():
            for positions, host in self._parts:
                for position, number in zip(positions, host.reshape(-1).tolist(), strict=True):
                    numbers[position] = number
        if begin:
            end = time.perf_counter_ns()
            for watch in list(_watches.values()):
                watch(begin, end)
        return numbers


class Lagged:
    """Returns each value as a number, `lag` values later.

    Args:
        lag: The number of values that are being copied at a time.

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
        """Begin to read a value; return the tag and the number of the value `lag` values ago, or ``None``.

        Args:
            value: A tensor of one element.
            tag: Any object, which is returned with the number of this value.
        """
        self._waiting.append((tag, Reading([value])))
        return self._next() if len(self._waiting) > self.lag else None

    def flush(self) -> list[tuple[Any, Any]]:
        """Return the tags and numbers of all values that are still being copied."""
        return [self._next() for _ in range(len(self._waiting))]

    def _next(self) -> tuple[Any, Any]:
        tag, value = self._waiting.popleft()
        return tag, value.numbers()[0]


class Unread:
    """The positions of the values of a series that are on the device, or are being copied from it.

    The copy of a chunk begins when the chunk is full. Its numbers are put into the series when the next chunk is full,
    or when a value is read. The methods take the list of values that the series holds.

    Readers test without the lock whether any value is unread. So an object is true until every value has its number.
    """

    __slots__ = ("_moving", "_positions")

    def __init__(self) -> None:
        self._positions: list[int] = []
        self._moving: tuple[list[int], Reading] | None = None

    @classmethod
    def sent(cls, values: list[Any]) -> Unread:
        """Begin to copy all tensors of one element in a list, and return their positions."""
        sent = cls()
        sent._positions = [at for at, each in enumerate(values) if isinstance(each, torch.Tensor) and each.numel() == 1]
        if sent._positions:
            sent._leave(values)
        return sent

    def add(self, values: list[Any]) -> None:
        """Note the position of the newest value, a tensor of one element."""
        with _lock:
            self._positions.append(len(values) - 1)
            if len(self._positions) >= CHUNK:
                self._arrive(values)  # the copy of the chunk before has ended long ago
                self._leave(values)

    def read_all(self, values: list[Any]) -> None:
        """Replace all tensors by numbers. Waits for the device if there are any."""
        with _lock:
            self._arrive(values)
            if self._positions:
                self._leave(values)
                self._arrive(values)

    def read_one(self, values: list[Any], position: int) -> None:
        """Replace the tensor at one position by a number, if it is one. Waits for the device then."""
        with _lock:
            if position in self._positions:
                values[position] = Reading([values[position]]).numbers()[0]
                self._positions.remove(position)
            else:
                self._arrive(values)

    def forget(self, values: list[Any], start: int) -> None:
        """Forget the values from a position on, because the series is about to delete them."""
        with _lock:
            self._arrive(values)
            self._positions = [position for position in self._positions if position < start]

    def __bool__(self) -> bool:
        return bool(self._positions) or self._moving is not None

    def _leave(self, values: list[Any]) -> None:
        """Begin to copy all values that are on the device."""
        positions = self._positions
        self._moving = (positions, Reading([values[position] for position in positions]))
        self._positions = []
        for position in positions:
            values[position] = None  # frees the memory on the device

    def _arrive(self, values: list[Any]) -> None:
        """Put the numbers of the chunk that is being copied into the series."""
        if self._moving is not None:
            positions, numbers = self._moving
            for position, number in zip(positions, numbers.numbers(), strict=True):
                values[position] = number
            self._moving = None
