"""Copies of modules and optimizers (rule 21)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain.state.learner_state import LearnerState
from flowtrain.state.parameters import Parameters
from flowtrain_dask.snapshots.copying import Refused
from flowtrain_dask.snapshots.modules import copy_module, copy_optimizers
from tests.support.copies import copying


class Odd(nn.Module):
    """Tied weights, a buffer that is not saved, and a tensor with a graph in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.last: Any = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Keep the activation, graph and all."""
        self.last = self.a(inputs)
        outputs: torch.Tensor = self.b(self.last)
        return outputs


def test_a_copy_has_what_the_model_has_and_nothing_that_training_changes() -> None:
    model = Odd()
    model(torch.ones(1, 2)).sum().backward()
    model.a.bias.requires_grad_(False)
    copy: Any = copy_module(model, copying())
    before = {name: value.clone() for name, value in (*copy.named_parameters(), *copy.named_buffers())}
    last = model.last.detach().clone()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers(), model.last):
            value.add_(1)
    for name, value in (*copy.named_parameters(), *copy.named_buffers()):
        assert torch.equal(value, before[name]), name
    assert "count" in before
    assert copy.a.weight is copy.b.weight
    assert copy.a.weight.requires_grad
    assert not copy.a.bias.requires_grad
    assert copy.a.weight.grad is None
    assert torch.equal(copy.last, last)
    assert copy.last.grad_fn is None


def test_hooks_are_those_of_the_model() -> None:
    model = Odd()
    seen: list[str] = []

    def note(module: nn.Module, args: Any, outputs: Any) -> None:
        seen.append("a")

    model.a.register_forward_hook(note)
    copy = copy_module(model, copying())
    copy(torch.ones(1, 2))
    assert seen == ["a"]


def test_what_cannot_be_deep_copied_is_refused() -> None:
    model = Odd()
    model.last = (number for number in range(3))
    with pytest.raises(Refused, match="a deep copy of it fails: cannot pickle 'generator' object"):
        copy_module(model, copying())


def test_the_state_of_an_optimizer_is_kept_by_the_name_of_its_parameter() -> None:
    state = LearnerState()
    model = state.model = Odd()
    state.params = Parameters({"": model})
    optimizer = state.optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.9)(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    copies = copy_optimizers(state, None, copying())[""]
    assert copies.groups is not None
    assert copies.state is not None
    assert copies.groups[0]["lr"] == 0.5
    assert "params" not in copies.groups[0]
    assert [name for name, _, _ in copies.state] == ["a.weight", "a.bias", "b.bias"]
    [momentum] = [item["momentum_buffer"] for name, _, item in copies.state if name == "b.bias"]
    assert torch.equal(momentum, torch.ones(2))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert copies.groups[0]["lr"] == 0.5
    assert torch.equal(momentum, torch.ones(2))
