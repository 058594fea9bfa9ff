"""Rule 21: types that users register, the check when a learner is built, and a whole model. The rest is beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import AccessError, Read, UsageError, Write
from flowtrain.callback.access import Access, declare
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask import register_copier
from flowtrain_dask.snapshots.copiers import Copying, Pool, check


class Box:
    """A type that nobody knows."""

    def __init__(self, content: Any) -> None:
        self.content = content


def copied(value: Any) -> Any:
    return Copying(Pool(1 << 20)).entry(value, ("batch", "x"))


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
        register_copier(3, copy.deepcopy)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(UsageError, match=r"register_copier\(Box, 3\): the second argument is a function"):
        register_copier(Box, 3)  # type: ignore[arg-type]  # what is tested


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
        check(declare(access, "me"), state)
    check(declare({"cbstate.other": Read(), "batch": Read(), "model": Read(), "resource.x": Write()}, "me"), state)
