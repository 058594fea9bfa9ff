"""Containers of users, taken apart and rebuilt, keep their types, attributes, shared objects and circles."""

from __future__ import annotations

import enum
import functools
import sys
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, UserString, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowtrain.core.devices import to_device
from flowtrain.data.nested import (
    INSIDE,
    PLAIN,
    Attribute,
    attributes,
    is_nested,
    items,
    leaves,
    mapped,
    parts,
    place_text,
    refill,
)
from flowtrain.diagnostics.strict import fingerprint
from flowtrain.state.detached import detached
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool
from tests.support.nested import CASES, Encoding, Frozen, Items, Output, Pair, Row, Sample, Slotted, noted, values
from tests.support.untyped import untyped


class Leaf:
    """A type that is no container, so that nobody looks inside."""

    def __init__(self, number: int) -> None:
        self.number = number


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.sampled_from("ab"), st.builds(Leaf, st.integers()))


def pattern(value: Any) -> list[Any]:
    """Return a description of a value: its contents, types and attributes, and which of its objects are identical."""
    numbers: dict[int, int] = {}
    kept, found, waiting = [], [], [value]
    while waiting:
        value = waiting.pop()
        if type(value) in PLAIN:
            found.append(value)
            continue
        if id(value) in numbers:
            found.append(numbers[id(value)])
            continue
        numbers[id(value)] = len(numbers)
        kept.append(value)
        if isinstance(value, (set, frozenset)):
            found.append((type(value), frozenset(value)))
            continue
        inner = _inside(value)
        found.append((type(value), [key for key, _ in inner]))
        waiting += [item for _, item in inner]
    return found


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """Return the parts of a container, found without the functions under test."""
    if isinstance(value, Leaf):
        return [("number", value.number)]
    if isinstance(value, functools.partial):
        inner = [*enumerate(value.args), *value.keywords.items()]
    elif isinstance(value, (dict, MappingProxyType)):
        inner = list(value.items())
    elif isinstance(value, (list, tuple, deque)):
        inner = list(enumerate(value))
    else:
        inner = []
    own = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in getattr(value, "__slots__", ())}}
    return [*inner, *own.items()]


@given(values(LEAVES))
def test_it_is_the_same_again(value: Any) -> None:
    made = mapped(value, lambda item, part: INSIDE)
    assert pattern(made) == pattern(value)
    assert Counter(id(leaf) for _, leaf in leaves(made)) == Counter(id(leaf) for _, leaf in leaves(value))
    assert mapped(value, lambda item, part: INSIDE, keep=True) is value


@given(values(LEAVES), st.data())
def test_no_container_that_can_change_is_shared_with_the_original(value: Any, data: st.DataObject) -> None:
    before = pattern(value)
    made = mapped(value, lambda item, part: INSIDE)
    originals, waiting = {}, [value]
    while waiting:
        inner = waiting.pop()
        if type(inner) not in PLAIN and id(inner) not in originals:
            originals[id(inner)] = inner
            waiting += [item for _, item in parts(inner) or ()]
    _spoil(made, {*originals})
    assert pattern(value) == before


