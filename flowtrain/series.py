"""Series: values over time, that only grow; and series by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flowtrain.errors import nearest
from flowtrain.readonly import refuse

__all__ = ["Series", "SeriesMap"]


class Series:
    """Values with the step at which each was recorded, in order.

    Iterating gives ``(step, value)`` pairs; ``len`` is their number.

    >>> series = Series("cbstate.example")
    >>> series.push(0.5, step=1)
    >>> series.last()
    (1, 0.5)
    """

    __slots__ = ("_path", "_steps", "_values")

    def __init__(self, path: str) -> None:
        self._path = path
        self._steps: list[int] = []
        self._values: list[Any] = []

    def push(self, value: Any, step: int) -> None:
        """Append a value. A tensor with one element becomes a number; on an accelerator when it is first read.

        A tensor with more elements is copied, so that what is done to it later does not change what was recorded.
        """
        if type(value) is not float and isinstance(value, torch.Tensor):  # a float is the usual case, and quick to tell
            if value.numel() != 1:
                value = value.detach().clone()
            elif value.is_cpu:
                value = value.item()
            else:
                value = value.detach() if type(value) is torch.Tensor else value.detach().clone()
        self._values.append(value)
        self._steps.append(step)

    def last(self) -> tuple[int, Any]:
        """Return the newest ``(step, value)``.

        Raises:
            LookupError: The series is empty.
        """
        if not self._steps:
            raise LookupError(f"{self._path} is empty: nothing has been recorded yet. Test len() first.")
        value = self._values[-1] = self._settled(self._values[-1])
        return self._steps[-1], value

    def since(self, start: int) -> list[Any]:
        """Return the values from position `start` on, without their steps."""
        values = self._values[start:]
        if torch.Tensor in map(type, values):  # on an accelerator, where they are read now
            self._values[start:] = values = [self._settled(value) for value in values]
        return values

    def snapshot(self) -> int:
        """Return what `restore` needs to come back to here."""
        return len(self._steps)

    def restore(self, snapshot: int) -> None:
        """Take back what was recorded after a snapshot."""
        del self._values[snapshot:], self._steps[snapshot:]

    @staticmethod
    def _settled(value: Any) -> Any:
        return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value

    def __twin__(self) -> ReadOnlySeries:
        return ReadOnlySeries(self)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return zip(list(self._steps), self.since(0), strict=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._path}: {len(self)} values>"


class ReadOnlySeries(Series):
    """The twin of a series: it shows the live values and refuses to `push`."""

    __slots__ = ()

    def __init__(self, series: Series) -> None:
        self._path, self._steps, self._values = series._path, series._steps, series._values

    def push(self, value: Any, step: int) -> None:
        """Refuse."""
        raise refuse(self._path)

    def restore(self, snapshot: int) -> None:
        """Refuse."""
        raise refuse(self._path)


class SeriesMap(Mapping[str, Series]):
    """Series by name. `push` makes a series when its name is new."""

    __slots__ = ("_path", "_series")

    def __init__(self, path: str) -> None:
        self._path = path
        self._series: dict[str, Series] = {}

    def push(self, name: str, value: Any, step: int) -> None:
        """Append a value to the series `name`."""
        series = self._series.get(name)
        if series is None:
            series = self.series(name)
        series.push(value, step)

    def series(self, name: str) -> Series:
        """Return the series `name`, made if it is new."""
        return self._series.setdefault(name, Series(f"{self._path}.{name}"))

    def __twin__(self) -> ReadOnlySeriesMap:
        return ReadOnlySeriesMap(self)

    def snapshot(self) -> dict[str, Series]:
        """Return what `restore` needs to come back to here; the series themselves have snapshots of their own."""
        return dict(self._series)

    def restore(self, snapshot: Mapping[str, Series]) -> None:
        """Forget the series that came after a snapshot."""
        self._series.clear()
        self._series.update(snapshot)

    def __getitem__(self, name: str) -> Series:
        try:
            return self._series[name]
        except KeyError:
            known = ", ".join(self._series) or "none yet"
            raise KeyError(
                f"{self._path} has no series {name!r}; it has: {known}.{nearest(str(name), self._series)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._series))

    def __len__(self) -> int:
        return len(self._series)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._path}: {', '.join(self) or 'empty'}>"


class ReadOnlySeriesMap(SeriesMap):
    """The twin of a `SeriesMap`."""

    __slots__ = ()

    def __init__(self, series: SeriesMap) -> None:
        self._path, self._series = series._path, series._series

    def __getitem__(self, name: str) -> Series:
        return super().__getitem__(name).__twin__()

    def series(self, name: str) -> Series:
        """Return the twin of a series that is there."""
        return self[name]

    def push(self, name: str, value: Any, step: int) -> None:
        """Refuse."""
        raise refuse(f"{self._path}.{name}")

    def restore(self, snapshot: Mapping[str, Series]) -> None:
        """Refuse."""
        raise refuse(self._path)
