"""Series: values over time, and series by name.

A series grows. Its writer may drop its oldest values (`Series.shorten`), so that it does not grow for ever.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, cast, overload

import torch

from flowtrain.callback.access import Path
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import whole_number
from flowtrain.errors.describing import nearest
from flowtrain.state.container import Container, Freezer, Tree, declared_items
from flowtrain.state.device_values import Unread
from flowtrain.state.encoding import Packer
from flowtrain.state.readonly import refuse

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["ReadOnlySeries", "ReadOnlySeriesMap", "Series", "SeriesMap"]

_ITEM = 8
"""The bytes of a packed step or value."""

_MOST = 1 << 63
"""Steps are below this, since a checkpoint holds them with 64 bits."""

_CODES: dict[type | None, tuple[str, torch.dtype]] = {float: ("d", torch.float64), int: ("q", torch.int64)}
"""How values of a type are packed: the code of `array`, and the dtype."""


class _Packed:
    """The steps and values of a series as bytes: what is packed for one checkpoint is not packed again for the next.

    The tensors of a checkpoint that is being written share this memory. They do not change, because only the memory
    after them is filled; when it is full, twice as much takes its place.

    The values are all floats, or all whole numbers of 64 bits.
    """

    __slots__ = ("_count", "_kind", "_steps", "_values")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the series. The memory is left to the tensors that share it."""
        self._count = 0
        self._kind: type | None = None  # the type of the values
        self._steps, self._values = bytearray(), bytearray()

    def grown(self, steps: list[int], values: list[Any]) -> dict[str, Any] | None:
        """Return the whole series as two tensors of length n; ``None`` if it is empty or has other values."""
        new, count = values[self._count :], len(values)
        if not self._count and new:
            self._kind = type(new[0])
        kind = self._kind
        if kind not in _CODES or any(type(value) is not kind for value in new):
            return None
        code, dtype = _CODES[kind]
        try:
            packed = array(code, new).tobytes()
        except OverflowError:  # a whole number of more than 64 bits
            return None
        begin, end = _ITEM * self._count, _ITEM * count
        if end > len(self._steps):
            self._steps, self._values = _larger(self._steps, begin, 2 * end), _larger(self._values, begin, 2 * end)
        self._steps[begin:end] = array("q", steps[self._count :]).tobytes()
        self._values[begin:end] = packed
        self._count = count
        return {
            "steps": torch.frombuffer(memoryview(self._steps)[:end], dtype=torch.int64),
            "values": torch.frombuffer(memoryview(self._values)[:end], dtype=dtype),
        }


def _larger(memory: bytearray, begin: int, size: int) -> bytearray:
    """Return a buffer of `size` bytes whose first `begin` bytes are those of another one."""
    made = bytearray(size)
    made[:begin] = memoryview(memory)[:begin]
    return made


