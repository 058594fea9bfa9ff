"""Rules 20 to 22: copies of a whole model, of containers and objects, and of types that users register."""

from __future__ import annotations

import copy
import enum
import functools
import math
import types
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from flowtrain import AccessError, BatchEnd, Read, TrainingPhase, UsageError, ValidationPhase, Write
from flowtrain.callback.access import Access, declare
from flowtrain.errors import ProtectedException
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.container import Tree
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import State
from flowtrain.state.parameters import Gradients, Parameters
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask import register_copier
from flowtrain_dask.snapshots.copiers import COPIERS, check_copies, find_rebuilder
from flowtrain_dask.snapshots.copying import Copying, Refused
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cut
from tests.support.copies import Box, Frozen, copied, copying, tensor
from tests.support.untyped import untyped


def test_a_model_is_copied_with_its_buffers_and_without_its_graph() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    model[1].last = model[0].weight * 2  # a module that keeps a result, with its graph
    model(torch.randn(5, 3)).sum().backward()
    calls: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        """A hook."""
        calls.append(module)

    model.register_forward_hook(note)
    expected = copy.deepcopy({name: value.clone() for name, value in model.state_dict().items()})
    found = copied(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert [each.requires_grad for each in found.parameters()] == [each.requires_grad for each in model.parameters()]
    assert found[0].weight.grad is None
    found(torch.randn(5, 3))
    assert calls == [found]


def test_a_registered_type_is_copied_as_it_says() -> None:
    class Mine(Box):
        pass

    class Special(Mine):
        pass

    with pytest.raises(AccessError):
        copied(Special([1]))
    register_copier(Mine, copy.deepcopy)
    value = Special([1])
    found = copied([value])[0]
    value.content.append(2)
    assert (type(found), found.content) == (Special, [1])
    with pytest.raises(UsageError, match=r"register_copier\(3, \.\.\.\): the first argument is a type"):
        register_copier(untyped(3), copy.deepcopy)
    with pytest.raises(UsageError, match=r"register_copier\(Box, 3\): the second argument is a function"):
        register_copier(Box, untyped(3))


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"data": Read()}, r"declares 'data', and there is no snapshot of data: loaders are used by training"),
        ({"callbacks": Read()}, r"no snapshot of callbacks: they hold the learner"),
        ({"cbstate.x": Write()}, r"declares Write\(\) on 'cbstate\.x', and works on a snapshot"),
        ({"cbstate": Read()}, r"learner\.cbstate\.box is a .*Box"),
        ({"cbstate.box": Read(optional=True)}, r"learner\.cbstate\.box is a .*Box"),
    ],
)
def test_a_declaration_is_checked_when_the_learner_is_built(access: Access, message: str) -> None:
    """Rule 21: otherwise an error when built."""
    state = LearnerState()
    state.cbstate.box = Box(1)
    with pytest.raises(AccessError, match=message):
        check_copies(declare(access, "me"), state)
    fine: Access = {"cbstate.other": Read(), "batch": Read(), "model": Read(), "resource.x": Write()}
    check_copies(declare(fine, "me"), state)


# --- flowtrain's own containers


