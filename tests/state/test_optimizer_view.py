"""An optimizer as handlers see it: its hyperparameters and its state, each writable or read-only."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from flowtrain.errors import ProtectedException, UsageError
from flowtrain.state.learner_state import Named
from flowtrain.state.optimizer_view import HyperParams, OptimizerParts
from flowtrain.state.parameters import Parameters, named_parameters
from flowtrain.state.readonly import readonly


def two_groups(**more: Any) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    return SGD(groups, momentum=0.9, **more), params


def test_hyperparameters_are_the_groups_without_parameters() -> None:
    """Rule 5: the groups of hyperparameters show no parameters."""
    optimizer, _ = two_groups()
    groups = OptimizerParts(optimizer).hyperparams
    assert [group["lr"] for group in groups] == [0.1, 0.2]
    assert len(groups) == 2
    assert "params" not in groups[0]
    assert set(groups[0]) == set(optimizer.param_groups[0]) - {"params"}
    assert len(groups[0]) == len(optimizer.param_groups[0]) - 1
    assert [group["lr"] for group in groups[1:]] == [0.2]
    assert repr(groups[0]).startswith("HyperParamGroup({'lr': 0.1, 'momentum': 0.9")
    with pytest.raises(KeyError) as caught:
        groups[0]["params"]
    assert caught.value.args == (
        "optimizer.hyperparams['params']: parameters are at learner.params; here are hyperparameters only",
    )


def test_a_writer_changes_the_optimizer_itself() -> None:
    optimizer, _ = two_groups()
    parts = OptimizerParts(optimizer)
    parts.hyperparams[0]["lr"] = 0.5
    for group in parts.hyperparams:
        group.update(momentum=0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.2]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.8, 0.8]


@pytest.mark.parametrize("statement", ["x[0]['lr'] = 1", "x[0].update(lr=1)", "del x[0]['lr']", "x[0].pop('lr')",
                                       "x[0].clear()", "x[0].setdefault('new', 1)", "x[:1][0]['lr'] = 1",
                                       "next(iter(x))['lr'] = 1", "x[0]['mine'].append(1)"])  # fmt: skip
def test_a_reader_changes_nothing(statement: str) -> None:
    optimizer, _ = two_groups()
    optimizer.param_groups[0]["mine"] = []
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ProtectedException) as caught:
        exec(statement, {"x": OptimizerParts(optimizer).__twins__.hyperparams})
    assert (caught.value.access, caught.value.path) == ("Write", "optimizer.hyperparams")
    assert optimizer.param_groups == before


def test_the_groups_keep_their_shape() -> None:
    optimizer, _ = two_groups()
    group = OptimizerParts(optimizer).hyperparams[0]
    said = "optimizer.hyperparams: 'lr' cannot be deleted, the optimizer needs it. Assign another value."
    for delete in (lambda: group.pop("lr"), group.clear):
        with pytest.raises(UsageError) as caught:
            delete()
        assert str(caught.value) == said
    with pytest.raises(KeyError, match="hyperparameters only"):
        group["params"] = []
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_state_is_looked_up_each_time() -> None:
    """`load_state_dict` replaces the optimizer's state, so views may not keep it."""
    optimizer, params = two_groups()
    parts = OptimizerParts(optimizer)
    saved = optimizer.state_dict()
    params[0].grad = torch.ones(1)
    optimizer.step()
    assert parts.state[params[0]]["momentum_buffer"] == 1
    assert parts.__twins__.state[params[0]]["momentum_buffer"] == 1
    optimizer.load_state_dict(saved)
    assert len(parts.state) == len(parts.__twins__.state) == 0
    assert parts.hyperparams[0]["lr"] == 0.1


