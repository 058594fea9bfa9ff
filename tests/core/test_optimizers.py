"""Optimizers as a user passes them: which parameters each one gets, and which optimizers are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from flowtrain import (
    CheckpointError,
    CoreError,
    ExecutorError,
    Learner,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    param_groups,
)
from flowtrain.callbacks import Checkpointer, LearningRate, Scheduler, constant
from flowtrain.core.optimizers import clip_gradients, fused, make_optimizers, zeroing
from tests.support.accelerator import DEVICE, needs_accelerator
from tests.support.models import Tempered
from tests.support.untyped import untyped

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


def sparse_and_dense() -> tuple[torch.Tensor, nn.Parameter]:
    """Return two parameters with the gradients [4, 0, 0], sparse and with an index that is repeated, and [3, 0]."""
    embedding, weight = nn.Embedding(3, 1, sparse=True), nn.Parameter(torch.ones(2))
    embedding(torch.tensor([0, 0])).sum().mul(2).backward()
    weight.grad = torch.tensor([3.0, 0.0])
    return embedding.weight, weight


def test_gradients_are_clipped_alike_if_some_are_sparse() -> None:
    sparse, dense = sparse_and_dense()
    assert sparse.grad is not None
    assert sparse.grad.is_sparse
    assert dense.grad is not None
    norm = clip_gradients(untyped([sparse, dense]), 1.0, None, needs_norm=True)
    assert norm is not None
    assert norm.item() == 5
    assert sparse.grad.is_sparse
    torch.testing.assert_close(sparse.grad.to_dense().flatten(), torch.tensor([0.8, 0.0, 0.0]))
    torch.testing.assert_close(dense.grad, torch.tensor([0.6, 0.0]))
    sparse, dense = sparse_and_dense()
    assert clip_gradients(untyped([sparse, dense]), None, 2.5, needs_norm=False) is None
    assert sparse.grad is not None
    assert dense.grad is not None
    assert sparse.grad.to_dense().flatten().tolist() == [2.5, 0, 0]
    assert dense.grad.tolist() == [2.5, 0]
    assert clip_gradients([nn.Parameter(torch.ones(1))], None, 2.5, needs_norm=False) is None


class Rows(nn.Module):
    """An embedding whose gradients may be sparse."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(torch.arange(10.0)[:, None], freeze=False, sparse=sparse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.rows(x)
        return rows.squeeze(-1)


@pytest.mark.parametrize("options", [{"clip_grad_norm": 1.0}, {"clip_grad_value": 0.5}, {"accumulate": 2}])
def test_sparse_gradients_are_trained_as_dense_ones(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 10, (6,), generator=generator), torch.zeros(6)) for _ in range(5)]
    trained = []
    for sparse in (False, True):
        model, core = Rows(sparse=sparse), TorchCore(device="cpu", **options)
        Learner(model, mse_loss, data=data, optimizer=torch.optim.SGD, default_callbacks=False, core=core).fit(2)
        trained.append(model.rows.weight.detach())
    torch.testing.assert_close(trained[0], trained[1])
    assert trained[0].flatten().tolist() != list(range(10))


def test_a_dry_run_of_sparse_gradients() -> None:
    data = [(torch.tensor([1, 1, 2]), torch.zeros(3))]
    learner = Learner(
        Rows(sparse=True), mse_loss, data=data, optimizer=torch.optim.SparseAdam, core=TorchCore(device="cpu")
    )
    assert len(learner.dry_run()) > 0


@needs_accelerator
def test_on_an_accelerator_they_are_fused_by_default() -> None:
    learner = Learner(Net(), cross_entropy, default_callbacks=False, optimizer=ADAMW, core=TorchCore(DEVICE))
    assert learner.optimizer.defaults["fused"] is True


# --- gradients are set to None


def with_gradients(make: type[torch.optim.Optimizer] = torch.optim.SGD) -> tuple[Any, list[torch.nn.Parameter]]:
    model = torch.nn.Linear(3, 2)
    optimizer: Any = untyped(make)(model.parameters(), lr=0.1)
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


# --- groups by patterns of names