def tied() -> nn.ModuleDict:
    """Return two layers with one weight; its gradient is 1."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


@pytest.mark.parametrize("kind", [Parameters, Gradients])
def test_a_weight_under_two_names_is_copied_once_and_found_by_both(kind: type[Parameters] | type[Gradients]) -> None:
    """Rule 20: the deferred handler writes the code that it would in place, where both names work."""
    params = Parameters({"": tied()})
    live = params if kind is Parameters else Gradients(params)
    found = copying().copy(live)
    assert list(found) == list(live) == ["a.weight", "a.bias", "b.bias"]
    assert found["b.weight"] is found["a.weight"]
    assert torch.equal(found["a.weight"], live["a.weight"])
    with pytest.raises(KeyError):
        found["b.wieght"]


def test_only_the_second_name_of_a_weight_is_declared() -> None:
    inside: Tree = {"b": {"weight": Read()}}
    found = copying().inside(Gradients(Parameters({"": tied()})), inside)
    assert torch.equal(found["b.weight"], torch.ones(2, 2))
    assert len(found) == 1
    with pytest.raises(KeyError, match=r"a\.bias has no gradient"):
        found["a.bias"]


def test_a_weight_that_two_models_share_is_shown_in_both_as_in_place() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    live = Parameters({"one": one, "other": other})
    found = copying().copy(live)
    assert list(found) == list(live)
    assert torch.equal(found["other.weight"], live["other.weight"])


def test_gradients_refuse_to_be_written() -> None:
    found = copying().copy(Gradients(Parameters({"": tied()})))
    with pytest.raises(ProtectedException, match=r"Write access to Learner\.batch\.grads disallowed"):
        found["a.weight"] = torch.zeros(2, 2)


def test_series_by_name_are_cut_and_new_ones_do_not_appear() -> None:
    """Rule 22."""
    live = SeriesMap("cbstate.metrics_step")
    live.push("Loss", 0.5, 1)
    found = copying().copy(live)
    live.push("Loss", 0.25, 2)
    live.push("Accuracy", 1.0, 2)
    assert list(found) == ["Loss"]
    assert type(found["Loss"]) is Cut
    assert list(found["Loss"]) == [(1, 0.5)]


def test_maps_by_phase_keep_what_they_make_and_what_they_count() -> None:
    live = PhaseMap("cbstate.seen", lambda: Series("cbstate.seen"))
    live[TrainingPhase].push(0.5, 1)
    counts = CountsMap("cbstate.history")
    counts[TrainingPhase()] = Counts((1, 2, 3, 4))
    found, counted = copying().copy(live), copying().copy(counts)
    live[ValidationPhase].push(0.25, 1)
    live[TrainingPhase].push(0.25, 2)
    counts[TrainingPhase()] = Counts((5, 6, 7, 8))
    assert list(found) == [TrainingPhase()]
    assert list(found[TrainingPhase]) == [(1, 0.5)]
    assert len(found[ValidationPhase]) == 0  # made, as in place
    assert counted[TrainingPhase] == Counts((1, 2, 3, 4))


def test_of_a_namespace_what_is_declared_and_there_is_copied() -> None:
    live = State("cbstate.mine")
    live.a, live.b = [1], [2]
    inside: Tree = {"a": Read(), "later": Read()}
    found = copying().inside(live, inside)
    live.a.append(3)
    assert dict(vars(found)) == {"a": [1]}


# --- Python's containers and objects, and numpy's arrays


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass(slots=True)
class Slotted:
    x: Any
    items: list[Any] = field(default_factory=list)


class Colour(enum.Enum):
    RED = 1


def test_containers_filled_later_do_not_grow_in_the_copy() -> None:
    items: list[Any] = [1]
    value = {"items": items, "set": {1, 2}, "counter": Counter("aab"), "bytes": bytearray(b"ab")}
    found = copied(value)
    items.append(2)
    value["set"].add(3)  # type: ignore[attr-defined]  # a set
    value["bytes"][0] = 0  # type: ignore[index]  # a bytearray
    assert found == {"items": [1], "set": {1, 2}, "counter": Counter("aab"), "bytes": bytearray(b"ab")}


@pytest.mark.parametrize(
    "value", [1, True, 2.5, "a", b"b", None, 3j, Colour.RED, (1, "a"), frozenset({1}), Frozen(1), math.sin,
              torch.float16, range(3), torch.Size((1, 2)), np.float32(1.5), np.datetime64("2026-01-01"), Box, slice(1)],
)  # fmt: skip
def test_what_cannot_change_is_shared(value: Any) -> None:
    found = copied(value)
    assert found is value or (isinstance(value, Frozen) and found == value)


@pytest.mark.parametrize(
    "value",
    [np.arange(6.0).reshape(2, 3), np.array(2.0), np.asfortranarray(np.ones((2, 3))), np.zeros(0, dtype="i2"),
     np.ma.masked_array([1.0, 2.0], [False, True]), np.zeros(2, dtype=[("a", "i4"), ("b", "f8")])],
    ids=["array", "0-d", "fortran", "empty", "masked", "records"],
)  # fmt: skip
def test_numpy_arrays_are_copied(value: Any) -> None:
    expected = value.copy(order="K")
    found = copied(value)
    if value.size:
        value[...] = 7 if value.dtype.names is None else (7, 7)
    assert type(found) is type(expected)
    assert (found.dtype, found.strides) == (expected.dtype, expected.strides)
    np.testing.assert_array_equal(found, expected)


class Filled(list[Any]):
    """Does more than to append."""

    def extend(self, items: Any) -> None:
        """Refuse."""
        raise AssertionError("a copy is not filled through what a subclass does")


class OneSlot:
    """A base with a slot, whose name is a text of its own."""

    __slots__ = "single"  # what is tested


@dataclass
class Both(OneSlot):
    """Attributes in a slot of the base and in the dictionary."""

    other: Any


@pytest.mark.parametrize("base", [list, dict, set, OrderedDict, UserList, UserDict])
def test_attributes_of_a_subclass_go_along_and_no_constructor_runs(base: type[Any]) -> None:
    made: list[Any] = []

    def note(self: Any) -> None:
        """Do what must not be done for a copy."""
        made.append(self)
        base.__init__(self)

    kind: Any = type("Kind", (base,), {"__init__": note})
    value, inner = kind(), tensor()
    value.note = [inner]
    found = copied(value)
    inner.fill_(-1)
    assert type(found) is kind
    assert torch.equal(found.note[0], tensor())
    assert found == value
    assert len(made) == 1


def test_items_of_a_subclass_are_filled_in_past_what_it_does() -> None:
    found = copied(Filled([1, [2]]))
    assert type(found) is Filled
    assert list(found) == [1, [2]]


def test_slots_of_a_base_are_copied_and_those_never_set_stay_unset() -> None:
    value: Any = Both([1])
    empty = Both([2])
    value.single = [3]
    found, other = copied([value, empty])
    value.single.append(4)
    value.other.append(4)
    assert (found.single, found.other) == ([3], [1])
    assert not hasattr(other, "single")


def test_what_needs_no_copy_leaves_an_immutable_container_itself() -> None:
    flat, pair, fixed = (1, ("a", None)), Pair(1, "b"), frozenset({1, (2, 3)})
    assert copied([flat, pair, fixed]) == [flat, pair, fixed]
    assert all(found is source for found, source in zip(copied([flat, pair, fixed]), (flat, pair, fixed), strict=True))


def test_containers_keep_what_makes_them_special() -> None:
    value = {
        "default": defaultdict(list, a=[1]),
        "deque": deque([[1], [2]], maxlen=2),
        "ordered": OrderedDict(z=[1], a=[2]),
    }
    found = copied(value)
    assert found["default"]["new"] == []
    found["deque"].append([3])
    assert list(found["deque"]) == [[2], [3]]
    assert list(found["ordered"]) == ["z", "a"]
    assert value == {
        "default": {"a": [1]}, "deque": deque([[1], [2]], maxlen=2), "ordered": OrderedDict(z=[1], a=[2])
    }  # fmt: skip


def cycles() -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """Containers and objects that hold themselves."""
    items: list[Any] = []
    items.append(items)
    yield items, lambda found: found[0]
    named: dict[str, Any] = {}
    named["me"] = named
    yield named, lambda found: found["me"]
    queue: deque[Any] = deque()
    queue.append(queue)
    yield queue, lambda found: found[0]
    slotted = Slotted(None)
    slotted.x = slotted
    yield slotted, lambda found: found.x
    space = types.SimpleNamespace()
    space.me = space
    yield space, lambda found: found.me


@pytest.mark.parametrize(("value", "inner"), [*cycles()], ids=["list", "dict", "deque", "dataclass", "namespace"])
def test_what_holds_itself_does_so_in_the_copy(value: Any, inner: Callable[[Any], Any]) -> None:
    found = copied(value)
    assert found is not value
    assert inner(found) is found


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ([0, (1, Box(1))], ["[1]", "[1]"]),
        ({"a": Box(1)}, ["['a']"]),
        ({Box(1): "a"}, None),
        (types.SimpleNamespace(inner=Frozen(Box(1))), [".x", ".inner"]),
        (functools.partial(print, Box(1)), [".args[0]"]),
        (functools.partial(dict, end=Box(1)), [".keywords['end']"]),
        (types.MappingProxyType({3: Box(1)}), ["[3]", ""]),
    ],
    ids=["items", "values", "keys", "attributes", "arguments", "keywords", "proxies"],
)
def test_what_is_refused_says_how_to_get_there(value: Any, where: list[str] | None) -> None:
    with pytest.raises(Refused) as caught:
        Copying(COPIERS, Pool(0)).copy(value)
    assert type(caught.value.value) is Box
    if where is None:
        [place] = caught.value.where
        assert place.startswith(".keys() <")
    else:
        assert caught.value.where == where


def test_who_knows_a_type_and_who_does_not() -> None:
    """Types of others are left to others: they may hold anything."""
    assert find_rebuilder(Box) is None
    assert find_rebuilder(torch.Tensor) is None
    assert find_rebuilder(type(iter([]))) is None
    assert find_rebuilder(Filled) is find_rebuilder(list)
    assert find_rebuilder(Counter) is find_rebuilder(dict)
    assert find_rebuilder(Frozen) is find_rebuilder(types.SimpleNamespace)
    event, phase = BatchEnd(), TrainingPhase()
    assert copied([event, phase]) == [event, phase]


def test_arrays_are_counted_and_in_a_dry_run_only_looked_at() -> None:
    value, raw = np.arange(6.0), bytearray(b"abc")
    copying, dry = Copying(COPIERS, Pool(0)), Copying(COPIERS, Pool(0), dry=True)
    found = copying.copy([value, raw])
    assert copying.nbytes == 48 + 3
    assert not np.shares_memory(found[0], value)
    assert dry.copy([value])[0] is value
    with pytest.raises(Refused, match="an array of objects") as caught:
        dry.copy(np.array([[], 1], dtype=object))
    assert caught.value.remedy == "Read a list in its place"


class Sized(deque[Any]):
    """Has a constructor of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(maxlen=size)


