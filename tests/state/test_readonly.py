"""Read-only twins show the live container and nested containers, and refuse every way to change them."""

from __future__ import annotations

import copy
import pickle
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flowtrain.errors import ProtectedException
from flowtrain.state.readonly import ReadOnlyDict, ReadOnlyList, ReadOnlySet, readonly

PATH = "cbstate.x"


class Output(OrderedDict[str, Any]):
    """A model's output as some libraries return it: a dict with its entries as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Pair(NamedTuple):
    """A tuple with named items."""

    left: Any
    right: Any


def changes(target: str, *statements: str) -> list[Any]:
    return [pytest.param(target, statement, id=f"{target}: {statement}") for statement in statements]


LISTS = ["x[0] = 1", "x[:] = []", "del x[0]", "del x[:]", "x += [1]", "x *= 2", "x.append(1)", "x.extend([1])",
         "x.remove(1)", "x.pop()", "x.clear()", "x.reverse()", "x.new = 1", "del x._container"]  # fmt: skip
DICTS = ["x['a'] = 1", "del x['a']", "x |= {'a': 1}", "x.update(a=1)", "x.pop('a')", "x.popitem()", "x.clear()",
         "x.setdefault('z', 1)", "x.new = 1", "del x._path"]  # fmt: skip
SETS = ["x.add(9)", "x.discard(1)", "x.remove(1)", "x.pop()", "x.clear()", "x.update({9})", "x |= {9}", "x &= {9}",
        "x -= {1}", "x ^= {1}", "x.difference_update({1})", "x.intersection_update({9})",
        "x.symmetric_difference_update({1})"]  # fmt: skip
CONTAINERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 2],
    "deque": lambda: deque([1, 2], maxlen=5),
    "UserList": lambda: UserList([1, 2]),
    "dict": lambda: {"a": 1},
    "OrderedDict": lambda: OrderedDict[str, int](a=1),
    "defaultdict": lambda: defaultdict(int, a=1),
    "Counter": lambda: Counter(a=1),
    "UserDict": lambda: UserDict(a=1),
    "Output": lambda: Output(a=1),
    "set": lambda: {1, 2},
}


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        *changes("list", *LISTS, "x.insert(0, 1)", "x.sort()"),
        *changes("deque", *LISTS, "x.appendleft(1)", "x.popleft()", "x.rotate(1)", "x.extendleft([1])"),
        *changes("UserList", *LISTS, "x.insert(0, 1)"),
        *changes("dict", *DICTS),
        *changes("OrderedDict", *DICTS, "x.move_to_end('a')"),
        *changes("defaultdict", *DICTS),
        *changes("Counter", *DICTS, "x.subtract('a')"),
        *changes("UserDict", *DICTS),
        *changes("Output", *DICTS, "x.a = 2"),
        *changes("set", *SETS),
    ],
)
def test_every_change_is_refused(kind: str, statement: str) -> None:
    """Rule 3: containers under `Read` come back read-only."""
    original = CONTAINERS[kind]()
    with pytest.raises(ProtectedException) as caught:
        exec(statement, {"x": readonly(original, PATH)})
    assert original == CONTAINERS[kind]()
    assert (caught.value.access, caught.value.path) == ("Write", PATH)
    assert str(caught.value) == (
        "Write access to Learner.cbstate.x disallowed.\n"
        'The container was read under Read(). To change it declare {"cbstate.x": Write()}.'
    )


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_twin_equals_its_container_and_shows_it_live(kind: str) -> None:
    original = CONTAINERS[kind]()
    twin = readonly(original, PATH)
    assert twin == original
    assert original == twin
    assert twin == readonly(original, PATH)
    assert repr(original) in repr(twin)
    if isinstance(original, set):
        original.add("new")
    elif hasattr(original, "keys"):
        original["new"] = 1
    else:
        original.append("new")
    assert "new" in twin
    assert len(twin) == len(original)
    assert list(twin) == list(original)
    with pytest.raises(TypeError, match="unhashable"):
        hash(twin)


@pytest.mark.parametrize(
    ("original", "reach"),
    [
        ([[1]], "x[0]"),
        ([[1]], "x[0:1][0]"),
        ([[1]], "next(iter(x))"),
        ([[1]], "x.copy()[0]"),
        ([[1]], "copy.copy(x)[0]"),
        ([[1]], "next(reversed(x))"),
        (deque([[1]]), "x[-1]"),
        ({"a": [1]}, 'x["a"]'),
        ({"a": [1]}, 'x.get("a")'),
        ({"a": [1]}, "next(iter(x.values()))"),
        ({"a": [1]}, "next(iter(x.items()))[1]"),
        ({"a": [1]}, 'x.copy()["a"]'),
        ({"a": [1]}, 'dict(x)["a"]'),
        ({"a": [1]}, '{**x}["a"]'),
        (Output(a=[1]), "x.a"),
        (([1], 2), "x[0]"),
        (((1, [1]), 2), "x[0][1]"),
        (Pair([1], 2), "x.left"),
        ({"a": ({"b": deque([[1]])}, 0)}, 'x["a"][0]["b"][0]'),
    ],
    ids=str,
)
def test_what_is_nested_is_protected_too(original: Any, reach: str) -> None:
    """Rule 3."""
    inner = eval(reach, {"x": readonly(original, PATH), "copy": copy})
    assert inner == [1]
    with pytest.raises(ProtectedException):
        inner.append(2)
    assert eval(reach, {"x": original, "copy": copy}) == [1]


def test_a_dict_with_attributes_keeps_them() -> None:
    logits = torch.ones(2)
    twin = readonly(Output(logits=logits, hidden=[1]), PATH)
    assert twin.logits is logits
    assert twin["logits"] is logits
    assert isinstance(twin.hidden, ReadOnlyList)
    with pytest.raises(AttributeError, match="loss"):
        _ = twin.loss


def test_reading_a_defaultdict_makes_no_entry() -> None:
    original: defaultdict[str, list[int]] = defaultdict(list)
    twin = readonly(original, PATH)
    assert twin["a"] == []
    assert twin.get("a") is None
    assert twin.get("a", 3) == 3
    assert "a" not in twin
    assert original == {}


def test_a_set_gives_new_frozensets() -> None:
    original = {1, 2}
    twin = readonly(original, PATH)
    assert isinstance(twin, ReadOnlySet)
    for found in (twin & {2, 3}, twin | {3}, twin - {1}, twin ^ {2, 3}):
        assert type(found) is frozenset
    assert twin <= {1, 2, 3}
    assert twin.isdisjoint({7})
    assert original == {1, 2}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_deep_copy_is_a_container_of_ones_own(kind: str) -> None:
    original = CONTAINERS[kind]()
    twin = readonly(original, PATH)
    for found in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert found == original
        assert type(found) is type(original)
        assert found is not original


def test_a_container_of_a_user_is_not_changed_through_its_own_methods() -> None:
    """They get the twin, so that they read as before; what they change is refused."""

    class Bag(dict[str, Any]):
        limit = 1

        def put(self, key: str, value: Any) -> None:
            self[key] = value

        def set_limit(self, limit: int) -> None:
            self.limit = limit

        def add_to(self, key: str) -> None:
            self[key].append(1)

        def keep(self, key: str) -> None:
            self.put(key, 1)

        def total(self) -> int:
            return len(self) + sum(len(value) for value in self.values()) + self.limit

        @classmethod
        def kind(cls) -> str:
            return cls.__name__

    class Stack(deque[int]):
        def swap(self) -> None:
            self[0], self[1] = self[1], self[0]

    bag = Bag(a=[1, 2])
    twin: Any = readonly(bag, PATH)
    assert (twin.total(), twin.kind()) == (4, "Bag")
    for change, argument in ((twin.put, ("b", 1)), (twin.set_limit, (2,)), (twin.add_to, ("a",)), (twin.keep, ("b",))):
        with pytest.raises(ProtectedException):
            change(*argument)
    assert (bag, bag.limit) == ({"a": [1, 2]}, 1)
    stack = Stack([1, 2])
    with pytest.raises(ProtectedException):
        readonly(stack, PATH).swap()
    assert list(stack) == [1, 2]
    assert readonly(Counter("aab"), PATH).most_common(1) == [("a", 2)]


def test_a_numpy_array_is_a_view_that_cannot_be_written() -> None:
    original = np.zeros(3)
    twin = readonly(original, PATH)
    for statement in ("x[0] = 1", "x += 1", "x.fill(1)", "x.sort()", "x.resize(5)"):
        with pytest.raises(ValueError, match=r"read-only|resize|own"):
            exec(statement, {"x": twin})
    original[1] = 5
    assert twin.tolist() == [0, 5, 0]
    assert original.flags.writeable
    assert readonly([original], PATH)[0].flags.writeable is False


class Kind(tuple[list[int], ...], Enum):
    """An enumeration whose members are tuples as well."""

    A = ([1],)


@pytest.mark.parametrize(
    "value",
    [1, 1.5, True, None, "text", b"bytes", 1j, frozenset({1}), (1, "a", None), Pair(1, 2), np.float64(1.5), np.int64(3),
     np.bool_(True), torch.ones(2), torch.nn.Parameter(torch.ones(1)), torch.nn.Linear(1, 1), object(), len, Kind.A],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_protected_is_handed_out_as_it_is(value: Any) -> None:
    assert readonly(value, PATH) is value


def test_a_frozen_numpy_array_needs_no_view() -> None:
    frozen = np.zeros(2)
    frozen.flags.writeable = False
    assert readonly(frozen, PATH) is frozen


def test_a_twin_of_a_twin_is_itself() -> None:
    """A value that was read from a twin may be stored elsewhere, and stays read-only there."""
    twin = readonly({"a": 1}, PATH)
    assert readonly(twin, "cbstate.y") is twin
    assert isinstance(twin, ReadOnlyDict)


def test_twins_can_be_added_to_others() -> None:
    seen, counts = readonly([1, 2], "cbstate.seen"), readonly({"a": 1}, "cbstate.counts")
    assert (add(seen, [3]), add([0], seen), seen * 2, 2 * seen) == ([1, 2, 3], [0, 1, 2], [1, 2, 1, 2], [1, 2, 1, 2])
    assert (counts | {"b": 2}, {"a": 0, "b": 2} | counts) == ({"a": 1, "b": 2}, {"a": 1, "b": 2})
    assert seen + seen == [1, 2, 1, 2]
    with pytest.raises(ProtectedException):
        seen += [3]
