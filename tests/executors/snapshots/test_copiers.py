"""Rules 20 to 22: a whole model, types that users register, the check when a learner is built, flowtrain's containers.

Other types are tested beside this module.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import AccessError, Read, TrainingPhase, UsageError, ValidationPhase, Write
from flowtrain.callback.access import Access, declare
from flowtrain.errors import ProtectedException
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.container import Tree
from flowtrain.state.learner_state import LearnerState, State
from flowtrain.state.parameters import Gradients, Parameters
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask import register_copier
from flowtrain_dask.snapshots.copiers import check_copies
from flowtrain_dask.snapshots.series import Cut
from tests.support.copies import Box, copied, copying
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