class Row(tuple[Any, ...]):
    note: Any


class Bag(frozenset[Any]):
    note: Any


class Word(str):
    note: Any


class Score(float):
    note: Any


class Part(functools.partial[Any]):
    note: Any


class Raw(bytearray):
    note: Any


ANNOTATED: list[Any] = [Row([1]), Row([[1]]), Bag([1]), Bag([(1, Score(2))]), Word("abc"), Score(0.5), Raw(b"abc")]


@pytest.mark.parametrize("value", ANNOTATED, ids=lambda value: f"{type(value).__name__}-{len(repr(value))}")
def test_attributes_of_subclasses_of_what_is_immutable_are_copied(value: Any) -> None:
    value.note = [1]
    found = copied(value)
    value.note.append(2)
    assert type(found) is type(value)
    assert found == value
    assert found.note == [1]


@pytest.mark.parametrize("value", [*ANNOTATED, Part(max, 1), Filled([1])], ids=lambda value: type(value).__name__)
def test_what_refers_to_itself_does_so_in_the_copy(value: Any) -> None:
    value.note = [value]
    found = copied(value)
    assert found is not value
    assert found.note[0] is found


def test_a_tuple_that_something_in_it_holds_is_one_in_the_copy() -> None:
    inner: list[Any] = [1]
    value = (inner,)
    inner.append(value)
    found = copied(value)
    assert found is not value
    assert found[0][1] is found


