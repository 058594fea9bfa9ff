"""A learner's state in the middle of a batch, and the view of it that a declaration gives."""

from __future__ import annotations

from typing import Any

import torch

from flowtrain import Access, LearnerView, TrainingPhase
from flowtrain.callback.access import Declaration, declare
from flowtrain.core.torch_core import TorchCore
from flowtrain.state.by_phase import CONTAINERS
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.namespace import State
from flowtrain.state.partial_view import Owner
from flowtrain.state.views import bind_view


class Model(torch.nn.Module):
    """A model with two layers of different names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one number for each sample."""
        found: torch.Tensor = self.head(self.encoder(x))
        return found


def made(models: Named | None = None, optimizer: Any = torch.optim.SGD) -> LearnerState:
    """Return the state of a learner in the middle of a batch."""
    state = LearnerState()
    state.model = Model() if models is None else models
    state.lossfn = torch.nn.functional.mse_loss
    core = TorchCore(device="cpu")
    core.attach(state, optimizer)
    for param in state.params.values():
        param.grad = torch.ones_like(param)
    state.batch.inputs = {"x": torch.ones(2)}
    state.batch.loss = torch.ones(())
    state.batch.grads = core.grads
    state.show(state.batch)
    state.data[TrainingPhase] = [1, 2]
    state.cbstate.best = 0.5
    state.cbstate.seen = [1]
    state.cbstate.mine = State("cbstate.mine")
    state.cbstate.mine.p = [1]
    state.cbstate.mine.q = 2
    state.cbstate.tracehistory = CONTAINERS["tracehistory"]("cbstate.tracehistory")
    state.cbstate.tracehistory[TrainingPhase].push("Norm", 1.0, 1)
    return state


def view_of(access: Access | Declaration, state: LearnerState, decorator: str = "") -> LearnerView:
    declaration = access if isinstance(access, tuple) else declare(access, "Mine.state_access()")
    return bind_view(declaration, state, Owner("Mine", "Mine", "state_access", declaration, decorator))
