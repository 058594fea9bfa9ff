"""Attributes of modules, loss functions and optimizers that training changed are restored, or refused by name."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    CheckpointError,
    EpochBegin,
    Event,
    FitBegin,
    Learner,
    Phase,
    TrainingPhase,
)
from flowtrain.callbacks import Checkpointer
from tests.support.changed import Do, Net, learner_of, weights


class Settings:
    """A configuration object, as many models have one."""

    def __init__(self) -> None:
        self.factor: Any = 1.0
        self.users: Any = set()  # a forward pass adds the model


class Configured(Net):
    """A model whose parts share a configuration object."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = Settings()
        self.back.config = self.config
        self.scaled: Any = partial(torch.mul, other=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.config.users.add(self)
        out: torch.Tensor = self.scaled(super().forward(x)) * self.back.config.factor
        return out


class Loss:
    """A loss function that is no module and has a module in an attribute."""

    def __init__(self) -> None:
        self.weight: Any = torch.ones(())
        self.weights: Any = {"a": torch.ones(1)}
        self.huber = nn.HuberLoss()
        self.last: Any = None

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.last = torch.distributions.Normal(outputs.detach(), 1.0)  # a left-over that no later step reads
        squares = self.weight * self.weights["a"].to(outputs.device) * (outputs - targets).square()
        loss: torch.Tensor = squares.mean() + self.huber(outputs, targets)
        return loss


class Slower(torch.optim.SGD):
    """An optimizer with a tensor outside of its groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)
        self.rate: Any = torch.full((), 0.05)

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] = self.rate.item()
        return super().step(closure)


def move_to_the_end(learner: Any) -> None:
    layers = learner.model.back._modules
    layers["0"] = layers.pop("0")


@pytest.mark.parametrize(
    "do",
    [
        lambda learner: setattr(learner.model.config, "factor", 0.5),
        lambda learner: setattr(learner.model.config, "factor", torch.full_like(learner.model.scale, 0.5)),
        lambda learner: learner.model.scaled.keywords.update(other=0.5),
        lambda learner: setattr(learner.lossfn, "weight", torch.tensor(0.5)),
        lambda learner: learner.lossfn.weight.mul_(0.5),
        lambda learner: learner.lossfn.weights["a"].mul_(0.5),
        lambda learner: setattr(learner.lossfn.huber, "delta", 0.01),
        lambda learner: learner.optimizer.rate.mul_(0.2),
        move_to_the_end,
    ],
)
def test_rule_28_what_objects_hold_goes_on(do: Any, tmp_path: Path) -> None:
    """Rule 28: also for objects that are no modules, such as a configuration, and for the order of layers."""

    def learner(number: int) -> Learner:
        model = Configured()
        model.back = nn.Sequential(nn.Linear(1, 1), nn.Tanh())
        model.head = nn.Linear(1, 1)
        model.back.config = model.config
        callbacks = [Do(do, number=number), Checkpointer(tmp_path / str(number))]
        return learner_of(*callbacks, model=model, lossfn=Loss(), optimizer=Slower)

    torch.manual_seed(1)
    other = learner(99)
    other.fit(3)
    torch.manual_seed(1)
    whole = learner(2)
    whole.fit(3)
    resumed = learner(2)
    torch.manual_seed(1)
    resumed.fit(3, resume=tmp_path / "2" / "epoch-0002.ckpt")
    assert weights(resumed) == weights(whole) != weights(other)
    whole.load(tmp_path / "2" / "epoch-0002.ckpt")
    assert whole.model.config.users == {whole.model}


def test_a_module_that_training_put_into_a_loss_function_is_asked_for(tmp_path: Path) -> None:
    do = Do(lambda learner: setattr(learner.lossfn, "huber", nn.MSELoss()))
    learner_of(do, Checkpointer(tmp_path / "a"), lossfn=Loss()).fit(2)
    with pytest.raises(CheckpointError, match=r"training left a MSELoss at lossfn\.huber, and the learner has a Huber"):
        learner_of(lossfn=Loss()).load(tmp_path / "a")


def test_a_function_that_a_loss_function_replaced_is_refused(tmp_path: Path) -> None:
    class Reduced(Loss):
        reduce: Any

        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = self.reduce((outputs - targets) ** 2)
            return loss

    lossfn = Reduced()
    lossfn.reduce = torch.mean
    do = Do(lambda learner: setattr(learner.lossfn, "reduce", torch.sum))
    with pytest.raises(CheckpointError) as caught:
        learner_of(do, Checkpointer(tmp_path), lossfn=lossfn).fit(2)
    assert str(caught.value).startswith(
        "lossfn.reduce cannot be in a checkpoint: training has replaced it by <built-in"
    )
    assert "Keep a plain value in the attribute and build the object from it. If a forward pass" in str(caught.value)


CHANGED: list[tuple[Any, Any]] = [
    (None, torch.Size((2, 3))),
    (frozenset({1}), frozenset({1, 2})),
    (None, {"a": [frozenset({1}), {2}], "b": (frozenset[int](), torch.Size((1,)))}),
    ([1, 0], [True, False]),
    ({"n": (2,)}, {"n": (2.0,)}),
    ({1}, {True}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ([0.0], [-0.0]),
]


@pytest.mark.parametrize(("built", "trained"), CHANGED, ids=repr)
def test_rule_28_an_attribute_comes_back_in_its_types(built: Any, trained: Any, tmp_path: Path) -> None:
    """Rule 28: `Size` came back as a tuple, a frozenset as a set, and values of other types were taken for the same."""
    first, second = Net(), Net()
    first.last = second.last = None
    first.config, second.config = copy.deepcopy(built), copy.deepcopy(built)
    learner = learner_of(
        Do(lambda learner: setattr(learner.model, "config", trained)), Checkpointer(tmp_path), model=first
    )
    learner.fit(2)
    learner_of(Checkpointer(tmp_path), Do(print, number=0), model=second).load(tmp_path)
    assert repr(second.config) == repr(trained)
    learner.load(tmp_path / "epoch-0001.ckpt")  # undoes the change
    assert repr(first.config) == repr(built)


def write_data(tensor: torch.Tensor) -> None:
    tensor.data.mul_(2)


def write_numpy(tensor: torch.Tensor) -> None:
    tensor.numpy()[:] *= 2


def made_in_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def write_inference(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(2)


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda: torch.ones(3), write_data),
        (lambda: torch.ones(3), write_numpy),
        (made_in_inference, write_inference),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), write_data),
        (lambda: torch.ones(3).to_sparse(), lambda tensor: tensor.mul_(2)),
    ],
    ids=["data", "numpy", "inference", "conjugate", "sparse"],
)
def test_rule_28_a_change_in_place_that_torch_does_not_count(make: Any, write: Any, tmp_path: Path) -> None:
    """Rule 28: a write through ``.data`` or numpy leaves the version of the tensor as it is, and was not saved."""
    first, second = Net(), Net()
    first.config, second.config = make(), make()
    learner = learner_of(Do(lambda learner: write(learner.model.config)), Checkpointer(tmp_path), model=first)
    learner.fit(2)
    learner_of(Checkpointer(tmp_path), Do(print, number=0), model=second).load(tmp_path)
    found: Any = second.config
    assert found.to_dense().tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(CheckpointError, match=r"^model\.config was changed in place since training began"):
        learner.load(tmp_path / "epoch-0001.ckpt")


def holding_itself(kind: type) -> Any:
    """Return a container in which it is the only part itself."""
    if kind is dict:
        value: Any = {}
        value["self"] = value
    else:
        inner: list[Any] = []
        value = kind([inner])
        (inner if kind is tuple else value).append(value)
    return value


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_an_attribute_that_holds_itself_is_an_object(kind: type, tmp_path: Path) -> None:
    """Its copy in plain values would have no end, so it stays as it is, and another one in its place is refused."""
    model = Net()
    config = model.weights["config"] = holding_itself(kind)
    model.config = config
    learner = learner_of(Checkpointer(tmp_path), model=model)
    learner.fit(1)
    learner.load(tmp_path)
    assert model.config is model.weights["config"] is config

    def replace(learner: Any) -> None:
        learner.model.config = holding_itself(kind)

    with pytest.raises(CheckpointError, match=r"^model\.config cannot be in a checkpoint: training has replaced it"):
        learner_of(Do(replace), Checkpointer(tmp_path / "other"), model=model).fit(2)


def test_a_forward_that_was_covered_is_refused(tmp_path: Path) -> None:
    def cover(learner: Any) -> None:
        learner.model.act.forward = torch.sigmoid

    with pytest.raises(CheckpointError, match=r"^model\.act\.forward cannot be in a checkpoint"):
        learner_of(Do(cover), Checkpointer(tmp_path)).fit(2)


def test_a_module_with_a_state_of_its_own_is_left_alone(tmp_path: Path) -> None:
    class Own(Net):
        def get_extra_state(self) -> str:
            return "tanh" if self.function is torch.tanh else "sigmoid"

        def set_extra_state(self, state: str) -> None:
            self.function = getattr(torch, state)

    change = Do(lambda learner: setattr(learner.model, "function", torch.sigmoid))
    learner_of(change, Checkpointer(tmp_path), model=Own()).fit(2)
    learner = learner_of(model=Own())
    learner.load(tmp_path)
    assert learner.model.function is torch.sigmoid


def reverse(gradient: torch.Tensor) -> torch.Tensor:
    return -gradient


def twice(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


@pytest.mark.parametrize("at", [(FitBegin, Phase, 1), (EpochBegin, TrainingPhase, 2)])
def test_hooks(at: tuple[type[Event], type[Phase], int], tmp_path: Path) -> None:
    event, phase, number = at

    def add(learner: Any) -> None:
        learner.model.act.register_forward_hook(twice)

    class Always(Do):
        def load_state_dict(self, state: Any) -> None:
            """Count again from zero: the hook is added in each fit."""

    kind = Do if event is EpochBegin else Always
    learner_of(kind(add, event, number, phase), Checkpointer(tmp_path)).fit(2)
    resumed = learner_of(kind(add, event, number, phase), Checkpointer(tmp_path))
    if event is FitBegin:
        resumed.fit(3, resume=tmp_path)
        return
    message = r"^The checkpoint was taken with other hooks: forward_hook twice, added to model\.act in training, and"
    with pytest.raises(CheckpointError, match=message):
        resumed.fit(3, resume=tmp_path)


def test_a_hook_that_was_removed(tmp_path: Path) -> None:
    def learner() -> Learner:
        model = Net()
        handle = model.head.weight.register_hook(reverse)
        return learner_of(Do(lambda learner: handle.remove()), Checkpointer(tmp_path), model=model)

    learner().fit(2)
    with pytest.raises(CheckpointError, match=r"backward_hook reverse, removed from model\.head\.weight in training"):
        learner().fit(3, resume=tmp_path)