class Marked(float):
    __slots__ = ("__own", "note")
    note: Any

    def own(self) -> Any:
        """Return what no subclass sees."""
        return self.__own

    def keep(self, what: Any) -> Any:
        """Set it."""
        self.__own = what


def test_what_is_in_slots_is_copied_also_where_it_is_private() -> None:
    value = Marked(2.5)
    value.note, kept = [1], [2]
    value.keep(kept)
    found = copied(value)
    value.note.append(0)
    kept.append(0)
    assert (type(found), found, found.note, found.own()) == (Marked, 2.5, [1], [2])


@dataclass
class Mixin:
    number: int


class Chosen(Mixin, enum.Enum):
    ONE = 1


@dataclass
class Measured(float):
    note: Any = None

    def __new__(cls, value: float, note: Any = None) -> Measured:
        return super().__new__(cls, value)

    def __init__(self, value: float, note: Any = None) -> None:
        self.note = note


def test_dataclasses_that_are_something_else_as_well() -> None:
    assert copied([Chosen.ONE])[0] is Chosen.ONE
    value = Measured(3.5, [1])
    found = copied(value)
    value.note.append(2)
    assert (type(found), float(found), found.note) == (Measured, 3.5, [1])


class Strict(list[Any]):
    def __new__(cls, size: int) -> Strict:
        raise AssertionError(f"made with {size}")


