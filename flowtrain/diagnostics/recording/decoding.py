# pyright: reportPrivateUsage=false
# A series that is read from a file is filled past the checks of `push`.
"""The values of a recording, made again from the documents that `flowtrain.diagnostics.recording.encoding` makes.

A `Decoder` runs no code that a file names. It makes objects of the types of the format, and of classes that are loaded
already and are dataclasses, enumerations or containers; their constructors are not called.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import sys
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.data.nested import set_attributes
from flowtrain.diagnostics.recording.shown import RecordedModule
from flowtrain.errors import CheckpointError, LoggingError, UsageError
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.encoding import phase_of
from flowtrain.state.namespace import State
from flowtrain.state.series import Series, SeriesMap

__all__ = ["Decoder", "GivenSeries", "find_class"]


class GivenSeries(Series):
    """A series as the handler was given it. In another process it had no values before position `first`.

    Attributes:
        first: The position of the first value that is there; at the positions before it there is nothing to read.
    """

    __slots__ = ("_begin",)

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._begin = 0

    @property
    def first(self) -> int:
        """The position of the first value that is there."""
        return self._begin

    def put(self, start: int, total: int, dropped: int, steps: list[int], values: list[Any]) -> None:
        """Continue the series.

        Args:
            start: The position of the first of these values, counted from the first value that the series ever had.
            total: How many values the series has had.
            dropped: How many of them the writer has dropped.
            steps: The steps of the values.
            values: The values.

        Raises:
            ValueError: The numbers do not fit.
        """
        if not 0 <= dropped <= start <= total or total - start != len(steps) or len(steps) != len(values):
            raise ValueError(f"a series has {len(values)} values from {start} to {total}")
        keep = start - self.dropped  # those that are known and stay
        if keep < self._begin or keep > len(self._steps) or dropped < self.dropped:
            self._begin = start - dropped
            self._steps, self._values = [0] * self._begin, [None] * self._begin
        else:
            gone = dropped - self.dropped
            self._steps[keep:], self._values[keep:] = [], []
            del self._steps[:gone], self._values[:gone]
            self._begin = max(self._begin - gone, 0)
        self.dropped = dropped
        self._steps += steps
        self._values += values

    def since(self, start: int) -> list[Any]:
        """Return the values from position `start` on, without their steps.

        Raises:
            UsageError: Some of them are not in the recording.
        """
        if range(len(self))[start:].start < self._begin:
            self._refuse()
        return self._values[start:]

    def last(self) -> tuple[int, Any]:
        """Return the newest ``(step, value)``.

        Raises:
            LookupError: The series is empty.
        """
        if len(self) and len(self) <= self._begin:
            self._refuse()
        return super().last()

    def _pair(self, position: int) -> tuple[int, Any]:
        if position < self._begin:
            self._refuse()
        return super()._pair(position)

    def _refuse(self) -> NoReturn:
        raise UsageError(
            f"{self._path}: the values before position {self._begin} are not in the recording. The handler that was "
            f"recorded ran in another process, which gets the values since its previous event. Record it with "
            f'{{"{self._path.partition("/")[0]}": Read(full=True)}}, or with every=1.'
        )


class Decoder:
    """Makes the values of a recording, event by event: a series continues with each of them.

    Args:
        phases: The phases of the callback that is replayed, by name.
        model: A module into which the state of a recorded module is loaded; ``None`` shows the state alone.
    """

    def __init__(self, phases: Mapping[str, Phase] | None = None, model: torch.nn.Module | None = None) -> None:
        self._phases = phases or {}
        self._model = model
        self._series: dict[str, GivenSeries] = {}
        self._content: memoryview = memoryview(b"")
        self._tensors: dict[tuple[int, str, tuple[int, ...]], torch.Tensor] = {}

    def begin(self, content: memoryview) -> None:
        """Begin an event, whose documents refer to these bytes."""
        self._content = content
        self._tensors = {}

    def decode(self, document: Any) -> Any:
        """Return the value of a document.

        Raises:
            LoggingError: A class is not loaded.
            Exception: The document is none that `Encoder` makes; the caller says which file has it.
        """
        if isinstance(document, list):
            return [self.decode(each) for each in document]
        if not isinstance(document, dict):
            return document
        word = document["t"]
        if word in _PLAIN:
            return _PLAIN[word](document["v"])
        return _WORDS[word](self, document)

    def _bytes(self, at: list[int]) -> bytearray:
        place, size = at
        if type(place) is not int or type(size) is not int or not 0 <= place <= place + size <= len(self._content):
            raise ValueError(f"there are no bytes {at!r:.40}")
        return bytearray(self._content[place : place + size])

    def _tensor(self, document: dict[str, Any]) -> torch.Tensor:
        key = document["at"][0], document["dtype"], tuple(document["shape"])
        if key not in self._tensors or not self._tensors[key].numel():
            dtype = _dtype(document["dtype"])
            data = self._bytes(document["at"])
            flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
            self._tensors[key] = flat.reshape(key[2])
        return self._tensors[key]

    def _array(self, document: dict[str, Any]) -> Any:
        numpy: Any = importlib.import_module("numpy")
        kind = numpy.dtype(str(document["dtype"]))
        if kind.hasobject:
            raise ValueError("an array of objects")
        made = numpy.frombuffer(self._bytes(document["at"]), kind).reshape(document["shape"])
        return made if document["t"] == "array" else made[()]

    def _module(self, document: dict[str, Any]) -> Any:
        params = {name: self.decode(each) for name, each in document["params"]}
        buffers = {name: self.decode(each) for name, each in document["buffers"]}
        extra = self.decode(document["extra"])
        named = {**params, **buffers, **extra}
        state = {name: named[name] for name in self.decode(document["saved"])}
        recorded = RecordedModule(document["of"], params, buffers, state, bool(document["training"]))
        return recorded if self._model is None else recorded.load_into(self._model)

    def _parts(self, document: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(**{name: self.decode(each) for name, each in document["v"].items()})

    def _namespace(self, document: dict[str, Any]) -> State:
        made = State(document["path"])
        made.__rewind__({name: self.decode(each) for name, each in document["v"].items()})
        return made

    def _series_map(self, document: dict[str, Any]) -> SeriesMap:
        made = SeriesMap(document["path"])
        made.__rewind__({name: self.decode(each) for name, each in document["v"].items()})
        return made

    def _one_series(self, document: dict[str, Any]) -> GivenSeries:
        path = document["path"]
        made = self._series.setdefault(path, GivenSeries(path))
        steps, values = array("q", bytes(self._bytes(document["steps"]))).tolist(), document["values"]
        if "code" in document:
            if document["code"] not in ("d", "q"):
                raise ValueError(f"the code {document['code']!r:.40}")
            values = array(document["code"], bytes(self._bytes(values))).tolist()
        else:
            values = [self.decode(each) for each in values]
        made.put(document["from"], document["total"], document["dropped"], steps, values)
        return made

    def phase(self, name: str) -> Phase:
        """Return the phase of a name.

        Raises:
            LoggingError: No phase of that name is defined.
        """
        try:
            return phase_of(name, self._phases)
        except CheckpointError:
            raise LoggingError(
                f"The recording has the phase {name}, and no phase of that name is defined. Import the module that "
                f"defines class {name} in the module of your callback."
            ) from None

    def _by_phase(self, document: dict[str, Any]) -> PhaseMap[Any]:
        path, new = document["path"], document["new"]
        make = None if new is None else partial(_made_anew, new["v"], bytes.fromhex(new["content"]), self._phases)
        made: PhaseMap[Any] = PhaseMap(path, make)
        for name, each in document["v"].items():
            made[self.phase(name)] = self.decode(each)
        return made

    def _counts_map(self, document: dict[str, Any]) -> CountsMap:
        made = CountsMap(document["path"])
        made.update({self.phase(name): Counts(each) for name, each in document["v"].items()})
        return made

    def _dict(self, document: dict[str, Any]) -> Any:
        kind = self._class(document, dict)
        base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict  # the order is in no item of a plain dict
        made = defaultdict() if kind is defaultdict else base.__new__(kind)
        for key, value in zip(document["k"], document["v"], strict=True):
            base.__setitem__(made, self.decode(key), self.decode(value))
        return self._with_attributes(made, document)

    def _items(self, document: dict[str, Any]) -> Any:
        base = _SEQUENCES[document["t"]]
        items = [self.decode(each) for each in document["v"]]
        if base in (list, set, deque):
            made = base.__new__(self._class(document, base))
            getattr(base, "update" if base is set else "extend")(made, items)
            return self._with_attributes(made, document)
        kind = self._class(document, base)
        if hasattr(kind, "n_sequence_fields"):  # a type of C, such as those of `torch.max`
            return kind(items)
        return self._with_attributes(base.__new__(kind, items), document)

    def _object(self, document: dict[str, Any]) -> Any:
        kind = find_class(document["class"])
        if not (dataclasses.is_dataclass(kind) or issubclass(kind, (Event, SimpleNamespace))):
            raise ValueError(f"{document['class']} is no dataclass and no event")
        return self._with_attributes(object.__new__(kind), document)

    def _enum(self, document: dict[str, Any]) -> Any:
        kind = find_class(document["class"])
        if not issubclass(kind, enum.Enum):
            raise ValueError(f"{document['class']} is no enumeration")
        return kind[document["v"]]

    def _class(self, document: dict[str, Any], base: type) -> type:
        """Return the class of a container, which is derived from `base`."""
        kind = find_class(document["class"]) if "class" in document else base
        if not issubclass(kind, base):
            raise ValueError(f"{document['class']} is no {base.__name__}")
        return kind

    def _with_attributes(self, made: Any, document: dict[str, Any]) -> Any:
        if "own" in document:
            own = document["own"]
            set_attributes(made, dict(zip(own["k"], map(self.decode, own["v"]), strict=True)))
        return made


def _made_anew(document: Any, content: bytes, phases: Mapping[str, Phase]) -> Any:
    """Return the value that a new phase gets in a map by phase."""
    decoder = Decoder(phases)
    decoder.begin(memoryview(content))
    return decoder.decode(document)


def find_class(path: str) -> type:
    """Return a class by the name that `flowtrain.diagnostics.recording.encoding.class_path` gives.

    An event is also found by its name alone: a program that was recorded as ``__main__`` may now be a module.

    Raises:
        LoggingError: The class is not loaded.
    """
    module, _, name = path.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = None if found is None else vars(found).get(part)
    if isinstance(found, type):
        return found
    kinds: list[type[Event]] = [Event]
    for kind in kinds:
        kinds += kind.__subclasses__()
    named = [kind for kind in kinds if kind.__qualname__ == name]
    if named:
        return named[-1]
    raise LoggingError(
        f"The recording has an object of {name}, which is not loaded. Import it in the module of your callback: "
        f"import {module}. A replay imports nothing that a file names."
    )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name!r:.40}")
    return found


_SEQUENCES: Mapping[str, Any] = {kind.__name__: kind for kind in (list, tuple, deque, set, frozenset)}

_PLAIN: Mapping[str, Callable[[Any], Any]] = {
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "counts": Counts,
    "device": torch.device,
    "dtype": _dtype,
    "size": torch.Size,
}

_WORDS: Mapping[str, Callable[[Decoder, dict[str, Any]], Any]] = {
    "array": Decoder._array,
    "counts map": Decoder._counts_map,
    "dict": Decoder._dict,
    "enum": Decoder._enum,
    "module": Decoder._module,
    "object": Decoder._object,
    "parts": Decoder._parts,
    "phase": lambda decoder, document: decoder.phase(document["v"]),
    "phases": Decoder._by_phase,
    "scalar": Decoder._array,
    "series": Decoder._one_series,
    "series map": Decoder._series_map,
    "state": Decoder._namespace,
    "tensor": Decoder._tensor,
    **dict.fromkeys(_SEQUENCES, Decoder._items),
}
"""For each word of a document: the method that makes the value."""
