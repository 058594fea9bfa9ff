"""All functions that walk through users' values know the same containers: the tests pair each type with each function.

If only some of them knew a type, a batch would be moved to the device but keep its graph, `SanityCheck` would miss a
NaN, or strict mode would miss a change.
"""

from __future__ import annotations

from collections import OrderedDict, UserList, deque
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from flowtrain.callbacks.model_summary import summarize
from flowtrain.callbacks.sanity_check import check_batch
from flowtrain.core.devices import to_device
from flowtrain.core.prefetch import ahead
from flowtrain.diagnostics.strict import fingerprint
from flowtrain.errors import ProtectedException
from flowtrain.state.detached import detached
from flowtrain.state.namespace import State, restore_point
from flowtrain.state.readonly import readonly
from flowtrain.testing.values import values_in
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool
from tests.support.nested import CASES, Case, Encoding, Frozen, Items, Output, Pair, Row, Sample, Slotted, noted

META = torch.device("meta")


def placed(case: Case) -> None:
    value = case.make(torch.zeros(3))
    found = to_device(value, META)
    assert type(found) is type(value)
    assert case.get(found).device.type == "meta"
    assert case.get(value).device.type == "cpu", "the data of the loader is not moved"


def fetched_ahead(case: Case) -> None:
    class Moves:
        def start(self, raw: Any) -> Any:
            return raw

        def finish(self, moving: Any) -> Any:
            return to_device(moving, META)

    [found] = ahead([case.make(torch.zeros(3))], Moves(), lambda last: None)
    assert case.get(found).device.type == "meta"


def detached_in_place(case: Case) -> None:
    value = case.make(torch.ones(3, requires_grad=True) * 2)
    found = detached(value)
    assert type(found) is type(value)
    assert not case.get(found).requires_grad
    assert case.get(found).tolist() == [2, 2, 2]
    assert case.get(value).requires_grad
    plain = case.make(torch.ones(3))
    assert detached(plain) is plain


def copied(case: Case) -> None:
    source = torch.ones(3)
    value = case.make(source)
    found = Copying(COPIERS, Pool(1 << 20)).entry(value, ("batch", "x"))
    case.get(value).zero_()
    assert type(found) is type(value)
    assert case.get(found).tolist() == [1, 1, 1]


def watched(case: Case) -> None:
    value = case.make(torch.ones(3))
    before = fingerprint(value)
    assert fingerprint(value) == before
    case.get(value).add_(1)
    assert fingerprint(value) != before


def compared(case: Case) -> None:
    def looked(number: float) -> dict[str, Any]:
        return {path: leaf.bits for path, leaf in values_in(case.make(torch.full((3,), number)), "x")}

    assert looked(1) == looked(1)
    assert looked(1) != looked(2)


def checked(case: Case) -> None:
    found = [*check_batch("data", case.make(torch.full((3,), float("nan"))), torch.zeros(3))]
    assert len(found) == 1, [problem.what for problem in found]
    assert "has 3 of 3 values that are NaN or infinite" in found[0].what
    assert [*check_batch("data", case.make(torch.ones(3)), torch.zeros(3))] == []