class Series(Container):
    """Values with the step at which each was recorded, in order.

    It is a sequence of ``(step, value)`` pairs: iterating and indexing give pairs, a slice gives a list of pairs, and
    ``numpy.asarray`` and ``torch.as_tensor`` give an array of shape ``(n, 2)``. `steps` and `values` are lists of the
    one and the other. Two series are equal if they are the same object; compare ``list(series)`` for their content.
    ``copy.copy`` gives a series of one's own. Values of a device stay there, at most 256 of them, until they are read:
    to read them is to wait for the device.

    Attributes:
        dropped: How many older values the writer has dropped by `shorten`; positions and ``len`` are without these.

    Args:
        path: Where it lives, for messages.
        late: Treat tensors on the CPU as those of a device (``TorchCore(lag=...)`` on the CPU).

    >>> series = Series("cbstate.example")
    >>> series.push(0.5, step=1)
    >>> series.push(0.25, step=2)
    >>> series.last(), series[0], series[1:]
    ((2, 0.25), (1, 0.5), [(2, 0.25)])
    >>> series.steps, series.values
    ([1, 2], [0.5, 0.25])
    """

    __slots__ = ("_late", "_packed", "_path", "_steps", "_unread", "_values", "dropped")
    __kind__ = "series"

    rewound: ClassVar[int] = 0
    """How often a series was shortened or removed: by its writer, by undoing a change, or by loading a checkpoint."""

    def __init__(self, path: str, late: bool = False) -> None:
        self._path = path
        self._late = late
        self._steps: list[int] = []
        self._values: list[Any] = []
        self._unread = Unread()
        self._packed = _Packed()
        self.dropped = 0

    def push(self, value: Any, step: int) -> None:
        """Append a value. A tensor with one element becomes a number; on an accelerator when it is first read.

        A number of NumPy becomes one of Python, as it would in a checkpoint. A tensor with more elements is copied, so
        that a later change of it in place does not change the series.

        Args:
            value: The value.
            step: The number of the batch or epoch, a whole number from 0, of at most 64 bits.

        Raises:
            UsageError: `step` is no such number. A checkpoint could not hold it, and would fail much later.
        """
        if type(step) is not int or not 0 <= step < _MOST:
            step = self._checked(step)
        if type(value) is not float:  # a float is the usual case, and quick to tell
            if not isinstance(value, torch.Tensor):
                if getattr(value, "shape", None) == ():
                    value = value.item()
            elif value.numel() != 1:
                value = value.detach().clone()
            elif value.is_cpu and not self._late:
                value = value.item()
            else:
                value = value.detach() if type(value) is torch.Tensor else value.detach().clone()
                self._values.append(value)
                self._steps.append(step)
                self._unread.add(self._values)
                return
        self._values.append(value)
        self._steps.append(step)

    def _checked(self, step: object) -> int:
        """Return a step as an ``int``; raise a `UsageError` for any other value than a whole number of 64 bits."""
        number = whole_number(f"{self._path}: the step of push()", step, least=0)
        if number >= _MOST:
            raise UsageError(f"{self._path}: the step of push() has at most 64 bits, got {number}. Number the batches.")
        return number

    def shorten(self, keep: int) -> None:
        """Drop the oldest values, so that `keep` are left, once there are twice as many.

        Dropping them rarely costs next to nothing for each value. If values are on a device, this waits for them.
        """
        excess = len(self._steps) - keep
        if excess < keep:
            return
        if self._unread:
            self._unread.read_all(self._values)
        # New lists, because the snapshots of deferred events show the values of the present ones.
        self._steps, self._values = self._steps[excess:], self._values[excess:]
        self._unread, self._packed = Unread(), _Packed()
        self.dropped += excess
        Series.rewound += 1

    def last(self) -> tuple[int, Any]:
        """Return the newest ``(step, value)``.

        Raises:
            LookupError: The series is empty.
        """
        if not self._steps:
            raise LookupError(f"{self._path} is empty: nothing has been recorded yet. Test len() first.")
        if self._unread:
            self._unread.read_one(self._values, len(self._values) - 1)
        return self._steps[-1], self._values[-1]

    @property
    def steps(self) -> list[int]:
        """The steps, in order; a list of one's own."""
        return [step for step, _ in self]

    @property
    def values(self) -> list[Any]:
        """The values, in order; a list of one's own."""
        return [value for _, value in self]

    @property
    def first(self) -> int:
        """The position of the first value that can be read; above 0 only in a snapshot for another process."""
        return 0

    def newest(self) -> Any:
        """Return the newest value without waiting for it: a tensor of one element if it is on a device."""
        if self._values[-1] is None and self._unread:  # it went with a chunk
            return self.last()[1]
        return self._values[-1]

    def since(self, start: int) -> list[Any]:
        """Return the values from position `start` on, without their steps."""
        if self._unread:
            self._unread.read_all(self._values)
        return self._values[start:]

    def __twin__(self) -> ReadOnlySeries:
        return ReadOnlySeries(self)

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> Series:
        return self.__copy__()

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        # A long history of numbers is written and read much faster as tensors, and packed once: a checkpoint converts
        # the values since the one before, however long the series is.
        if self._unread:
            self._unread.read_all(self._values)
        packed = self._packed.grown(self._steps, self._values)
        if packed is None:
            packed = {"steps": packer.copy(self._steps, path), "values": packer.copy(self.since(0), path)}
        return {**packed, "dropped": self.dropped} if self.dropped else packed

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        self.__rewind__(0)
        for name, column in ("steps", self._steps), ("values", self._values):
            values = content.get(name, ())
            column.extend(values.tolist() if isinstance(values, torch.Tensor) else values)
        self.dropped = content.get("dropped", 0)

    def __mark__(self) -> int:
        return self.dropped + len(self)

    def __rewind__(self, mark: int) -> None:
        start = max(mark - self.dropped, 0)
        if self._unread:
            self._unread.forget(self._values, start)
        Series.rewound += 1
        del self._values[start:], self._steps[start:]  # in place, because snapshots share the lists
        self._packed.clear()  # a checkpoint that is being written may hold the memory, so it is not written again

    def __leaves__(self, fingerprint: Callable[[Any], object]) -> Iterator[tuple[Path, object]]:
        if len(self):
            yield (), (id(self), len(self), repr(self.last()))

    def __getstate__(self) -> object:
        self.since(0)  # a copy or a pickle holds no values of a device
        _, state = cast("tuple[None, dict[str, Any]]", object.__getstate__(self))
        return None, {**state, "_packed": _Packed()}

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return zip(list(self._steps), self.since(0), strict=False)

    @overload
    def __getitem__(self, index: int) -> tuple[int, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, Any]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, Any] | list[tuple[int, Any]]:
        if isinstance(index, slice):
            return list(self)[index]
        length = len(self)
        try:
            position = range(length)[index]
        except IndexError:
            raise IndexError(f"{self._path} has {length} values, and none at position {index}.") from None
        except TypeError:
            raise TypeError(
                f"{self._path}[{index!r}]: a series is indexed by position, as in [0], [-1] or [2:5]."
            ) from None
        return self._pair(position)

    def _pair(self, position: int) -> tuple[int, Any]:
        if self._unread:
            self._unread.read_all(self._values)
        return self._steps[position], self._values[position]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the pairs as an array of shape ``(n, 2)``: the steps in the first column, the values in the second.

        Raises:
            ValueError: A value is no number, or ``copy=False``: the array is always a new one.
        """
        import numpy as np

        if copy is False:
            raise ValueError(f"{self._path}: the array of a series is a new one. Leave out copy=False.")
        pairs = list(self)
        if any(getattr(value, "ndim", 0) for _, value in pairs):
            raise ValueError(f"{self._path} holds tensors, so it is no table of numbers. Use its .steps and .values.")
        return np.array(pairs, dtype=dtype).reshape(len(pairs), 2)

    def __copy__(self) -> Series:
        copy = Series(self._path, self._late)
        copy._steps, copy._values, copy.dropped = self.steps, self.values, self.dropped
        return copy

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._path}: {len(self)} values>"


class ReadOnlySeries(Series):
    """The twin of a series: it shows the live values and refuses to change them."""

    __slots__ = ("_of",)

    def __init__(self, series: Series) -> None:
        self._of = series

    def push(self, value: Any, step: int) -> None:
        """Refuse."""
        raise refuse(self._path)

    def shorten(self, keep: int) -> None:
        """Refuse."""
        raise refuse(self._path)

    def __reduce__(self) -> tuple[Any, ...]:
        _, state = cast("tuple[None, dict[str, Any]]", self.__getstate__())
        return Series, (self._path,), (None, {name: value for name, value in state.items() if name != "_of"})


for _name in Series.__slots__:  # the twin has no lists of its own, because `shorten` replaces those of the series
    setattr(ReadOnlySeries, _name, property(attrgetter(f"_of.{_name}")))


class SeriesMap(Container, Mapping[str, Series]):
    """Series by name. `push` makes a series when its name is new."""

    __slots__ = ("_late", "_path", "_series")
    __kind__ = "by name"

    def __init__(self, path: str, late: bool = False) -> None:
        self._path = path
        self._late = late
        self._series: dict[str, Series] = {}

    def push(self, name: str, value: Any, step: int) -> None:
        """Append a value to the series `name`."""
        series = self._series.get(name)
        if series is None:
            series = self.series(name)
        series.push(value, step)

    def series(self, name: str) -> Series:
        """Return the series `name`, made if it is new."""
        return self._series.setdefault(name, Series(f"{self._path}.{name}", self._late))

    def __twin__(self) -> ReadOnlySeriesMap:
        return ReadOnlySeriesMap(self)

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> SeriesMap:
        made = SeriesMap(self._path)
        made._series = {name: freezer.copy(self._series[name]) for name, _ in declared_items(self, inside)}
        return made

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        return {name: packer.pack(series, f"{path}.{name}") for name, series in self._series.items()}

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        for name in {**self._series, **content}:  # a series without content is emptied and not dropped: views hold it
            self.series(name).__fill__(content.get(name, {}).get(Series.__kind__, {}), phases)

    def __mark__(self) -> dict[str, Series]:
        return dict(self._series)

    def __rewind__(self, mark: Mapping[str, Series]) -> None:
        Series.rewound += 1
        self._series.clear()
        self._series.update(mark)

    def __leaves__(self, fingerprint: Callable[[Any], object]) -> Iterator[tuple[Path, object]]:
        for name, series in self._series.items():
            for _, leaf in series.__leaves__(fingerprint):
                yield tuple(name.split(".")), leaf

    def __getitem__(self, name: str) -> Series:
        try:
            return self._series[name]
        except KeyError:
            known = ", ".join(self._series) or "none yet"
            raise KeyError(
                f"{self._path} has no series {name!r}; it has: {known}.{nearest(str(name), self._series)}"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._series

    def get(self, name: Any, default: Any = None) -> Any:
        """Return a series, or the default."""
        if name in self:
            return self[name]
        return default

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
        self._path, self._late, self._series = series._path, series._late, series._series

    def __getitem__(self, name: str) -> Series:
        return super().__getitem__(name).__twin__()

    def series(self, name: str) -> Series:
        """Return the twin of a series that is there."""
        return self[name]

    def push(self, name: str, value: Any, step: int) -> None:
        """Refuse."""
        raise refuse(f"{self._path}.{name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return SeriesMap, (self._path,), object.__getstate__(self)
