# pyright: reportPrivateUsage=false
# A table at the end has the methods of the encoder.
"""The values of a recording as data: a document of JSON, and bytes to which the document refers.

`Encoder` makes the document of a value, and `flowtrain.diagnostics.recording.decoding` makes the value again. Texts,
numbers and lists are themselves in a document. Any other value is an object of JSON whose ``t`` is one of the words of
the methods of `Encoder`. Objects of a user's classes are named by module and class. A reader
finds them among the modules that are loaded, so that a file never decides which code is imported.

The series of a history only grow, so each event has the values since the event before it (`Encoder.series`).
"""

from __future__ import annotations

import dataclasses
import enum
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import nn

from flowtrain.callback.access import Read, Write
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.data.nested import attributes
from flowtrain.data.tensor_bytes import tensor_bytes
from flowtrain.errors import UsageError
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.container import Tree, declared_items
from flowtrain.state.namespace import State
from flowtrain.state.series import Series, SeriesMap

__all__ = ["PACKED", "Encoder", "Inside", "Marks", "class_path"]

Inside: TypeAlias = "Tree | Read | Write | None"

PACKED: Mapping[type, str] = {float: "d", int: "q"}
"""The codes of `array` by which the values of a series are packed, if all are of this type."""


class Marks:
    """How far the file of a recording has each series: the number of values, by the path of the series.

    The marks are part of the callback's state, wherever the callback runs.
    """

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._rewound = Series.rewound

    def start(self, path: str, total: int, first: int) -> int:
        """Return the position of the first value to write, and take note that the file has the series as it is now.

        Args:
            path: The path of the series.
            total: How many values the series has had.
            first: The position of its oldest value that can be read here.
        """
        if self._rewound != Series.rewound:  # series were shortened, so the file may have values that are gone
            self._known.clear()
            self._rewound = Series.rewound
        known = self._known.get(path, 0)
        self._known[path] = total
        return min(max(known, first), total)