def _spoil(value: Any, originals: set[int]) -> None:
    """Empty every list and dict of a value, and set every attribute of the objects in it."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if type(value) in PLAIN or isinstance(value, Leaf) or id(value) in seen:
            continue
        seen.add(id(value))
        waiting += [item for _, item in parts(value) or ()]
        if isinstance(value, (list, dict, set, deque)):
            assert id(value) not in originals
            value.clear()
        elif isinstance(value, (Sample, Slotted, SimpleNamespace, UserDict, UserList)):
            assert id(value) not in originals
            for name in attributes(value):
                setattr(value, name, "spoilt")


TENSORS = st.builds(lambda number: torch.full((2,), number), st.floats(1, 2))


@given(values(st.one_of(TENSORS, st.integers())))
def test_every_reader_sees_every_tensor(value: Any) -> None:
    tensors = [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
    count = sum(isinstance(each, torch.Tensor) for each in _all(value))
    assert len(tensors) == count

    def read(made: Any) -> list[torch.Tensor]:
        return [leaf for leaf in _all(made) if isinstance(leaf, torch.Tensor)]

    assert all(each.is_meta for each in read(to_device(value, torch.device("meta"))))
    assert len(read(to_device(value, torch.device("meta")))) == count
    copy = Copying(COPIERS, Pool(1 << 20)).copy(value)
    assert len(read(copy)) == count
    assert not {each.data_ptr() for each in read(copy)} & {each.data_ptr() for each in tensors}
    for each in tensors:
        before = fingerprint(value)
        each.add_(1)
        assert fingerprint(value) != before
    for each in tensors:
        each.requires_grad_()
    shown = read(detached(value))
    assert len(shown) == count
    assert not any(each.requires_grad for each in shown)
    assert sorted(each.data_ptr() for each in shown) == sorted(each.data_ptr() for each in tensors)


def _all(value: Any) -> list[Any]:
    """Return all objects in a value, found without the functions under test."""
    found: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if type(value) not in PLAIN and id(value) not in found:
            found[id(value)] = value
            if isinstance(value, torch.Tensor):
                continue
            waiting += value if isinstance(value, (set, frozenset)) else [item for _, item in _inside(value)]
    return list(found.values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, "a"], ["[0]", "[1]"]),
        ({"a": 1, 3: 2, ".b": 3}, ["['a']", "[3]", "['.b']"]),
        (Pair(1, 2), ["[0]", "[1]"]),
        (noted(Items([1]), 2), ["[0]", ".note"]),
        (Sample(1), [".image", ".label"]),
        (Slotted(1), [".image", ".boxes"]),
        (SimpleNamespace(a=1), [".a"]),
        (MappingProxyType({"a": 1}), [""]),
        (Encoding({"a": 1}, 2), [".data", ".encodings"]),
        (functools.partial(dict, [], end=2), [".func", ".args[0]", ".keywords['end']"]),
        (ChainMap({"a": 1}), ["['a']", ".maps"]),
        ([], []),
    ],
)
def test_parts_have_the_places_that_an_error_names(value: Any, expected: list[str]) -> None:
    inner = parts(value)
    assert inner is not None
    assert [place_text(where) for where, _ in inner] == expected
    for where, item in inner:
        assert eval(f"value{place_text(where)}", {"value": value}) in (item, value)


class Colour(enum.Enum):
    RED = 1


class Kind(tuple[Any, ...], enum.Enum):
    """An enumeration whose members are tuples as well."""

    A = (1, [2])


class Word(Sequence["Word"]):
    """A text of a type of its own: each item is a text of one character."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Word) and other.text == self.text

    __hash__ = None  # type: ignore[assignment]  # the tests need none

    def __getitem__(self, place: Any) -> Any:
        return Word(self.text[place])

    def __len__(self) -> int:
        return len(self.text)


