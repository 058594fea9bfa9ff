"""Copies of modules and optimizers.

A declared ``model`` is copied as a whole: every parameter and buffer, for each event, on the training thread. A handler
that needs only a part of it should declare ``params.encoder.weight`` or ``model.encoder``. If ``model`` is declared as
a whole, ``params`` are the parameters of the copy, as in place. Declared parts are copied separately.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from flowtrain.data.nested import Attribute
from flowtrain.state.container import Tree
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.parameters import named_parameters
from flowtrain_dask.snapshots.copying import Copying, Refused

__all__ = ["OptimizerCopy", "copy_module", "copy_optimizers"]


def copy_module(value: nn.Module, copying: Copying) -> nn.Module:
    """Return a deep copy of a module. Its parameters are leaves without gradients, and hooks are shared.

    Raises:
        Refused: An object in the module cannot be deep-copied.
    """
    if copying.dry:
        return value
    memo: dict[int, Any] = {}
    for tensor in (*value.parameters(), *value.buffers()):
        memo[id(tensor)] = _copy_owned(tensor, copying)
    for module in value.modules():
        for name, own in vars(module).items():
            if isinstance(own, torch.Tensor):  # it may have a graph, and torch refuses to deep-copy that
                memo.setdefault(id(own), _copy_owned(own, copying))
            elif name.endswith("_hooks") and isinstance(own, dict):
                memo.update({id(hook): hook for hook in own.values()})
    try:
        return copy.deepcopy(value, memo)
    except (RuntimeError, TypeError, AttributeError, copy.Error) as error:
        raise Refused(value, f"a deep copy of it fails: {error}", "Read params, which are copied one by one") from error


def _copy_owned(tensor: torch.Tensor, copying: Copying) -> torch.Tensor:
    made: torch.Tensor = copying.copy(tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


class OptimizerCopy:
    """Copies of the hyperparameters and the state of an optimizer.

    Attributes:
        groups: The parameter groups without their parameters; ``None`` if they are not declared.
        state: For each parameter with a state: its name, a tensor of its shape and dtype on the meta device, and the
            state; ``None`` if the state is not declared.
        defaults: The default hyperparameters; ``None`` unless the optimizer is declared as a whole.
    """

    __slots__ = ("defaults", "groups", "state")

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] | None = None
        self.state: list[tuple[str, torch.Tensor, Any]] | None = None
        self.defaults: dict[str, Any] | None = None


def copy_optimizers(state: LearnerState, inside: Tree | None, copying: Copying) -> dict[str, OptimizerCopy]:
    """Return copies of the optimizers by name; a single optimizer has the name ``""``.

    Args:
        state: The state of the learner.
        inside: The declared paths below ``optimizer``; ``None`` for all of it.
        copying: The pass of copying.
    """
    names = {id(parameter): name for name, parameter in named_parameters(state.params, state.lossfn).items()}
    if not isinstance(state.optimizer, Named):
        return {} if state.optimizer is None else {"": _copy_optimizer(state.optimizer, inside, names, copying)}
    found: dict[str, OptimizerCopy] = {}
    for name, optimizer in state.optimizer.items():
        if inside is None or name in inside:
            below = None if inside is None else inside[name]
            part = below if isinstance(below, dict) and "" not in below else None
            found[name] = _copy_optimizer(optimizer, part, names, copying)
    return found


def _copy_optimizer(
    optimizer: Optimizer, inside: Tree | None, names: Mapping[int, str], copying: Copying
) -> OptimizerCopy:
    made = OptimizerCopy()
    if inside is None or "hyperparams" in inside:
        made.groups = [
            {name: copying.copy_at(item, name) for name, item in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
    if inside is None or "state" in inside:
        made.state = [
            (
                names.get(id(key), f"#{place}"),
                key.detach().to("meta"),
                copying.copy_at(each, Attribute(f"state[{place}]")),
            )
            for place, (key, each) in enumerate(optimizer.state.items())
        ]
    if inside is None:
        made.defaults = copying.copy_at(optimizer.defaults, Attribute("defaults"))
    return made
