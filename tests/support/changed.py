"""A model, and changes that training makes to it and to its optimizer beside all ``state_dict``."""

from __future__ import annotations

import copy
from collections.abc import Callable as Function
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from flowtrain import (
    Access,
    Callback,
    EpochBegin,
    Event,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.testing import tiny_learner


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


def put_head(learner: Any, **options: Any) -> None:
    learner.model.head = nn.Linear(4, 1, device=learner.model.head.weight.device, **options)
