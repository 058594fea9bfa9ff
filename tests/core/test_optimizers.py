"""Optimizers as a user passes them: which parameters each one gets, and which optimizers are refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import CoreError, Learner, TorchCore, TrainingPhase
from flowtrain.core.optimizers import fused, make_optimizers, zeroing
from tests.support.accelerator import DEVICE, needs_accelerator
from tests.support.models import Tempered

ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


class Net(nn.Sequential):
    """A small network."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def learner_of(model: Any, lossfn: Any = cross_entropy, **options: Any) -> Learner:
    return Learner(model, lossfn, default_callbacks=False, core=TorchCore(device="cpu"), **options)


FOREIGN = nn.Linear(4, 5)


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (
            torch.optim.SGD(FOREIGN.parameters(), lr=0.1),
            r"optimizer \(SGD\) has, in group 0, a parameter of shape \(5, 4\) that is neither the model's nor the "
            r"loss function's, so training would not change the model. Make the optimizer from this model's "
            r"parameters, or pass a function: optimizer=partial\(torch.optim.SGD, lr=...\).",
        ),
        ("adam", r"optimizer is 'adam'. Pass an optimizer, or a function of the parameters such as "
                 r"partial\(torch.optim.AdamW, lr=1e-3\)."),
        (None, "optimizer is None. Pass an optimizer"),
        (list, r"optimizer was called with the parameters and returned list, which is no torch optimizer"),
        ({}, r"optimizer=\{\} has no optimizer. Pass one"),
        ({"gne": torch.optim.SGD}, r"optimizer\['gne'\] is called with the parameters of model 'gne', and there is no "
                                   r"such model, but one without a name. Use the models' names, or pass an "
                                   r"optimizer instance"),
        ({"a": ADAMW(FOREIGN.parameters())}, r"optimizer\['a'\] \(AdamW\) has, in group 0, a parameter"),
    ],
    ids=["foreign", "string", "None", "no optimizer", "empty", "unknown name", "foreign by name"],
)  # fmt: skip
def test_optimizers_that_do_not_fit(optimizer: Any, text: str) -> None:
    with pytest.raises(CoreError, match=text):
        learner_of(Net(), optimizer=optimizer)


def test_optimizers_that_do_not_fit_several_models() -> None:
    models = {"gen": Net(), "disc": Net()}
    with pytest.raises(CoreError, match=r"no such model \('gen', 'disc' are there\). Did you mean 'disc'\?"):
        learner_of(models, optimizer={"dics": ADAMW})
    with pytest.raises(CoreError, match="optimizer has nothing to train: the model has no parameters"):
        learner_of(nn.ReLU())


def test_the_optimizer_of_a_name_gets_the_parameters_of_that_model() -> None:
    models, lossfn = {"gen": Net(), "disc": nn.Linear(3, 1)}, Tempered()
    learner = learner_of(models, lossfn, optimizer={"disc": torch.optim.SGD, "gen": ADAMW})
    groups: Mapping[str, list[int]] = {
        name: [id(param) for group in optimizer.param_groups for param in group["params"]]
        for name, optimizer in learner.optimizer.items()
    }
    assert groups["gen"] == [id(param) for param in models["gen"].parameters()]
    # The parameters of the loss function go to the optimizer that is made first.
    assert groups["disc"] == [id(param) for param in (*models["disc"].parameters(), *lossfn.parameters())]
    assert learner.optimizer.gen is learner.optimizer["gen"]


def test_an_optimizer_instance_is_used_as_it_is() -> None:
    model = Net()
    body, head = model[0], model[2]
    assert isinstance(body, nn.Linear)
    assert isinstance(head, nn.Linear)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    frozen = body.weight.detach().clone()
    before = head.weight.detach().clone()
    learner = learner_of(model, optimizer=optimizer)
    learner.step(TrainingPhase, (torch.ones(5, 6), torch.zeros(5, dtype=torch.long)))
    assert learner.optimizer is optimizer
    assert torch.equal(body.weight, frozen)
    assert not torch.equal(head.weight, before)


def test_models_may_share_a_part() -> None:
    shared = nn.Linear(2, 2)
    models = {"online": nn.Sequential(shared, nn.Linear(2, 1)), "target": nn.Sequential(shared)}
    for optimizer in (ADAMW, {"online": ADAMW}):
        learner = learner_of(models, shared_loss(shared), optimizer=optimizer)
        made = learner.optimizer if callable(optimizer) else learner.optimizer.online
        assert len(made.param_groups[0]["params"]) == 4


