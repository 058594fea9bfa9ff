"""The parameter groups of optimizers, by the names of their parameters.

The ``state_dict`` of an optimizer has parameters by number only. With their names a checkpoint shows whether its groups
are those that the script built, and groups that training has changed can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from flowtrain.errors import CheckpointError
from flowtrain.errors.arguments import is_a
from flowtrain.training.checkpoint.attributes import without_compiled

__all__ = ["ParameterGroups", "optimizer_name"]


def optimizer_name(name: str) -> str:
    """Return the name of an optimizer for messages, and as an owner of state: ``optimizer`` or ``optimizer.gen``."""
    return f"optimizer.{name}" if name else "optimizer"


class ParameterGroups:
    """Saves and restores the parameter groups of the optimizers of one learner.

    Args:
        modules: The models, and the loss function if it is a module, each with the name that begins the names of its
            parameters.
        optimizers: The optimizers by name; a single one has the empty name.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
        self._modules, self._optimizers = modules, optimizers
        self._built: dict[str, list[list[str]]] = {}

    def begin(self) -> None:
        """Record the groups as the script has built them. A later call has no effect."""
        if not self._built:
            names = self._names()
            self._built = {name: self._now(name, names) for name in self._optimizers}

    def _params(self) -> dict[str, torch.nn.Parameter]:
        return {
            without_compiled(f"{root}.{name}"): param
            for root, module in self._modules.items()
            for name, param in module.named_parameters()
        }

    def _names(self) -> dict[int, str]:
        """Return the name of each parameter by its id."""
        return {id(param): name for name, param in self._params().items()}

    def _now(self, name: str, names: Mapping[int, str]) -> list[list[str]]:
        """Return the names of the parameters in each group of an optimizer, empty for a parameter of no module."""
        groups = self._optimizers[name].param_groups
        return [[names.get(id(param), "") for param in group["params"]] for group in groups]

    def state(self, name: str) -> dict[str, Any]:
        """Return the groups of an optimizer, as the script built them and as they are now, by names of parameters.

        Raises:
            CheckpointError: A handler has left a parameter in the optimizer that belongs to no module, or state of a
                parameter that is in no group.
        """
        names = self._names()
        self._check(name, names)
        self.begin()
        return {"built": self._built[name], "now": self._now(name, names)}

    def _check(self, name: str, names: Mapping[int, str]) -> None:
        """Check that each parameter of an optimizer has a name, and that each parameter with state is in a group.

        Raises:
            CheckpointError: A parameter has no name, or a parameter with state is in no group.
        """
        optimizer = self._optimizers[name]
        grouped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if id(param) not in names:
                    raise CheckpointError(
                        f"{optimizer_name(name)} has, in group {number}, a parameter of shape {tuple(param.shape)} "
                        f"that no longer belongs to the model or the loss function, so it has no name in a "
                        f"checkpoint. In the handler that replaces a module, put the new parameters into the groups "
                        f"instead of the old ones, and call optimizer.state.pop(old, None) for each of these."
                    )
        for param in optimizer.state:
            if is_a(param, torch.Tensor) and id(param) not in grouped:  # optimizers of users may have other keys
                raise CheckpointError(
                    f"{optimizer_name(name)} has state of {names.get(id(param), 'a parameter')}, of shape "
                    f"{tuple(param.shape)}, which is in none of its groups. In the handler that takes a parameter out "
                    f"of a group, call optimizer.state.pop(param, None)."
                )

    def difference(self, name: str, saved: Mapping[str, Any]) -> str:
        """Describe how the parameter groups in the checkpoint differ from the groups that this script built.

        The text is empty if only training changed them.

        Args:
            name: The name of the optimizer.
            saved: The entry of the optimizer in the checkpoint.
        """
        self.begin()
        here = self._built[name]
        sizes = [len(group) for group in here]
        if "groups" not in saved:  # an early checkpoint has numbers of parameters, without names
            there = [len(group["params"]) for group in saved["state"]["param_groups"]]
            return "" if there == sizes else _sizes(name, there, sizes)
        now = saved["groups"]["now"]
        # A script that builds the groups as that run built them gets the changes of training; one that builds them as
        # they are now needs none. Both lead to the same groups, so both fit.
        if here not in (saved["groups"]["built"], now):
            there = [len(group) for group in now]
            if there != sizes:
                return _sizes(name, there, sizes)
            pairs = [pair for groups in zip(now, here, strict=True) for pair in zip(*groups, strict=True)]
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            return f"{_it(name)} had {one} where the learner's has {other}"
        unknown = {param for group in now for param in group} - self._params().keys()
        return f"{_it(name)} had a parameter {min(unknown)}, which the learner has not" if unknown else ""

    def arrange(self, name: str, saved: Mapping[str, Any]) -> None:
        """Put the parameters into the groups of a checkpoint; the optimizer's `load_state_dict` restores the rest.

        Args:
            name: The name of the optimizer.
            saved: The entry of the optimizer in the checkpoint.
        """
        wanted = saved["groups"]["now"] if "groups" in saved else self._built[name]
        if self._now(name, self._names()) != wanted:
            optimizer, params = self._optimizers[name], self._params()
            optimizer.param_groups[:] = [
                {**optimizer.defaults, "params": [params[each] for each in group]} for group in wanted
            ]


def _it(name: str) -> str:
    return f"optimizer {name!r}" if name else "it"


def _sizes(name: str, there: list[int], here: list[int]) -> str:
    return f"{_it(name)} had groups of {there} parameters, the learner's has groups of {here}"
