"""Rule 21: one pass of copying: what is shared stays shared, and what cannot be copied is named with its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import AccessError, Read, UsageError
from flowtrain.state.container import Tree
from flowtrain.state.series import Series
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Attributes, Copying, Refused
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cutter
from tests.support.copies import Box, Frozen, copied, tensor


def test_one_thing_in_two_places_stays_one_and_cycles_stay() -> None:
    source = tensor()
    items: list[Any] = [source, source, source[1:]]
    items.append(items)
    found = copied(items)
    assert found[0] is found[1]
    assert found[3] is found
    assert torch.equal(found[2], source[1:])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [Box(1)]}, r"learner\.batch\.x\['a'\]\[0\] is a .*Box, and a deferred callback reads it: training may "
                          r"change it .* flowtrain_dask\.register_copier\(Box, copy\.deepcopy\).*deferrable = False"),
        (Frozen(Box(1)), r"learner\.batch\.x\.x is a .*Box"),
        (np.array([[], 1], dtype=object), r"batch\.x is a numpy\.ndarray.*array of objects.*Read a list in its place"),
        (torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged), r"subclass of Tensor"),
        (iter([1]), r"is a builtins\.list_iterator"),
    ],
)  # fmt: skip
def test_what_cannot_be_copied_is_named_with_a_remedy(value: Any, message: str) -> None:
    with pytest.raises(AccessError, match=message):
        copied(value)


def test_each_of_many_values_that_are_gone_at_once_has_its_own_copy() -> None:
    """Another value at the same address is not taken for the one before."""
    copying = Copying(COPIERS, Pool(0))
    assert [copying.copy([number]) for number in range(500)] == [[number] for number in range(500)]


def test_two_passes_share_no_copy() -> None:
    value = [1]
    assert copied(value) is not copied(value)


def test_a_type_is_looked_up_once() -> None:
    @dataclass
    class Own:
        x: int

    assert Own not in COPIERS
    copied(Own(1))
    first = dict(COPIERS)[Own]  # kept already, since a plain dict looks nothing up
    assert copied(Own(2)) == Own(2)
    assert COPIERS[Own] is first


def test_a_type_that_nobody_knows_is_refused_each_time_it_is_met() -> None:
    class Unknown: ...

    for _ in range(2):
        with pytest.raises(Refused, match="training may change it while the callback waits") as caught:
            Copying(COPIERS, Pool(0)).copy(Unknown())
        assert type(caught.value.value) is Unknown
        assert caught.value.where == []


def test_where_something_is_comes_with_the_outermost_step_last() -> None:
    with pytest.raises(Refused) as caught:
        Copying(COPIERS, Pool(0)).copy({"a": [0, Frozen(Box(1))]})
    assert caught.value.where == [".x", "[1]", "['a']"]


def test_how_a_series_is_shown_is_said_from_outside() -> None:
    series = Series("cbstate.s")
    series.push(1.0, 1)
    plain, other = Copying(COPIERS, Pool(0)), Copying(COPIERS, Pool(0), cutter=Cutter(tail=True))
    assert list(plain.copy([series])[0]) == [(1, 1.0)]
    with pytest.raises(UsageError, match="runs in another process"):
        list(other.copy([series])[0])
    assert plain.has_series
    assert not Copying(COPIERS, Pool(0)).has_series


def test_the_bytes_of_what_was_copied_are_counted_once() -> None:
    source, array = tensor(), np.zeros(3)
    copying = Copying(COPIERS, Pool(1 << 20))
    copying.copy([source, {"again": source}, array, "text", 3])
    assert copying.nbytes == source.nbytes + array.nbytes
    assert copying.events == []


def test_an_entry_is_copied_whole_or_what_is_declared_inside_it() -> None:
    value = {"a": [1], "b": Box(1)}
    with pytest.raises(AccessError, match=r"learner\.batch\.x\['b'\] is a .*Box"):
        Copying(COPIERS, Pool(0)).entry(value, ("batch", "x"))
    found = Copying(COPIERS, Pool(0)).entry(value, ("batch", "x"), {"a": Read()})
    value["a"] = [2]
    assert found == {"a": [1]}
    with pytest.raises(AccessError, match=r"learner\.batch\.x\['b'\] is a .*Box"):
        Copying(COPIERS, Pool(0)).entry(value, ("batch", "x"), {"b": Read()})


def test_of_an_object_the_declared_attributes_are_copied_and_a_missing_one_is_left_out() -> None:
    inner = [1]
    value = Box(Frozen(inner))
    inside: Tree = {"content": {"x": Read()}, "missing": Read()}
    found = Copying(COPIERS, Pool(0)).inside(value, inside)
    inner.append(2)
    assert type(found) is Attributes
    assert vars(vars(found)["content"]) == {"x": [1]}
    assert list(vars(found)) == ["content"]


def test_all_of_a_part_is_copied_where_all_of_it_is_declared() -> None:
    inside: Tree = {"a": {"": Read(), "x": Read()}}
    found = Copying(COPIERS, Pool(0)).inside({"a": {"x": [1], "y": [2]}, "b": [3]}, inside)
    assert found == {"a": {"x": [1], "y": [2]}}