class Parts(nn.Module):
    """A body with a normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)


def names_in(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    names = {id(param): name for name, param in model.named_parameters()}
    return [(group["name"], [names[id(param)] for param in group["params"]]) for group in groups]


def test_groups_by_patterns_in_order() -> None:
    model = Parts()
    groups = param_groups(model, {"head.*": {"lr": 1e-3}, "*.bias": {"lr": 1e-4, "momentum": 0.5}, "*": {}})
    assert names_in(model, groups) == [
        ("head.*", ["head.weight", "head.bias"]),
        ("*.bias", ["body.0.bias", "body.1.bias"]),
        ("*", ["body.0.weight", "body.1.weight"]),
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [
        (1e-3, 0.9), (1e-4, 0.5), (0.1, 0.9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("no_decay", "without"),
    [
        (True, ["body.0.bias", "body.1.weight", "body.1.bias", "head.bias"]),
        ("*.bias", ["body.0.bias", "body.1.bias", "head.bias"]),
        (("body.1.*", "head.weight"), ["body.1.weight", "body.1.bias", "head.weight"]),
        (False, []),
    ],
)
def test_parameters_without_weight_decay(no_decay: Any, without: list[str]) -> None:
    model = Parts()
    groups = param_groups(model, {"body.*": {}, "*": {"weight_decay": 0.2}}, no_decay=no_decay)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in dict(names_in(model, [group]))}
    assert all(value == (0.0 if name.endswith("no decay") else 0.1 if name == "body.*" else 0.2)
               for name, value in found.items())  # fmt: skip
    assert [name for pattern, names in names_in(model, groups) if pattern.endswith("no decay") for name in names] == (
        without
    )


def test_patterns_of_groups_that_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        param_groups(Parts(), {"head.*": {"lr": 1e-3}})
    assert str(caught.value) == (
        "param_groups: no pattern fits body.0.weight, body.0.bias, body.1.weight and 1 more. Add a last group for the "
        "others: {..., '*': {\"lr\": 1e-3}}."
    )
    with pytest.raises(UsageError, match=r"param_groups: the pattern 'haed\.\*' fits no parameter: names are body\.0"):
        param_groups(Parts(), {"haed.*": {}, "*": {}})


# --- parameters that no optimizer has


def line() -> list[Any]:
    return [(torch.ones(2, 2), torch.ones(2, 1)), (torch.zeros(2, 2), torch.ones(2, 1))]


def parts_learner(optimizer: Any = None, **options: Any) -> Learner:
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 3), head=nn.Linear(3, 1)))
    return Learner(
        model, mse_loss, data=line(), optimizer=optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        default_callbacks="quiet", core=TorchCore("cpu"), **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "no_decay", "text"),
    [
        ({"*": {}}, "*.biass", "param_groups(no_decay=...): the pattern '*.biass' fits no parameter: names are"),
        ({"*": {}}, None, "param_groups: no_decay is None. It is True, False, a pattern or a list of patterns."),
        ({"*": {}}, [1], "param_groups: no_decay is [1]. It is True, False, a pattern or a list of patterns."),
        (["*"], False, "param_groups: groups is ['*']. It maps patterns of names to the options of the groups: "),
        ({"*": None}, False, "param_groups: groups is {'*': None}. It maps patterns of names"),
    ],
)
def test_arguments_of_groups_that_are_refused(groups: Any, no_decay: Any, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        param_groups(Net(), groups, no_decay=no_decay)
    assert str(raised.value).startswith(text)


def test_the_parameters_of_the_loss_go_to_the_first_optimizer_that_is_made() -> None:
    models, loss = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "c": nn.Linear(1, 1)}, Tempered()
    wanted = {"a": torch.optim.SGD(models["a"].parameters(), lr=0.1), "b": torch.optim.SGD, "c": torch.optim.SGD}
    made = make_optimizers(wanted, models, [loss])
    held = {name: len(each.param_groups[0]["params"]) for name, each in made.items()}
    assert held == {"a": 2, "b": 2 + len(list(loss.parameters())), "c": 2}


class OwnSGD(torch.optim.SGD):
    """An optimizer of another module than torch's."""


def test_an_optimizer_is_named_as_a_program_calls_it() -> None:
    with pytest.raises(CoreError, match=rf"optimizer=partial\({__name__}\.OwnSGD, lr=\.\.\.\)"):
        learner_of(Net(), optimizer=OwnSGD(FOREIGN.parameters(), lr=0.1))


def test_a_layer_that_was_replaced_is_noticed_when_a_fit_begins() -> None:
    learner = parts_learner()
    learner.fit(1)
    learner.model.head = nn.Linear(3, 1)
    with pytest.raises(CoreError) as caught:
        learner.fit(1)
    assert str(caught.value) == (
        "head.weight, head.bias would not be trained: no optimizer has them, and SGD has parameters of shape (1, 3), "
        "(1,) that the model no longer has. A layer was replaced after the learner was built. Make the optimizer anew: "
        "learner.replace_optimizer(partial(torch.optim.SGD, lr=...))."
    )
    learner.replace_optimizer(partial(torch.optim.SGD, lr=0.1))
    before = learner.model.head.weight.clone()
    learner.fit(1)
    assert not torch.equal(learner.model.head.weight, before)


