"""Which entries of the learner's state a snapshot has (rule 20)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowtrain import Read, Write
from flowtrain.callback.access import Access, declare
from flowtrain.errors import AccessError
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.slots import MISSING, compile_slots, slots_now


def paths(access: Access) -> list[tuple[str, ...]]:
    return [slot.path for slot in compile_slots(declare(access, "me"))]


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        ({"batch.loss": Read(), "batch.outputs.logits": Read()}, [("batch", "loss"), ("batch", "outputs")]),
        ({"batch": Read(), "batch.loss": Read()}, [("batch",)]),
        ({"params.a.weight": Read(), "params.b": Read()}, [("params",)]),
        ({"model": Read(), "params": Read()}, [("model",)]),
        ({"model.a": Read(), "params": Read()}, [("model",), ("params",)]),
        ({"resource.pyplot": Write(), "cbstate.x": Read()}, [("cbstate", "x")]),
    ],
    ids=["entries", "all covers one", "one slot for parts", "those of the copy", "each by itself", "no resources"],
)
def test_slots_of_a_declaration(access: Access, expected: list[tuple[str, ...]]) -> None:
    assert paths(access) == expected


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"batch.loss": Write()}, r"declares Write\(\) on 'batch\.loss', and works on a snapshot"),
        ({"data": Read()}, "there is no snapshot of data: loaders are used by training meanwhile"),
        ({"callbacks": Read()}, "there is no snapshot of callbacks: they hold the learner"),
    ],
)
def test_what_no_snapshot_can_hold(access: Access, message: str) -> None:
    with pytest.raises(AccessError, match=message):
        paths(access)


def test_all_entries_are_those_that_are_there_now_and_missing_ones_are_missing() -> None:
    state = LearnerState()
    state.show(BatchState())
    state.batch.loss = torch.ones(())
    every, one = compile_slots(declare({"batch": Read(), "cbstate.later": Read()}, "me"))
    assert [slot.path for slot in slots_now(every, state)] == [("batch", "loss")]
    state.batch.extra = 1
    assert [slot.path for slot in slots_now(every, state)] == [("batch", "loss"), ("batch", "extra")]
    assert slots_now(one, state) == (one,)
    assert one.take(state, Copying(COPIERS, Pool(0))) is MISSING


def test_a_part_of_a_model_is_copied_and_the_rest_is_not() -> None:
    state = LearnerState()
    state.model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    [slot] = compile_slots(declare({"model.a": Read()}, "me"))
    copy = slot.take(state, Copying(COPIERS, Pool(0)))
    assert torch.equal(copy.a.weight, state.model["a"].weight)
    assert copy.a.weight is not state.model["a"].weight
    assert not hasattr(copy, "b")