class Encoder:
    """Makes the documents of the values of one event.

    Args:
        marks: How far the file has each series. Without marks a series is written as a whole.

    Attributes:
        content: The bytes to which the documents refer.
    """

    def __init__(self, marks: Marks | None = None) -> None:
        self.content = bytearray()
        self._marks = marks
        # By the place of its elements: each tensor, held so that no other one gets its place, and its document.
        self._tensors: dict[tuple[Any, ...], tuple[torch.Tensor, dict[str, Any]]] = {}
        self._around: list[int] = []

    def encode(self, value: Any, where: str, inside: Inside = None) -> Any:
        """Return the document of a value.

        Args:
            value: The value.
            where: Its path, for errors and as the path of a series.
            inside: The declared part of it; ``None`` for all.

        Raises:
            UsageError: The value has a part that a recording cannot hold, or a container that holds itself.
        """
        kind = type(value)
        if kind in (type(None), bool, int, float, str):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where)
        if id(value) in self._around:
            raise _refused(value, where, "it holds itself")
        self._around.append(id(value))
        try:
            return self._other(value, where, inside)
        finally:
            self._around.pop()

    def _other(self, value: Any, where: str, inside: Inside) -> Any:
        if isinstance(value, enum.Enum):
            return {"t": "enum", "class": class_path(type(value)), "v": value.name}
        if isinstance(value, Phase):
            return {"t": "phase", "v": repr(value)}
        if hasattr(getattr(value, "dtype", None), "hasobject") and hasattr(value, "tobytes"):  # of NumPy
            return self._array(value, where)
        if (plain := _PLAIN.get(type(value))) is not None:
            return {"t": plain[0], "v": plain[1](value)}
        for kind, method in _KINDS:
            if isinstance(value, kind):
                return method(self, value, where, inside)
        return self._of_attributes(value, where, inside)

    def _of_attributes(self, value: Any, where: str, inside: Inside) -> Any:
        if isinstance(inside, dict):  # declared parts of an object, as of a module
            return self._named("parts", {name: getattr(value, name) for name in inside if name}, where, inside)
        if isinstance(value, nn.Module):
            return self._module(value, where)
        if dataclasses.is_dataclass(value) or isinstance(value, (Event, SimpleNamespace)):
            own = self._pairs(attributes(value).items(), f"{where}.")
            return {"t": "object", "class": class_path(type(value)), "own": own}
        twin = getattr(type(value), "__twin__", None)
        if twin is None:
            raise _refused(value, where, "it is none of the types that a recording holds as data")
        return self.encode(twin(value), where, inside)  # a snapshot's series: their twin is a map by phase

    def _bytes(self, data: bytes) -> list[int]:
        """Add bytes to the content, and return their place and length."""
        place = len(self.content)
        self.content += data
        return [place, len(data)]

    def _tensor(self, value: torch.Tensor, where: str) -> dict[str, Any]:
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise _refused(value, where, "it is no dense tensor with values")
        place = value.data_ptr(), value.device, value.dtype, value.shape, value.stride()
        key = (*place, value.is_conj(), value.is_neg())
        known = self._tensors.get(key)
        if known is None or not value.numel():
            at = self._bytes(tensor_bytes(value))
            document = {"t": "tensor", "dtype": str(value.dtype)[6:], "shape": [*value.shape], "at": at}
            known = self._tensors[key] = value, document
        return known[1]

    def _module(self, value: nn.Module, where: str) -> dict[str, Any]:
        """Return the document of a module: its state, and the names of its parameters and buffers."""
        params = [[name, self._tensor(each, where)] for name, each in value.named_parameters(remove_duplicate=False)]
        buffers = [[name, self._tensor(each, where)] for name, each in value.named_buffers(remove_duplicate=False)]
        extra = {name: each for name, each in value.state_dict().items() if not isinstance(each, torch.Tensor)}
        document = {"t": "module", "of": type(value).__name__, "training": value.training}
        saved = self.encode(list(value.state_dict()), where)
        return {**document, "params": params, "buffers": buffers, "saved": saved, "extra": self.encode(extra, where)}

    def _array(self, value: Any, where: str) -> dict[str, Any]:
        if value.dtype.hasobject:
            raise _refused(value, where, "it is an array of objects")
        word = "array" if hasattr(value, "strides") and type(value).__name__ == "ndarray" else "scalar"
        return {"t": word, "dtype": value.dtype.str, "shape": [*value.shape], "at": self._bytes(value.tobytes())}

    def _named(self, word: str, found: Mapping[str, Any], where: str, inside: Inside) -> dict[str, Any]:
        """Return the document of values by name, of which only the declared ones are taken."""
        declared = declared_items(list(found), inside if isinstance(inside, dict) else None)
        values = {name: self.encode(found[name], f"{where}.{name}", below) for name, below in declared}
        return {"t": word, "path": where, "v": values}

    def _namespace(self, value: State, where: str, inside: Inside) -> dict[str, Any]:
        return self._named("state", vars(value), where, inside)

    def _series_map(self, value: SeriesMap, where: str, inside: Inside) -> dict[str, Any]:
        return self._named("series map", value, where, inside)

    def _counts(self, value: CountsMap, where: str, inside: Inside) -> dict[str, Any]:
        return {"t": "counts map", "path": where, "v": {repr(phase): [*counts] for phase, counts in value.items()}}

    def _by_phase(self, value: PhaseMap[Any], where: str, inside: Inside) -> dict[str, Any]:
        original: Any = getattr(value, "_original", value)
        make = original.make  # which a twin has not
        # The value that a new phase gets is a document with bytes of its own: no later event continues its series.
        new = None if make is None else Encoder().encode_new(make(), where)
        phases = {repr(phase): self.encode(value[phase], f"{where}/{phase!r}", inside) for phase in list(value)}
        return {"t": "phases", "path": where, "new": new, "v": phases}

    def encode_new(self, value: Any, where: str) -> dict[str, Any] | None:
        """Return the document of the value of a new phase with the bytes in it; ``None`` if it cannot be written."""
        try:
            return {"v": self.encode(value, where), "content": bytes(self.content).hex()}
        except UsageError:
            return None

    def _series(self, value: Series, where: str, inside: Inside) -> dict[str, Any]:
        total, dropped = len(value) + value.dropped, value.dropped
        first = dropped + value.first
        start = first if self._marks is None else self._marks.start(where, total, first)
        pairs = [value[position - dropped] for position in range(start, total)]
        values = [each for _, each in pairs]
        kinds = {*map(type, values)}
        code = PACKED.get(next(iter(kinds))) if len(kinds) == 1 else None
        steps = self._bytes(array("q", [step for step, _ in pairs]).tobytes())
        document = {"t": "series", "path": where, "from": start, "total": total, "dropped": dropped, "steps": steps}
        if code is not None:
            try:
                return {**document, "code": code, "values": self._bytes(array(code, values).tobytes())}
            except OverflowError:  # a whole number of more than 64 bits
                pass
        return {**document, "values": [self.encode(each, where) for each in values]}

    def _pairs(self, items: Any, where: str) -> dict[str, Any]:
        pairs = [(self.encode(key, where), self.encode(each, f"{where}[{key!r:.60}]")) for key, each in items]
        return {"k": [key for key, _ in pairs], "v": [each for _, each in pairs]}

    def _dict(self, value: Any, where: str, inside: Inside) -> dict[str, Any]:
        if isinstance(inside, dict):
            return {"t": "dict", **self._pairs(((key, value[key]) for key, _ in declared_items(value, inside)), where)}
        items = dict.items(value) if isinstance(value, dict) else value.items()
        return {"t": "dict", **self._pairs(items, where), **self._class(value, dict, where)}

    def _items(self, value: Any, where: str, inside: Inside) -> Any:
        items = [self.encode(each, f"{where}[{place}]") for place, each in enumerate(value)]
        if type(value) is list:
            return items
        base = next(each for each in _SEQUENCES if isinstance(value, each))
        return {"t": base.__name__, "v": items, **self._class(value, base, where)}

    def _class(self, value: Any, base: type, where: str) -> dict[str, Any]:
        """Return the class and the attributes of a value whose class is derived from a type of containers."""
        kind = type(value)
        if kind is base or not isinstance(value, base):  # a mapping of another type becomes a dict
            return {}
        own = attributes(value)
        return {"class": class_path(kind), **({"own": self._pairs(own.items(), f"{where}.")} if own else {})}