def test_a_parameter_that_was_forgotten_is_noticed_when_a_fit_begins() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    learner = Learner(
        model, mse_loss, data=line(), optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1),
        default_callbacks="quiet", core=TorchCore("cpu"),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="would not be trained") as caught:
        learner.fit(1)
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        "0.weight, 0.bias would not be trained: no optimizer has them, and they require gradients. Freeze them, "
        "requires_grad_(False), or put them into an optimizer: learner.replace_optimizer(partial(torch.optim.SGD, "
        "lr=...)) takes all parameters."
    )
    model[0].requires_grad_(False)
    learner.fit(1)  # without a warning


def test_a_fit_that_only_evaluates_needs_no_optimizer_for_a_new_layer() -> None:
    learner = parts_learner()
    learner.model.head = nn.Linear(3, 1)
    with pytest.warns(UserWarning, match="nothing is trained"):
        learner.fit(1, data={ValidationPhase: line()})


# --- replace_optimizer


def test_an_optimizer_is_replaced_between_two_fits() -> None:
    learner = parts_learner()
    learner.fit(1)
    first = learner.optimizer
    assert learner.replace_optimizer(partial(torch.optim.Adam, lr=0.01)) is first
    by_hand = deepcopy(learner.model)
    adam = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    for x, y in line():
        adam.zero_grad()
        mse_loss(by_hand(x), y).backward()
        adam.step()
    learner.fit(1)
    assert type(learner.optimizer) is torch.optim.Adam
    for name, value in by_hand.state_dict().items():
        assert torch.equal(learner.model.state_dict()[name], value)


@pytest.mark.parametrize("core", [{}, {"accumulate": 2}, {"clip_grad_norm": 1.0}, {"precision": "fp16"}], ids=str)
def test_a_replaced_optimizer_in_every_kind_of_core(core: Any) -> None:
    learners = [
        Learner(nn.Linear(2, 1), mse_loss, data=line(), optimizer=partial(torch.optim.SGD, lr=lr),
                default_callbacks="quiet", core=TorchCore("cpu", **core))
        for lr in (0.5, 0.1)
    ]  # fmt: skip
    learners[0].model.load_state_dict(learners[1].model.state_dict())
    learners[0].replace_optimizer(partial(torch.optim.SGD, lr=0.1))
    for learner in learners:
        learner.fit(2)
    assert torch.equal(learners[0].model.weight, learners[1].model.weight)


def test_handlers_see_the_new_optimizer() -> None:
    learner = parts_learner(callbacks=[Scheduler({LearningRate: constant(0.3)})])
    learner.replace_optimizer(partial(torch.optim.SGD, lr=0.1))
    learner.fit(1)
    assert learner.optimizer.param_groups[0]["lr"] == 0.3


def test_an_optimizer_that_does_not_fit_changes_nothing() -> None:
    learner = parts_learner()
    first = learner.optimizer
    with pytest.raises(CoreError, match=r"optimizer \(SGD\) has, in group 0, a parameter of shape \(7,\)"):
        learner.replace_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(7))], lr=0.1))
    assert learner.optimizer is first
    learner.fit(1)
    with learner:
        pass
    with pytest.raises(ExecutorError, match=r"replace_optimizer\(\) on a closed learner"):
        learner.replace_optimizer(torch.optim.SGD)


def test_a_checkpoint_has_the_new_optimizer(tmp_path: Path) -> None:
    def make(*callbacks: Any) -> Learner:
        learner = parts_learner(callbacks=callbacks)
        torch.manual_seed(0)
        learner.model.head = nn.Linear(3, 1)
        learner.replace_optimizer(partial(torch.optim.Adam, lr=0.01))
        return learner

    whole = make(Checkpointer(tmp_path))
    whole.fit(3)
    resumed = make(Checkpointer(tmp_path))
    resumed.fit(3, resume=tmp_path / "epoch-0002.ckpt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="it was a Adam, the learner has a SGD"):
        parts_learner().load(tmp_path)


def test_a_replaced_optimizer_after_a_fit_is_resumed_from(tmp_path: Path) -> None:
    """The second of two stages: its script makes the same learner, and replaces the optimizer before it resumes."""

    def second(learner: Learner) -> Learner:
        learner.replace_optimizer(partial(torch.optim.Adam, lr=0.01))
        return learner

    torch.manual_seed(0)
    whole = parts_learner(callbacks=[Checkpointer(tmp_path)])
    whole.fit(1)
    second(whole).fit(3)
    resumed = second(parts_learner(callbacks=[Checkpointer(tmp_path)]))
    resumed.fit(3, resume=tmp_path / "epoch-0002.ckpt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
