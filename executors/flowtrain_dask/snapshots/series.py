# pyright: reportPrivateUsage=false
# The classes here are kinds of series, made from the lists of another one.
"""Series as they were: what a snapshot holds of what only grows.

In this process a `Cut` shows the first values of the live series: to make one takes the same time however long the
series is. Another process gets a `Tail`: the number of values, the newest, and those since the handler's last event.
Values that are on a device are not waited for before somebody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from flowtrain.errors import UsageError
from flowtrain.state.device_values import Reading
from flowtrain.state.readonly import refuse
from flowtrain.state.series import Series

__all__ = ["Cut", "Tail", "tail_of"]


class _Frozen(Series):
    """What both share: nothing can be added."""

    __slots__ = ("_length",)

    _length: int

    def __twin__(self) -> Any:
        return self

    def push(self, value: Any, step: int) -> None:
        """Refuse."""
        raise refuse(self._path)

    def snapshot(self) -> int:
        """Return the number of values."""
        return self._length

    def restore(self, snapshot: int) -> None:
        """Refuse."""
        raise refuse(self._path)

    def load_state_dict(self, state: Any) -> None:
        """Refuse."""
        raise refuse(self._path)

    def state_dict(self) -> dict[str, list[Any]]:
        """Return the steps and the values."""
        pairs = list(self)
        return {"steps": [step for step, _ in pairs], "values": [value for _, value in pairs]}

    def newest(self) -> Any:
        """Return the newest value."""
        return self.last()[1]

    def last(self) -> tuple[int, Any]:
        """Return the newest ``(step, value)``.

        Raises:
            LookupError: The series is empty.
        """
        if not self._length:
            raise LookupError(f"{self._path} is empty: nothing has been recorded yet. Test len() first.")
        return self._newest()

    def _newest(self) -> tuple[int, Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return self._length


class Cut(_Frozen):
    """The first values of a series that goes on growing.

    Args:
        series: The series.
        length: How many of its values are shown; all that it has now, if not given.
    """

    __slots__ = ()

    def __init__(self, series: Series, length: int | None = None) -> None:
        # The lists themselves: the training thread appends to them and does not change what is there.
        self._path, self._steps, self._values = series._path, series._steps, series._values
        self._late, self._unread = series._late, series._unread
        self._length = len(series) if length is None else length

    def since(self, start: int) -> list[Any]:
        """Return the values from position `start` on, without their steps."""
        if self._unread:
            self._unread.settle(self._values)
        return self._values[range(self._length)[start:].start : self._length]

    def _newest(self) -> tuple[int, Any]:
        if self._unread:
            self._unread.settle_one(self._values, self._length - 1)
        return self._steps[self._length - 1], self._values[self._length - 1]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return zip(self._steps[: self._length], self.since(0), strict=True)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _cut, (self._path, self._steps[: self._length], self.since(0))


class Tail(_Frozen):
    """The newest values of a series, without what came before.

    Args:
        series: The series.
        start: From which position on its values are kept; the newest one always is.
    """

    __slots__ = ("_reading", "_start")

    def __init__(self, series: Series, start: int) -> None:
        self._path = series._path
        self._length = len(series)
        self._start = min(start, max(self._length - 1, 0))
        self._steps = series._steps[self._start :]
        self._values = series._values[self._start :]
        self._reading: tuple[list[int], Reading] | None = None
        if series._unread:
            self._begin(series)

    def since(self, start: int) -> list[Any]:
        """Return the values from position `start` on, without their steps.

        Raises:
            UsageError: They are not all here.
        """
        first = range(self._length)[start:].start
        if first < self._start:
            self._refuse(f"since({start}) asks for values from position {first} on")
        return self._arrived()[first - self._start :]

    def _newest(self) -> tuple[int, Any]:
        return self._steps[-1], self._arrived()[-1]

    def _pair(self, position: int) -> tuple[int, Any]:
        if position < self._start:
            self._refuse(f"position {position} is asked for")
        return self._steps[position - self._start], self._arrived()[position - self._start]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self._refuse("it is iterated over")

    def _begin(self, series: Series) -> None:
        """Send values that are on a device on their way, without waiting for them."""
        if None in self._values:
            self._values = series.since(self._start)  # on their way already: there is nothing to hold on to
        places = [
            place for place, value in enumerate(self._values) if isinstance(value, torch.Tensor) and value.numel() == 1
        ]
        if places:
            self._reading = (places, Reading([self._values[place] for place in places]))

    def _arrived(self) -> list[Any]:
        if self._reading is not None:
            places, reading = self._reading
            for place, number in zip(places, reading.numbers(), strict=True):
                self._values[place] = number
            self._reading = None
        return self._values

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"{self._path}: {what}, but the handler runs in another process, which gets len(), .last() and the values "
            f"since the handler's last event: those from position {self._start} on. Declare "
            f'{{"{self._path}": Read(full=True)}}, and the callback stays in the process that trains.'
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return tail_of, (self._path, self._length, self._start, self._steps, self._arrived())


def _cut(path: str, steps: list[int], values: list[Any]) -> Cut:
    series = Series(path)
    series._steps, series._values = steps, values
    return Cut(series)


def tail_of(path: str, length: int, start: int, steps: list[int], values: list[Any]) -> Tail:
    """Return a `Tail` of the steps and values from position `start` on."""
    tail = Tail.__new__(Tail)
    tail._path, tail._length, tail._start, tail._steps, tail._values = path, length, start, steps, values
    tail._reading = None
    return tail