class Wide(np.float64):
    note: Any


def test_no_function_of_the_type_runs_and_what_cannot_be_made_is_refused() -> None:
    value: Any = list.__new__(Strict)
    value.append([1])
    assert copied([value])[0] == [[1]]
    wide = Wide(1.5)
    assert copied([wide])[0] is wide
    wide.note = [1]
    with pytest.raises(Refused, match="it has attributes, and cannot be made again"):
        Copying(COPIERS, Pool(0)).copy(wide)


def test_a_proxy_keeps_what_is_missing_in_what_it_shows() -> None:
    shown: dict[str, list[int]] = defaultdict(list, a=[1])
    found = copied(types.MappingProxyType(shown))
    shown["a"].append(2)
    assert found["a"] == [1]
    assert found["b"] == []


def test_a_subclass_without_attributes_is_its_own_copy() -> None:
    value: list[Any] = [Word("abc"), Score(1), Row((1, "a")), Bag([1]), Colour.RED]
    assert all(one is other for one, other in zip(copied(value), value, strict=True))
    value[0].note = "def"
    assert copied(value)[0] is value[0], "the attribute is immutable too"


def test_no_constructor_of_a_subclass_runs() -> None:
    value = Sized(3)
    value.extend(range(5))
    found = copied(value)
    assert (type(found), list(found), found.maxlen) == (Sized, [2, 3, 4], 3)
    part = Part(max, [1], key=None)
    part.note = [1]
    other = copied(part)
    part.args[0].append(5)
    part.note.append(2)
    assert (type(other), other(), other.note) == (Part, 1, [1])


def test_a_proxy_that_holds_itself_does_so_in_the_copy() -> None:
    shown: dict[str, Any] = {"a": [1]}
    shown["me"] = types.MappingProxyType(shown)
    found = copied(shown["me"])
    shown["a"].append(2)
    assert type(found) is types.MappingProxyType
    assert found["me"] is found
    assert found["a"] == [1]


def test_of_a_mapping_only_what_is_declared_is_copied() -> None:
    """A key may have dots in it, as the names of parameters do."""
    value = {"a": {"x": [1], "y": Box(1)}, "b.c": [2], "d": Box(1), 3: [4]}
    inside: Tree = {"a": {"x": Read()}, "b": {"c": Read()}, "3": Read(), "missing": Read()}
    found = Copying(COPIERS, Pool(0)).inside(value, inside)
    expected = copy.deepcopy({"a": {"x": [1]}, "b.c": [2], 3: [4]})
    value["a"]["x"].append(0)  # type: ignore[index]  # a dict
    assert found == expected
