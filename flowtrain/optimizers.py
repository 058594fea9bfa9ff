"""Optimizers as a user passes them, checked against the models and made where a function is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from flowtrain.errors import CoreError, nearest

__all__ = ["OptimizerFactory", "make_optimizers", "params_of", "scale_gradients"]


OptimizerFactory: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], Optimizer]


def params_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    """Return the parameters of all groups of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply the gradients of an optimizer's parameters in place."""
    if factor != 1:
        for param in params_of(optimizer):
            if param.grad is not None:
                param.grad.mul_(factor)


def make_optimizers(
    wanted: Any, models: Mapping[str, torch.nn.Module], loss_modules: Iterable[torch.nn.Module]
) -> dict[str, Optimizer]:
    """Return the optimizers by name; a single one has the empty name.

    Args:
        wanted: An optimizer, a function that makes one from parameters, or a mapping of either by name.
        models: The models by name; a single one has the empty name.
        loss_modules: The loss function, where it is a module. Its parameters go to the first optimizer made here.

    Raises:
        CoreError: An optimizer that does not fit the models, or none.
    """
    loss_params = [param for module in loss_modules for param in module.parameters()]
    found = [param for model in models.values() for param in model.parameters()] + loss_params
    everything = list({id(param): param for param in found}.values())  # models may share a part
    if not isinstance(wanted, Mapping):
        return {"": _make_optimizer(wanted, everything, everything, "optimizer")}
    made: dict[str, Optimizer] = {}
    for name, each in wanted.items():
        if name not in models and not isinstance(each, Optimizer):
            known = ", ".join(repr(known) for known in models if known)
            raise CoreError(
                f"optimizer[{name!r}] is called with the parameters of model {name!r}, and there is no such model"
                f"{f' ({known} are there)' if known else ', but one without a name'}.{nearest(name, models)} "
                f"Use the models' names, or pass an optimizer instance."
            )
        own = list(models[name].parameters()) if name in models else everything
        # The loss function's parameters, if any, go to the first optimizer that is made here.
        extra = loss_params if not made else []
        own = list({id(param): param for param in [*own, *extra]}.values())
        made[name] = _make_optimizer(each, own, everything, f"optimizer[{name!r}]")
    if not made:
        raise CoreError("optimizer={} has no optimizer. Pass one, such as torch.optim.AdamW, or one for each model.")
    return made


def _make_optimizer(
    wanted: Any, params: list[torch.nn.Parameter], known: list[torch.nn.Parameter], what: str
) -> Optimizer:
    if isinstance(wanted, Optimizer):
        ids = {id(param) for param in known}
        for number, group in enumerate(wanted.param_groups):
            for param in group["params"]:
                if id(param) not in ids:
                    raise CoreError(
                        f"{what} ({type(wanted).__name__}) has, in group {number}, a parameter of shape "
                        f"{tuple(param.shape)} that is neither the model's nor the loss function's, so training would "
                        f"not change the model. Make the optimizer from this model's parameters, or pass a function: "
                        f"optimizer=partial(torch.optim.{type(wanted).__name__}, lr=...)."
                    )
        return _needs_no_closure(wanted, what)
    if not callable(wanted):
        raise CoreError(
            f"{what} is {wanted!r}. Pass an optimizer, or a function of the parameters such as "
            f"partial(torch.optim.AdamW, lr=1e-3)."
        )
    if not params:
        raise CoreError(f"{what} has nothing to train: the model has no parameters.")
    made = wanted(params)
    if not isinstance(made, Optimizer):
        raise CoreError(
            f"{what} was called with the parameters and returned {type(made).__name__}, which is no torch optimizer."
        )
    return _needs_no_closure(made, what)


def _needs_no_closure(optimizer: Optimizer, what: str) -> Optimizer:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CoreError(
            f"{what} is LBFGS, whose step runs the model several times through a closure, and an update here steps "
            f"once. Use another optimizer, or call LBFGS yourself in the step of a phase of your own."
        )
    return optimizer
