"""The batch state and its read-only twin."""

from __future__ import annotations

import copy

import pytest
import torch

from flowtrain.errors import MissingStateError, ProtectedException
from flowtrain.state.batch import BatchState, ReadOnlyBatch
from tests.support.untyped import untyped


def test_entries_are_attributes() -> None:
    batch = BatchState()
    batch.inputs = torch.ones(1)
    batch.mine = [1]
    assert vars(batch) == {"inputs": torch.ones(1), "mine": [1]}
    assert repr(batch) == "BatchState(inputs, mine)"


@pytest.mark.parametrize("twin", [False, True])
def test_a_missing_entry_names_what_is_there(twin: bool) -> None:
    batch = BatchState()
    seen = ReadOnlyBatch(batch) if twin else batch
    with pytest.raises(MissingStateError) as caught:
        _ = seen.loss
    assert str(caught.value) == "batch.loss does not exist (yet). This batch has: nothing."
    batch.outputs = batch.inputs = 1
    with pytest.raises(MissingStateError) as caught:
        _ = seen.outptus
    assert caught.value.path == "batch.outptus"
    assert str(caught.value) == (
        "batch.outptus does not exist (yet). This batch has: outputs, inputs. Did you mean 'outputs'?"
    )
    assert getattr(seen, "loss", None) is None
    assert not hasattr(seen, "loss")


def test_a_batch_can_be_copied() -> None:
    batch = BatchState()
    batch.inputs = [torch.ones(1)]
    other = copy.deepcopy(batch)
    other.inputs[0].zero_()
    assert batch.inputs[0] == 1


def test_the_twin_shows_the_live_batch() -> None:
    """Rule 3: containers get their twins at the first read, and again after an entry is replaced."""
    batch = BatchState()
    twin = ReadOnlyBatch(batch)
    batch.loss = torch.ones(())
    batch.inputs = {"x": [1]}
    assert twin.loss is batch.loss
    first = twin.inputs
    assert twin.inputs is first
    with pytest.raises(ProtectedException, match=r"Write access to Learner\.batch\.inputs disallowed"):
        first["x"].append(2)
    batch.inputs["x"].append(2)
    assert first["x"] == [1, 2]
    batch.inputs = {"y": 0}
    assert twin.inputs == {"y": 0}
    batch.inputs = 7
    assert twin.inputs == 7


def test_the_twin_cannot_be_assigned() -> None:
    with pytest.raises(AttributeError):
        untyped(ReadOnlyBatch(BatchState())).loss = 1
