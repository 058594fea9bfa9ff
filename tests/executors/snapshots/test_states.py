"""Copies of flowtrain's own containers: tensors by name, series by name, maps by phase (rules 20 to 22)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowtrain import Read, TrainingPhase, ValidationPhase
from flowtrain.errors import ProtectedException
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.learner_state import State
from flowtrain.state.parameters import Gradients, Parameters
from flowtrain.state.partial_view import Tree
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask.snapshots.copiers import Copying, Pool
from flowtrain_dask.snapshots.series import Cut


def tied() -> nn.ModuleDict:
    """Return two layers with one weight; its gradient is 1."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def copying() -> Copying:
    return Copying(Pool(1 << 20))


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