READERS = [placed, fetched_ahead, detached_in_place, copied, watched, compared, checked]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_reader_knows_every_type(reader: Callable[[Case], None], case: Case) -> None:
    reader(case)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "list": (lambda: [1], lambda v: v.append(2)),
    "deque": (lambda: deque([1]), lambda v: v.append(2)),
    "deque, rotated": (lambda: deque([1, 2]), lambda v: v.rotate()),
    "set": (lambda: {1}, lambda v: v.add(2)),
    "dict": (lambda: {"a": 1}, lambda v: v.update(b=2)),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "UserList": (lambda: UserList([1]), lambda v: v.append(2)),
    "encoding": (lambda: Encoding({"a": 1}, ()), lambda v: v.update(b=2)),
    "an attribute of an encoding": (lambda: Encoding({"a": 1}, ()), lambda v: setattr(v, "encodings", 2)),
    "an attribute of a list": (lambda: Items([1]), lambda v: setattr(v, "note", 2)),
    "an attribute of a tuple": (lambda: noted(Row((1,)), [1]), lambda v: v.note.append(2)),
    "an attribute of an output": (lambda: Output(a=1), lambda v: setattr(v, "a", 2)),
    "dataclass": (lambda: Sample([1]), lambda v: setattr(v, "label", 2)),
    "inside a frozen dataclass": (lambda: Frozen([1]), lambda v: v.image.append(2)),
    "dataclass with slots": (lambda: Slotted(1), lambda v: setattr(v, "image", 2)),
    "SimpleNamespace": (lambda: SimpleNamespace(a=1), lambda v: setattr(v, "a", 2)),
    "an attribute that was not there": (lambda: SimpleNamespace(a=1), lambda v: setattr(v, "b", 2)),
    "inside a tuple": (lambda: ([1], 2), lambda v: v[0].append(2)),
    "through a proxy": (lambda: MappingProxyType({"a": [1]}), lambda v: v["a"].append(2)),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_container_is_seen_and_can_be_taken_back(
    make: Callable[[], Any], change: Callable[[Any], object]
) -> None:
    """Rules 3 and 11: strict mode finds the change, and a restore point undoes it in the same container."""
    state = State("cbstate")
    state.x = value = make()
    before, shown = fingerprint(value), _shown(value)
    restore = restore_point(state)
    change(value)
    assert fingerprint(value) != before
    assert _shown(value) != shown
    restore()
    assert state.x is value
    assert _shown(value) == shown == _shown(make())


def _shown(value: Any) -> dict[str, str]:
    order = {"order": str(list(value))} if isinstance(value, OrderedDict) else {}
    return {**order, **{path: leaf.shown for path, leaf in values_in(value, "x")}}


@pytest.mark.parametrize(
    "make",
    [lambda inner: MappingProxyType({"a": inner}), lambda inner: (inner, 1), lambda inner: Pair(inner, 1),
     lambda inner: Row((inner,)), lambda inner: torch.return_types.max((inner, inner))],
    ids=["MappingProxyType", "tuple", "named tuple", "tuple of a class", "struct sequence"],
)  # fmt: skip
def test_what_is_in_a_container_that_cannot_change_is_read_only_too(make: Callable[[Any], Any]) -> None:
    """Rule 3."""
    twin = readonly(make([1]), "cbstate.x")
    inner = twin["a"] if hasattr(twin, "keys") else twin[0]
    with pytest.raises(ProtectedException, match=r'To change it declare \{"cbstate.x": Write\(\)\}'):
        inner.append(2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda t: {"a": t, "b": (t, None)}, "a: (2, 1), b: (2, 1), NoneType"),
        (lambda t: Output(logits=t), "logits: (2, 1)"),
        (lambda t: Encoding({"ids": t}, ()), "ids: (2, 1)"),
        (Sample, "image: (2, 1), label: int"),
        (lambda t: deque([t, t]), "(2, 1), (2, 1)"),
        (CASES["circle"].make, "(2, 1), list"),
        (lambda t: SimpleNamespace(mean=t), "mean: (2, 1)"),
        (lambda t: (), ""),
    ],
)
def test_the_summary_of_a_model_shows_the_shapes_in_its_outputs(make: Callable[[Any], Any], text: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, inputs: Any) -> Any:
            return make(inputs)

    assert summarize(Model(), torch.zeros(2, 1)).layers[0].shape == text


def test_what_is_in_two_places_stays_one() -> None:
    shared = torch.ones(2, requires_grad=True) * 2
    value = {"a": [shared], "b": Sample(shared)}
    value["c"] = value["a"]
    for found in (to_device(value, META), detached(value), Copying(COPIERS, Pool(1 << 20)).copy(value)):
        assert found["a"][0] is found["b"].image
        assert found["a"] is found["c"]
        assert found["a"] is not value["a"]


def test_what_has_no_graph_stays_beside_what_has_one() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    rest = [Sample(torch.zeros(1))]
    found = detached({"out": x, "rest": rest})
    assert found["rest"] is rest