def test_the_keys_of_the_state_are_names_which_lead_to_no_parameter() -> None:
    """Rule 5: ``optimizer.state`` is a path of its own, so its keys are names and not parameters."""
    model, loss = torch.nn.Linear(1, 1), torch.nn.Bilinear(1, 1, 1, bias=False)
    optimizer = SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
    other = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [other]})
    for param in (*model.parameters(), *loss.parameters(), other):
        param.grad = torch.ones_like(param)
    optimizer.step()
    named = partial(named_parameters, Parameters({"": model}), loss)
    state = OptimizerParts(optimizer, named=named).state
    assert list(state) == ["weight", "bias", "lossfn.weight", "#3"]
    assert [key in state for key in ("bias", model.bias, "nowhere", torch.ones(1))] == [True, True, False, False]
    assert state["bias"] is state[model.bias] is optimizer.state[model.bias]
    assert state["#3"] is optimizer.state[other]
    state["weight"] = {"step": 1}
    del state["#3"]
    assert optimizer.state[model.weight] == {"step": 1}
    assert repr(state) == "OptimizerState(weight, bias, lossfn.weight)"
    with pytest.raises(KeyError, match=r"optimizer\.state: there is no parameter 'wieght'\. Did you mean 'weight'\?"):
        state["wieght"]
    twin = OptimizerParts(optimizer, named=named).__twins__.state
    for statement in ('x["bias"] = {}', 'del x["bias"]', 'x["bias"]["step"] = 1', "x.clear()"):
        with pytest.raises(ProtectedException, match=r"Learner\.optimizer\.state"):
            exec(statement, {"x": twin})
    assert len(twin) == 3


def test_a_reader_of_the_state_makes_no_entry() -> None:
    """Reading a missing key of an optimizer's state adds an entry; reading it through a twin does not."""
    optimizer, params = two_groups()
    twin = OptimizerParts(optimizer).__twins__
    assert twin.state[params[0]] == {}
    assert len(optimizer.state) == 0
    with pytest.raises(ProtectedException, match=r"Learner\.optimizer\.state"):
        twin.state[params[0]] = {}


@pytest.mark.parametrize("name", ["step", "zero_grad", "load_state_dict", "add_param_group"])
def test_a_reader_cannot_step(name: str) -> None:
    optimizer, params = two_groups()
    params[0].grad = torch.ones(1)
    with pytest.raises(ProtectedException) as caught:
        getattr(OptimizerParts(optimizer).__twins__, name)
    assert str(caught.value) == (
        "Write access to Learner.optimizer disallowed.\n" + name + '() writes. Declare {"optimizer": Write()}.'
    )
    assert params[0] == 1
    OptimizerParts(optimizer).step()
    assert params[0].item() == pytest.approx(0.9)


def test_the_rest_of_an_optimizer_has_its_own_names() -> None:
    optimizer, _ = two_groups()
    parts = OptimizerParts(optimizer)
    assert parts.param_groups is optimizer.param_groups
    assert parts.defaults is optimizer.defaults
    with pytest.raises(ProtectedException, match=r"Learner\.optimizer\.param_groups"):
        parts.__twins__.param_groups[0]["lr"] = 1
    with pytest.raises(AttributeError):
        _ = parts.unheard_of
    assert repr(parts) == "OptimizerParts(SGD)"


@pytest.mark.parametrize("name", ["hyperparams", "state", "param_groups", "new"])
def test_nothing_of_an_optimizer_is_replaced(name: str) -> None:
    optimizer, _ = two_groups()
    with pytest.raises(UsageError) as caught:
        setattr(OptimizerParts(optimizer, "optimizer.gen"), name, [])
    assert str(caught.value) == (
        f"optimizer.gen.{name} cannot be replaced: the training core holds the optimizer. Change it in place, as "
        f'optimizer.gen.hyperparams[0]["lr"] = 0.1.'
    )


def test_several_optimizers_have_twins_by_name() -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    named = Named("optimizer", {"gen": OptimizerParts(optimizer, "optimizer.gen")})
    with pytest.raises(ProtectedException) as caught:
        named.__twins__.gen.hyperparams[0]["lr"] = 1
    assert caught.value.path == "optimizer.gen.hyperparams"
    named.gen.hyperparams[0]["lr"] = 0.7
    assert named.__twins__.gen.hyperparams[0]["lr"] == 0.7


def test_hyperparameters_have_a_twin_of_their_own() -> None:
    optimizer, _ = two_groups()
    twin = readonly(OptimizerParts(optimizer).hyperparams, "")
    assert isinstance(twin, HyperParams)
    with pytest.raises(ProtectedException, match=r"Learner\.optimizer\.hyperparams"):
        twin[0]["lr"] = 1