class Store(dict[str, int], torch.nn.Module):
    """A module that is a dict too."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self["a"] = 1

    __hash__ = torch.nn.Module.__hash__  # type: ignore[assignment]  # as torch needs it


@dataclass
class Layer(torch.nn.Module):
    """A module that is a dataclass too."""

    size: int

    def __post_init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    "value",
    [1, 2.5, True, None, "a", b"b", bytearray(b"c"), range(3), Colour.RED, int, Sample, len, object(),
     torch.ones(2), torch.nn.Linear(1, 1), Layer(3), Leaf(1), slice(3), iter([]),
     Kind.A, UserString("cat"), UserString(""), Word("cat"), Word("c"), Store()],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_leaves_have_no_parts_and_stay(value: Any) -> None:
    assert parts(value) is items(value) is None
    assert not is_nested(type(value))
    assert mapped(value, lambda item, part: INSIDE) is value
    assert list(leaves(value, "x")) == [("x", value)]


class Rows(Sequence[int]):
    """A sequence that makes a new item at each access."""

    def __getitem__(self, place: Any) -> Any:
        if place > 1:
            raise IndexError(place)
        return [place]

    def __len__(self) -> int:
        return 2


class Lazy(Mapping[str, Any]):
    def __init__(self) -> None:
        self.store = {"a": torch.ones(2)}

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


def test_mappings_and_sequences_of_other_sorts_are_looked_into_and_not_made_again() -> None:
    rows, lazy = Rows(), Lazy()
    assert [path for path, _ in leaves([rows, lazy], "x")] == ["x[0][0][0]", "x[0][1][0]", "x[1]['a']"]
    made = mapped([rows, lazy], lambda item, part: INSIDE)
    assert made[0] is rows
    assert made[1] is lazy
    assert items(array("d", [1.0])) == [(0, 1.0)]


def test_what_a_container_shows_are_its_items_or_else_its_attributes() -> None:
    assert items(Output(logits=1)) == [("logits", 1)]
    assert items(Encoding({"ids": 1}, 2)) == [("ids", 1)]
    assert items(noted(Items([1]), 2)) == [(0, 1)]
    assert items(Sample(1)) == [("image", 1), ("label", 0)]
    assert items({3}) == [(0, 3)]


def test_a_key_is_no_attribute() -> None:
    assert place_text(".a") == "['.a']"
    assert place_text(Attribute("a")) == ".a"


def test_a_leaf_that_is_in_several_places_comes_once() -> None:
    shared, inner = torch.ones(2), [Leaf(1)]
    assert [path for path, _ in leaves(Output(logits=shared, again=shared), "x")] == ["x['logits']"]
    assert [path for path, _ in leaves([inner, inner, 1, 1], "x")] == ["x[0][0]", "x[2]", "x[3]"]


def test_a_change_is_asked_for_each_object_once_the_outermost_first() -> None:
    shared = Leaf(1)
    asked: list[Any] = []

    def change(item: Any, part: Any) -> Any:
        """Note the item that is passed."""
        asked.append(item)
        return INSIDE

    value = Output(a=shared, b=(shared, {"a": shared}, Sample(3)), c=3)
    mapped(value, change)
    assert asked == [value, shared, Sample(3)]
    assert asked[0] is value


def test_what_takes_the_place_of_a_container_is_not_gone_into() -> None:
    made = mapped([[1], OrderedDict(a=Leaf(2))], lambda item, part: "dict" if isinstance(item, dict) else INSIDE)
    assert made == [[1], "dict"]


def test_only_what_has_changed_is_made_again_where_the_rest_is_to_stay() -> None:
    old, new = Leaf(1), Leaf(2)
    value = {"a": [old], "b": [Leaf(3)], "c": ([4], Sample(5)), "d": (old,)}
    made = mapped(value, lambda item, part: new if item is old else INSIDE, keep=True)
    assert made["a"][0] is made["d"][0] is new
    assert made["a"] is not value["a"]
    assert (made["b"] is value["b"], made["c"] is value["c"]) == (True, True)
    around: list[Any] = [[Leaf(3)]]
    around.append(around)
    assert mapped(around, lambda item, part: INSIDE, keep=True) is around, (
        "the circle is unchanged, so the original is returned"
    )
    around.append(old)
    made = mapped(around, lambda item, part: new if item is old else INSIDE, keep=True)
    assert made[1] is made
    assert made[2] is new
    assert made[0] is around[0]


def test_what_makes_a_container_special_is_kept() -> None:
    made = mapped(
        {
            "default": defaultdict(list, a=[1]),
            "deque": deque([1, 2], maxlen=2),
            "ordered": OrderedDict(z=1, a=2),
            "counter": Counter("aab"),
            "proxy": MappingProxyType(defaultdict(list, a=[1])),
        },
        lambda item, part: INSIDE,
    )
    assert made["default"]["new"] == []
    assert made["deque"].maxlen == 2
    assert list(made["ordered"]) == ["z", "a"]
    assert made["counter"]["c"] == 0
    assert made["proxy"]["new"] == []


class Table(NamedTuple):
    """A named tuple with a field that has the name of an attribute of named tuples of C."""

    n_fields: Any
    x: Any


class Rank(NamedTuple):
    n_fields: Any


def test_a_named_tuple_may_have_a_field_of_any_name() -> None:
    x = torch.ones(2)
    table, rank = mapped([Table(3, x), Rank(x)], lambda item, part: item + 1 if item is x else INSIDE)
    assert (type(table), table.n_fields, table.x.tolist()) == (Table, 3, [2.0, 2.0])
    assert (type(rank), rank.n_fields.tolist()) == (Rank, [2.0, 2.0])
    largest = mapped([torch.eye(2).max(0)], lambda item, part: item + 1 if isinstance(item, torch.Tensor) else INSIDE)
    assert [each.tolist() for each in largest[0]] == [[2.0, 2.0], [1, 2]]
    assert type(largest[0]) is torch.return_types.max


def test_an_ordered_dict_keeps_an_order_that_was_changed() -> None:
    value = OrderedDict(a=1, b=[2], c=3)
    value.move_to_end("a")
    assert list(mapped(value, lambda item, part: INSIDE)) == ["b", "c", "a"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_container_takes_back_what_another_one_holds(case: Any) -> None:
    value, other = case.make(torch.zeros(2)), case.make(torch.ones(2))
    made = mapped(value, lambda item, part: INSIDE)
    refill(made, other)
    can_change = made is not value and not isinstance(made, (tuple, frozenset, MappingProxyType, functools.partial))
    if can_change or isinstance(made, Row):
        assert pattern_of(made) == pattern_of(other)
    assert case.get(other).tolist() == [1, 1]


def pattern_of(value: Any) -> list[str]:
    return [path for path, _ in leaves(value)] + [str(leaf) for _, leaf in leaves(value)]


def test_attributes_that_were_not_there_go() -> None:
    value, content = SimpleNamespace(a=1, b=2), SimpleNamespace(a=3)
    refill(value, content)
    assert value == content
    slotted, empty = Slotted(1, [2]), object.__new__(Slotted)
    refill(slotted, empty)
    assert attributes(slotted) == {}


def test_a_chain_may_be_as_long_as_it_likes_to_be_looked_at() -> None:
    chain: Any = None
    for number in range(sys.getrecursionlimit() * 2):
        chain = Sample(chain, number)
    assert len(list(leaves(chain))) == sys.getrecursionlimit() * 2 + 1
    assert fingerprint(chain) == fingerprint(chain)


def test_a_frozen_dataclass_is_made_without_its_constructor() -> None:
    value = Frozen([1])
    object.__setattr__(value, "extra", [2])
    made = mapped(value, lambda item, part: INSIDE)
    assert made == value
    assert made.extra == [2]
    assert untyped(made).extra is not untyped(value).extra
