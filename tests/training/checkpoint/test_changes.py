"""A checkpoint restores the changes that training made beside all ``state_dict``, or refuses them by name."""

from __future__ import annotations

import copy
from collections.abc import Callable as Function
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CheckpointError,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    UndeclaredWriteError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, Recorder
from flowtrain.testing import tiny_learner
from flowtrain.testing.values import learner_leaves


class Net(nn.Module):
    """A frozen backbone in eval mode, a head, and several attributes that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back: Any = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval()
        self.drop: Any = nn.Dropout(0.0)
        self.act: Any = nn.ReLU()
        self.head: Any = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.factor: Any = 1.0
        self.weights: Any = {"a": [1.0, 2.0]}
        self.function: Any = torch.tanh
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.function(self.act(self.drop(self.back(x))))
        self.last = torch.distributions.Normal(hidden, 1.0)  # a left-over that no later step reads
        out: torch.Tensor = self.head(hidden * self.scale * self.factor * self.weights["a"][0])
        return out


class Do(Callback):
    """Calls a function with the learner once, at the n-th event of a type in a phase."""

    def __init__(
        self, do: Function[[Any], object], event: type[Event] = EpochBegin, number: int = 2,
        phase: type[Phase] = TrainingPhase,
    ) -> None:  # fmt: skip
        self.do, self.event, self.number, self.phase, self.seen = do, event, number, phase(), 0

    def state_access(self) -> Access:
        return {"model": Write(), "optimizer": Write(), "lossfn": Write()}

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if type(event) is self.event and phase is self.phase:
            self.seen += 1
            if self.seen == self.number:
                self.do(learner)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def head_alone(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in params if each.requires_grad], lr=0.05, momentum=0.9)


def learner_of(*callbacks: Callback, model: Any = None, **options: Any) -> Learner:
    chosen: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9), "n_batches": 4, **options}
    return tiny_learner(*callbacks, model=model or Net(), **chosen)


def weights(learner: Learner) -> list[list[float]]:
    return [value.flatten().tolist() for value in learner.model.state_dict().values()]


def unfreeze(learner: Any) -> None:
    learner.model.back.requires_grad_(True).train()


def add_group(learner: Any) -> None:
    unfreeze(learner)
    learner.optimizer.add_param_group({"params": list(learner.model.back.parameters()), "lr": 0.01, "name": "back"})


def regroup(learner: Any) -> None:
    """Move one parameter to a group of its own in front, and reverse the order of the others."""
    first, *rest = learner.optimizer.param_groups[0]["params"]
    group = learner.optimizer.param_groups[0]
    group["params"] = rest[::-1]
    learner.optimizer.param_groups.insert(0, {**group, "params": [first], "lr": 0.2, "note": [1, "a"]})


def take_out(learner: Any) -> None:
    bias = learner.optimizer.param_groups[0]["params"].pop()
    learner.optimizer.state.pop(bias, None)


def set_many(learner: Any) -> None:
    model = learner.model
    model.drop.p, model.factor, model.weights["a"][0] = 0.3, 0.5, 0.25
    model.back[1].momentum = 0.7
    model.scale = torch.full_like(model.scale, 2.0)
    model.new = (3, "x", torch.arange(2))
    del model.weights["a"][1]


CHANGES: dict[str, tuple[Function[[Any], object], dict[str, Any]]] = {
    "unfreeze": (unfreeze, {}),
    "freeze": (lambda learner: learner.model.head.weight.requires_grad_(False), {}),
    "eval": (lambda learner: learner.model.drop.eval(), {}),
    "add_group": (add_group, {"optimizer": head_alone}),
    "regroup": (regroup, {}),
    "take_out": (take_out, {}),
    "attributes": (set_many, {}),
    "buffer in place": (lambda learner: learner.model.scale.mul_(3), {}),
    "new buffer": (lambda learner: learner.model.register_buffer("more", torch.ones(2), persistent=False), {}),
    "loss module": (lambda learner: setattr(learner.lossfn, "beta", 0.1), {"lossfn": nn.SmoothL1Loss()}),
    "defaults": (lambda learner: learner.optimizer.defaults.update(lr=0.7), {}),
}


def all_of(learner: Learner) -> dict[str, Any]:
    """Return the weights and every attribute that the changes of this module touch."""
    model, optimizer = learner.model, learner.optimizer
    names = {id(param): name for name, param in model.named_parameters()}
    return copy.deepcopy({
        "weights": weights(learner),
        "frozen": [name for name, param in model.named_parameters() if not param.requires_grad],
        "modes": [module.training for module in model.modules()],
        "groups": [
            {**group, "params": [names[id(param)] for param in group["params"]]} for group in optimizer.param_groups
        ],
        "defaults": optimizer.defaults,
        "attributes": [model.drop.p, model.factor, model.weights, model.back[1].momentum,
                       repr(getattr(model, "new", 0))],
        "buffers": [(name, value.tolist()) for name, value in model.named_buffers()],
        "beta": getattr(learner.lossfn, "beta", None),
    })  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("event", [EpochBegin, BatchEnd, EpochEnd])
@pytest.mark.parametrize("stop", [2, 3])
def test_rule_28_what_training_changed_goes_on(change: str, event: type[Event], stop: int, tmp_path: Path) -> None:
    """Rule 28: the change is restored to the bit, by resuming and by ``load``."""
    do, options = CHANGES[change]
    number = 5 if event is BatchEnd else 2

    def learner(*callbacks: Callback) -> Learner:
        lossfn = nn.SmoothL1Loss() if "lossfn" in options else nn.functional.mse_loss
        return learner_of(Do(do, event, number), *callbacks, **{**options, "lossfn": lossfn})

    torch.manual_seed(1)
    whole = learner(Checkpointer(tmp_path))
    whole.fit(4)
    resumed = learner(Checkpointer(tmp_path))
    resumed.fit(4, resume=tmp_path / f"epoch-000{stop}.ckpt")
    assert all_of(resumed) == all_of(whole)
    loaded = learner()
    loaded.load(tmp_path / "epoch-0004.ckpt")
    assert all_of(loaded) == all_of(whole)


@pytest.mark.parametrize("change", CHANGES)
def test_within_an_epoch_and_before_the_change(change: str, tmp_path: Path) -> None:
    """Load a checkpoint from the epoch of the change, or from before it, into a learner that has trained further."""
    do, options = CHANGES[change]
    if change == "loss module":
        options = {"lossfn": nn.SmoothL1Loss()}
    torch.manual_seed(1)
    learner = learner_of(Do(do, BatchEnd, 6), Checkpointer(tmp_path, every_steps=7), **options)
    learner.fit(1)
    before = all_of(learner)
    learner.fit(1)
    changed = all_of(learner)
    assert {**changed, "weights": 0, "buffers": 0} != {**before, "weights": 0, "buffers": 0} or "buffer" in change
    if change == "buffer in place":
        with pytest.raises(CheckpointError, match=r"^model\.scale was changed in place since training began, and the"):
            learner.load(tmp_path / "epoch-0001.ckpt")
        assert all_of(learner) == changed
        return
    learner.load(tmp_path / "epoch-0001.ckpt")
    assert all_of(learner) == before
    learner.load(tmp_path / "epoch-0002.ckpt")
    assert all_of(learner) == changed


def test_within_the_epoch_of_the_change(tmp_path: Path) -> None:
    class Ask(Callback):
        count = 0

        @on(BatchEnd)
        def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.count += 1
            learner.request_checkpoint(tmp_path / f"{self.count}.ckpt")

    def learner(*callbacks: Callback) -> Learner:
        return learner_of(Do(unfreeze, BatchEnd, 6), *callbacks)

    whole = learner(Ask())
    whole.fit(3)
    for number in (10, 11, 13, 15):  # in training and in validation, each after the change
        resumed = learner()
        resumed.fit(3, resume=tmp_path / f"{number}.ckpt")
        assert all_of(resumed) == all_of(whole), number


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


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_a_model_without_shapes_is_refused(tmp_path: Path) -> None:
    learner_of(Checkpointer(tmp_path), model=nn.Linear(1, 1)).fit(1)
    learner = learner_of(model=nn.LazyLinear(1))
    with pytest.raises(
        CheckpointError, match="its weight has a shape, the learner's has none yet: call the model once"
    ):
        learner.load(tmp_path)
    learner.model(torch.ones(1, 1))
    learner.load(tmp_path)


# --- changes that the user made when building the learner


def test_what_the_learner_is_built_with_stays(tmp_path: Path) -> None:
    """Only attributes that training changed are restored, so a next stage of training can build the model anew."""
    learner_of(Do(lambda learner: setattr(learner.model.drop, "p", 0.25)), Checkpointer(tmp_path)).fit(2)
    model = Net()
    unfreeze(type("Holder", (), {"model": model}))
    model.factor, model.drop.p = 7.0, 0.9
    learner = learner_of(model=model)
    learner.load(tmp_path)
    assert model.back[0].weight.requires_grad
    assert model.back.training
    assert (model.factor, model.drop.p) == (7.0, 0.25)


def test_a_resumed_fit_says_what_is_built_otherwise(tmp_path: Path) -> None:
    learner_of(Checkpointer(tmp_path)).fit(1)
    model = Net()
    unfreeze(type("Holder", (), {"model": model}))
    with pytest.warns(UserWarning, match="was built differently") as caught:
        learner_of(Checkpointer(tmp_path), model=model).fit(2, resume=tmp_path)
    assert str(caught[0].message) == (
        "The learner of the checkpoint was built differently: model.back.0.weight was frozen there and is trained "
        "here, model.back.0.bias was frozen there and is trained here, model.back.1.weight was frozen there and is "
        "trained here, and 4 more. The fit continues with this learner. For the same result build it as the other one "
        "was built."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: torch.optim.SGD([{"params": [each]} for each in params]), r"it had groups of \[6\] parameters"),
        (
            lambda params: torch.optim.SGD(list(params)[::-1]),
            r"it had model\.back\.0\.weight where the learner's has model\.head\.bias\. Build the learner with that ",
        ),
    ],
)
def test_groups_of_another_build_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    learner_of(Checkpointer(tmp_path), optimizer=torch.optim.SGD).fit(1)
    learner = learner_of(optimizer=make)
    before = list(learner_leaves(learner))
    with pytest.raises(CheckpointError, match=message):
        learner.load(tmp_path)
    assert [path for path, _ in learner_leaves(learner)] == [path for path, _ in before]


def test_groups_that_training_made_may_be_built(tmp_path: Path) -> None:
    learner_of(Do(add_group), Checkpointer(tmp_path), optimizer=head_alone).fit(2)

    def both(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.SGD([{"params": params[4:]}, {"params": params[:4]}], lr=1.0)

    learner = learner_of(optimizer=both)
    learner.load(tmp_path)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.05, 0.01]


# --- values that a file cannot hold


def put_head(learner: Any, **options: Any) -> None:
    learner.model.head = nn.Linear(4, 1, device=learner.model.head.weight.device, **options)


def replace_act(learner: Any) -> None:
    learner.model.act = nn.GELU()


def remove_act(learner: Any) -> None:
    learner.model.back.add_module("extra", nn.Identity())


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (replace_act, r"training left a GELU at model\.act, and the learner has a ReLU there\. Build the lear"),
        (remove_act, r"training left a Identity at model\.back\.extra, and the learner has nothing there"),
        (lambda learner: put_head(learner, bias=False), r"has no head\.bias"),
    ],
)
def test_a_module_that_training_put_there_is_asked_for(do: Any, message: str, tmp_path: Path) -> None:
    def take_out_too(learner: Any) -> None:
        do(learner)
        kept = {id(param) for param in learner.model.parameters()}
        group = learner.optimizer.param_groups[0]
        for param in group["params"]:
            if id(param) not in kept:
                learner.optimizer.state.pop(param, None)
        group["params"] = [param for param in group["params"] if id(param) in kept]

    whole = learner_of(Do(take_out_too), Checkpointer(tmp_path))
    whole.fit(2)
    learner = learner_of(Do(take_out_too))
    before = all_of(learner)
    for take in (partial(learner.load, tmp_path), partial(learner.fit, 3, resume=tmp_path)):
        with pytest.raises(CheckpointError, match=message):
            take()
        assert all_of(learner) == before
    if do is replace_act:
        learner.model.act = nn.GELU()
        learner.load(tmp_path)  # this learner is built as the error asks
        with pytest.raises(CheckpointError, match=r"training left a ReLU at model\.act, and the learner has a GELU"):
            whole.load(tmp_path / "epoch-0001.ckpt")


def test_an_object_that_training_replaced_is_refused(tmp_path: Path) -> None:
    def other(learner: Any) -> None:
        learner.model.function = torch.sigmoid

    learner = learner_of(Do(other), Checkpointer(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        learner.fit(2)
    assert str(caught.value).startswith(
        "model.function cannot be in a checkpoint: training has replaced it by <built-in method sigmoid of type"
    )
    assert "from it, or define get_extra_state() and set_extra_state() in Net. If a forward" in str(caught.value)
    learner.load(tmp_path)  # the learner has the function that it had when training began
    assert learner.model.function is torch.tanh


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


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (
            lambda learner: put_head(learner),
            r"^optimizer has, in group 0, a parameter of shape \(1, 4\) that no longer belongs to the model or the lo",
        ),
        (
            lambda learner: learner.optimizer.param_groups[0]["params"].pop(),
            r"^optimizer has state of model\.head\.bias, of shape \(1,\), which is in none of its groups\. In the ha",
        ),
    ],
)
def test_what_a_handler_leaves_in_an_optimizer(do: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        learner_of(Do(do), Checkpointer(tmp_path)).fit(2)


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


# --- several models, compiled parts, and strict mode


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    class Both(TrainingPhase):
        """Trains both models on the sum of their losses."""

        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, x=raw[0], y=raw[1]) as batch:
                out = learner.model.one(batch.x) + learner.model.two(batch.x)
                batch.loss = (out - batch.y).square().mean()
                learner.backward(self, batch.loss)
                learner.update(self)

    def change(learner: Any) -> None:
        learner.model.two.back.requires_grad_(True).train()
        learner.optimizer.two.add_param_group({"params": list(learner.model.two.back.parameters())})
        learner.model.one.drop.p = 0.5

    def learner() -> Learner:
        optimizer = {"one": head_alone, "two": head_alone}
        data = {Both: [(torch.ones(3, 1), torch.zeros(3, 1))] * 3}
        models = {"one": Net(), "two": Net()}
        keep = Checkpointer(tmp_path, monitor=None)
        return tiny_learner(Do(change, phase=Both), keep, Recorder(), model=models, optimizer=optimizer, data=data,
                            default_callbacks=False)  # fmt: skip

    whole = learner()
    whole.fit(4)
    resumed = learner()
    resumed.fit(4, resume=tmp_path / "epoch-0002.ckpt")
    for name in ("one", "two"):
        assert str(resumed.model[name].state_dict()) == str(whole.model[name].state_dict())
    assert [len(group["params"]) for group in resumed.optimizer.two.param_groups] == [2, 4]
    assert resumed.model.one.drop.p == 0.5
    assert resumed.model.two.back.training


@pytest.mark.cpu_only("torch.compile cannot trace a device that is written in Python")
def test_compiled_parts_have_the_names_of_those_that_are_not(tmp_path: Path) -> None:
    model = Net()
    model.back = torch.compile(model.back, backend="eager")
    learner_of(Do(unfreeze), Checkpointer(tmp_path), model=model).fit(2)
    learner = learner_of()
    learner.load(tmp_path)
    assert learner.model.back[0].weight.requires_grad
    assert learner.model.back.training


def test_strict_mode_sees_a_layer_that_is_unfrozen() -> None:
    class Sly(Callback):
        @on(EpochBegin, TrainingPhase, access={"params": Write()})
        def ok(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            learner.params["back.0.weight"].requires_grad_(True)

        @on(EpochEnd, ValidationPhase, access={"batch": Write()})
        def sly(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            model.back[0].weight.requires_grad_(False)

    model = Net()
    with pytest.raises(UndeclaredWriteError, match=r"changed model\.back\.0\.weight"):
        learner_of(Sly(), model=model, strict=True).fit(1)