def shared_loss(part: nn.Module) -> nn.Module:
    """Return a loss module that shares parameters with the model."""
    return nn.Sequential(part)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(CoreError, match=r"optimizer is LBFGS, whose step runs the model several times"):
        learner_of(Net(), optimizer=torch.optim.LBFGS)


def test_fused_where_torch_has_it_and_nothing_was_said() -> None:
    """On an accelerator torch has fused optimizers; here the CPU stands in for one."""
    params = list(nn.Linear(2, 2).parameters())
    adamw = torch.optim.AdamW

    def own(those: Any) -> torch.optim.Optimizer:
        return adamw(those)

    def is_fused(wanted: Any, slow: tuple[str, ...] = ()) -> bool:
        return bool(fused(wanted, params, slow)(params).defaults.get("fused"))

    assert is_fused(adamw)
    assert is_fused(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    assert not is_fused(adamw, ("cpu",)), "fused optimizers are no faster on the CPU"
    for said in ("fused", "foreach", "capturable", "differentiable"):
        options: dict[str, Any] = {said: False}
        assert not is_fused(partial(adamw, **options))
    assert not is_fused(torch.optim.Rprop), "torch has no fused Rprop"
    assert not is_fused(own), "a user's function chooses its own options"
    assert fused(adamw, [*params, nn.Parameter(torch.zeros(1, device="meta"))], ()) is adamw
    assert fused(adamw, [nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)], ()) is adamw

    class Own(torch.optim.AdamW):
        """An optimizer of a user."""

    assert fused(Own, params, ()) is Own


def test_the_first_two_arguments_stay_as_given() -> None:
    made = fused(partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25), [], ())([nn.Parameter(torch.zeros(1))])
    assert (made.defaults["lr"], made.defaults["weight_decay"]) == (0.5, 0.25)


def test_sparse_gradients_keep_the_optimizer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "__defaults__", ((),))
    dense, sparse = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    sgd = partial(torch.optim.SGD, lr=0.1)
    for model, expected in ((dense, True), (sparse, None), (nn.Sequential(dense, sparse), None)):
        assert make_optimizers(sgd, {"": model}, [])[""].defaults["fused"] is expected
    by_name = make_optimizers({"a": sgd}, {"a": dense}, [])
    assert by_name["a"].defaults["fused"] is True


@needs_accelerator
def test_on_an_accelerator_they_are_fused_by_default() -> None:
    learner = Learner(Net(), cross_entropy, default_callbacks=False, optimizer=ADAMW, core=TorchCore(DEVICE))
    assert learner.optimizer.defaults["fused"] is True


# --- gradients are set to None


def with_gradients(make: type[torch.optim.Optimizer] = torch.optim.SGD) -> tuple[Any, list[torch.nn.Parameter]]:
    model = torch.nn.Linear(3, 2)
    optimizer: Any = make(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    model(torch.ones(4, 3)).sum().backward()
    return optimizer, list(model.parameters())


def test_zeroing_drops_the_gradients_of_every_group_also_of_those_added_later() -> None:
    optimizer, params = with_gradients()
    zero = zeroing(optimizer)
    late = torch.nn.Parameter(torch.ones(2))
    late.grad = torch.ones(2)
    optimizer.add_param_group({"params": [late]})
    optimizer.load_state_dict(optimizer.state_dict())  # this replaces the list of groups
    zero()
    assert [param.grad for param in (*params, late)] == [None, None, None]


def test_zeroing_leaves_no_mark_but_for_a_profiler() -> None:
    optimizer, _ = with_gradients()
    assert zeroing(optimizer) != optimizer.zero_grad
    with torch.profiler.profile() as profiler:
        zeroing(optimizer)()
    assert "Optimizer.zero_grad#SGD.zero_grad" in {event.name for event in profiler.events() or ()}


def test_zeroing_is_an_optimizers_own_where_it_has_one() -> None:
    class Own(torch.optim.SGD):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.calls += 1
            super().zero_grad(set_to_none)

    optimizer, params = with_gradients(Own)
    zeroing(optimizer)()
    assert optimizer.calls == 1
    assert params[0].grad is None

    patched, params = with_gradients()
    zero = zeroing(patched)
    patched.zero_grad = lambda: None
    zero()
    assert params[0].grad is not None


def test_zeroing_is_torchs_own_function_where_somebody_has_replaced_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def theirs(optimizer: torch.optim.Optimizer) -> None:
        calls.append(optimizer)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", theirs)
    optimizer, params = with_gradients()
    zeroing(optimizer)()
    assert calls == [optimizer]
    assert params[0].grad is not None
