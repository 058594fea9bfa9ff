"""Parameters and gradients by name, looked up in the modules at each access."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import Learner, ProtectedException, TorchCore
from flowtrain.state.parameters import Gradients, Parameters
from tests.support.untyped import untyped


def learner_of(model: Any, **options: Any) -> Learner:
    core = TorchCore(device="cpu", **options)
    return Learner(model, cross_entropy, default_callbacks=False, core=core)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            out: Tensor = self.used(inputs)
            return out

    model = Half()
    learner = learner_of(model, accumulate=3, clip_grad_norm=1.0, clip_grad_value=1.0)
    learner.fit(1, data=[(torch.ones(5, 6), torch.zeros(5, dtype=torch.long))] * 4)
    assert list(learner.batch.grads) == ["used.weight", "used.bias"]
    assert "unused.weight" not in learner.batch.grads
    with pytest.raises(KeyError, match=r"unused\.bias has no gradient: it took no part .*\. Test `name in"):
        learner.batch.grads["unused.bias"]
    with pytest.raises(KeyError, match=r"there is no parameter 'used\.wieght'\. Did you mean 'used\.weight'\?"):
        learner.params["used.wieght"]
    assert len(learner.params) == 4
    assert learner.params["used.bias"] is model.used.bias


def test_parameters_are_found_by_the_names_they_are_listed_under() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.scale = nn.Parameter(torch.ones(()))

    one, several = Tied(), {"gen": Tied(), "disc": Tied()}
    params = learner_of(one).params
    assert {name: id(param) for name, param in params.items()} == {n: id(p) for n, p in one.named_parameters()}
    named = learner_of(several).params
    assert list(named)[:2] == ["gen.scale", "gen.inner.0.weight"]
    for name, param in named.items():
        prefix, rest = name.split(".", 1)
        assert param is several[prefix].get_parameter(rest)
    with pytest.raises(KeyError, match="there is no parameter 'scale'"):
        named["scale"]


def test_a_gradient_is_replaced_by_assigning_and_its_twin_refuses() -> None:
    """Rule 5: ``batch.grads`` is a mapping; a handler that only reads it gets a read-only twin."""
    model = nn.Linear(2, 1)
    grads = Gradients(Parameters({"": model}))
    assert (len(grads), list(grads)) == (0, []), "no backward pass has run"
    new = torch.ones(1, 2)
    grads["weight"] = new
    assert model.weight.grad is new
    assert grads["weight"] is new
    assert dict(grads.twin) == {"weight": new}
    with pytest.raises(ProtectedException, match=r"^Write access to Learner\.batch\.grads disallowed\."):
        untyped(grads.twin)["weight"] = torch.zeros(1, 2)
    with pytest.raises(KeyError, match=r"there is no parameter 'wieght'\. Did you mean 'weight'\?"):
        grads["wieght"] = new


def test_a_name_may_be_tested_and_looked_up_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(2, 1)
    params = Parameters({"": linear})
    with pytest.raises(KeyError, match=r"there is no parameter 0\."):
        params[untyped(0)]
    # A test of a name must not pay for the search for the nearest one.
    monkeypatch.setattr("flowtrain.state.parameters.nearest", None)
    gradients = Gradients(params)
    assert [name in params for name in ("weight", "weigth", 0)] == [True, False, False]
    assert params.get("weight") is linear.weight
    assert (params.get("weigth"), params.get(0, 1)) == (None, 1)
    assert ("weight" in gradients, gradients.get("weight")) == (False, None)
    linear.weight.grad = torch.ones(1, 2)
    assert "weight" in gradients
    assert gradients.get("weight") is linear.weight.grad