def _refused(value: object, where: str, why: str) -> UsageError:
    return UsageError(
        f"{where} is a {type(value).__name__}, which cannot be recorded: {why}. A recording holds tensors, arrays, "
        f"plain values, dataclasses, and containers of these. Let the callback declare the parts that it reads, as in "
        f'{{"{where.partition("[")[0]}.logits": Read()}}, or let another callback write them into cbstate as data.'
    )


def class_path(kind: type) -> str:
    """Return the name by which a class is found again: ``"module:Class"``."""
    return f"{kind.__module__}:{kind.__qualname__}"


_SEQUENCES: tuple[type, ...] = (list, tuple, deque, set, frozenset)

_PLAIN: Mapping[type, tuple[str, Callable[[Any], Any]]] = {
    Counts: ("counts", list),
    bytes: ("bytes", bytes.hex),
    complex: ("complex", lambda value: [value.real, value.imag]),
    torch.Size: ("size", list),
    torch.device: ("device", str),
    torch.dtype: ("dtype", lambda value: str(value)[6:]),
}
"""For types whose values have no parts: the word for them, and the function that returns the value as plain data."""

_KINDS: tuple[tuple[Any, Callable[[Encoder, Any, str, Inside], Any]], ...] = (
    (CountsMap, Encoder._counts),
    (PhaseMap, Encoder._by_phase),
    (SeriesMap, Encoder._series_map),
    (Series, Encoder._series),
    (State, Encoder._namespace),
    (Mapping, Encoder._dict),
    (_SEQUENCES, Encoder._items),
)
"""For types of containers, those of ``cbstate`` first: the method that makes the document."""
