"""Containers of every type, each around one tensor, and nested values that hypothesis draws."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence


class Pair(NamedTuple):
    left: Any
    right: Any


class Items(list[Any]):
    """A list with attributes."""

    note: Any = None


class Row(tuple[Any, ...]):
    """A tuple with attributes."""

    note: Any


class Output(OrderedDict[str, Any]):
    """A dict whose entries are attributes too, like the outputs of models in common libraries."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        vars(self).update(entries)


class Encoding(UserDict[str, Any]):
    """A mapping that holds a dict and other attributes, like the batches of tokenizers."""

    def __init__(self, data: dict[str, Any], encodings: Any) -> None:
        super().__init__(data)
        self.encodings = encodings


@dataclass
class Sample:
    image: Any
    label: int = 0


@dataclass(frozen=True)
class Frozen:
    image: Any
    meta: tuple[str, ...] = ("a",)


@dataclass(slots=True)
class Slotted:
    image: Any
    boxes: list[Any] = field(default_factory=list)


class Case(NamedTuple):
    """A type of container: how to build one around a tensor, and how to find the tensor in it."""

    make: Callable[[torch.Tensor], Any]
    get: Callable[[Any], Any]


def noted(made: Any, note: Any) -> Any:
    made.note = note
    return made


def deep(tensor: torch.Tensor, depth: int = 12) -> Any:
    return tensor if depth == 0 else [deep(tensor, depth - 1)]


def shallow(value: Any) -> Any:
    while isinstance(value, list):
        value = value[0]
    return value


def circle(tensor: torch.Tensor) -> Any:
    made: list[Any] = [tensor]
    made.append(made)
    return made


CASES: dict[str, Case] = {
    "list": Case(lambda t: [1, t], lambda v: v[1]),
    "tuple": Case(lambda t: ("a", t), lambda v: v[1]),
    "dict": Case(lambda t: {"a": t, 3: None}, lambda v: v["a"]),
    "named tuple": Case(lambda t: Pair(t, 1), lambda v: v.left),
    "struct sequence": Case(lambda t: torch.return_types.max((t, torch.tensor(0))), lambda v: v.values),
    "tuple with attributes": Case(lambda t: noted(Row((1,)), t), lambda v: v.note),
    "list with attributes": Case(lambda t: noted(Items([1]), t), lambda v: v.note),
    "OrderedDict": Case(lambda t: OrderedDict(z=1, a=t), lambda v: v["a"]),
    "defaultdict": Case(lambda t: defaultdict(list, a=t), lambda v: v["a"]),
    "output": Case(lambda t: Output(logits=t), lambda v: v.logits),
    "UserDict": Case(lambda t: UserDict(a=t), lambda v: v["a"]),
    "encoding": Case(lambda t: Encoding({"ids": t}, (1,)), lambda v: v["ids"]),
    "UserList": Case(lambda t: UserList([t]), lambda v: v[0]),
    "deque": Case(lambda t: deque([1, t], maxlen=2), lambda v: v[1]),
    "set": Case(lambda t: {t}, lambda v: next(iter(v))),
    "frozenset": Case(lambda t: frozenset({t}), lambda v: next(iter(v))),
    "MappingProxyType": Case(lambda t: MappingProxyType({"a": t}), lambda v: v["a"]),
    "dataclass": Case(Sample, lambda v: v.image),
    "frozen dataclass": Case(Frozen, lambda v: v.image),
    "dataclass with slots": Case(Slotted, lambda v: v.image),
    "SimpleNamespace": Case(lambda t: SimpleNamespace(a=t), lambda v: v.a),
    "partial, positional": Case(lambda t: functools.partial(math.prod, t, start=2), lambda v: v.args[0]),
    "partial, by name": Case(lambda t: functools.partial(math.prod, start=t), lambda v: v.keywords["start"]),
    "PackedSequence": Case(lambda t: pack_sequence([t.reshape(-1)]), lambda v: v.data),
    "deep": Case(deep, shallow),
    "circle": Case(circle, lambda v: v[1][1][0]),
}
"""By name: every type of container that is taken apart."""


def values(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for nested values of all container types, with hashable leaves."""
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(Items),
            st.lists(inner, max_size=3).map(tuple),
            st.lists(inner, max_size=3).map(deque),
            st.lists(inner, max_size=3).map(UserList),
            st.lists(leaf, max_size=3).map(frozenset),
            st.sets(leaf, max_size=3),
            st.builds(Pair, inner, inner),
            st.builds(lambda item, note: noted(Row((item,)), note), inner, inner),
            st.builds(lambda item, note: noted(Items([item, item]), note), inner, inner),
            *(
                st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(kind)
                for kind in (dict, OrderedDict, MappingProxyType, UserDict, lambda found: Output(**found))
            ),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(lambda found: SimpleNamespace(**found)),
            st.builds(Sample, inner),
            st.builds(Frozen, inner),
            st.builds(lambda item: Slotted(item, [item]), inner),
            st.builds(lambda arg, start: functools.partial(math.prod, arg, start=start), inner, inner),
            inner.map(_around_itself),
        ),
        max_leaves=8,
    )


def _around_itself(inner: Any) -> Any:
    made: list[Any] = [inner]
    made.append({"me": made, "again": inner})
    return made
