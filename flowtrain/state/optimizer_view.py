"""Optimizers as handlers see them: hyperparameters and state are separate, and neither leads to the parameters.

So a schedule can write ``optimizer.hyperparams`` while another callback reads ``optimizer.state``, and neither of them
conflicts with a callback that reads the parameters, which belong to ``model``. Each is a path, and the path
``optimizer`` covers both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.optim import Optimizer

from flowtrain.errors import ProtectedException, UsageError
from flowtrain.errors.describing import nearest
from flowtrain.state.readonly import readonly, refuse

__all__ = ["HyperParamGroup", "HyperParams", "OptimizerParts", "OptimizerState"]

_STEPS = frozenset({"add_param_group", "load_state_dict", "step", "zero_grad"})
"""The methods of an optimizer that write, and that a handler may call only if it declares to write the optimizer."""


class HyperParamGroup(MutableMapping[str, Any]):
    """One parameter group of an optimizer without its parameters: ``group["lr"] = 0.1``.

    Args:
        group: The group of the optimizer.
        path: The path of the hyperparameters, for messages.
        writable: Whether values may be assigned.
    """

    __slots__ = ("_group", "_path", "_writable")

    def __init__(self, group: dict[str, Any], path: str, *, writable: bool) -> None:
        self._group = group
        self._path = path
        self._writable = writable

    def __getitem__(self, name: str) -> Any:
        self._refuse_parameters(name)
        value = self._group[name]
        return value if self._writable else readonly(value, self._path)  # ``betas`` may be a list

    def __setitem__(self, name: str, value: Any) -> None:
        if not self._writable:
            raise refuse(self._path)
        self._refuse_parameters(name)
        self._group[name] = value

    def _refuse_parameters(self, name: str) -> None:
        if name == "params":
            raise KeyError(f"{self._path}['params']: parameters are at learner.params; here are hyperparameters only")

    def __delitem__(self, name: str) -> None:
        if not self._writable:
            raise refuse(self._path)
        raise UsageError(f"{self._path}: {name!r} cannot be deleted, the optimizer needs it. Assign another value.")

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._group if name != "params")

    def __len__(self) -> int:
        return len(self._group) - ("params" in self._group)  # the items of `__iter__`

    def __repr__(self) -> str:
        return f"HyperParamGroup({dict(self)})"


class HyperParams(Sequence[HyperParamGroup]):
    """The parameter groups of an optimizer without their parameters.

    Args:
        optimizer: The optimizer.
        path: The path of the hyperparameters, for messages.
        writable: Whether values may be assigned.
    """

    __slots__ = ("_optimizer", "_path", "_writable")

    def __init__(self, optimizer: Optimizer, path: str, *, writable: bool) -> None:
        self._optimizer = optimizer
        self._path = path
        self._writable = writable

    def __getitem__(self, index: Any) -> Any:
        groups = self._optimizer.param_groups[index]
        if isinstance(index, slice):
            return [HyperParamGroup(group, self._path, writable=self._writable) for group in groups]
        return HyperParamGroup(groups, self._path, writable=self._writable)

    def __len__(self) -> int:
        return len(self._optimizer.param_groups)

    def __twin__(self) -> HyperParams:
        return HyperParams(self._optimizer, self._path, writable=False)

    def __repr__(self) -> str:
        return f"HyperParams({[dict(group) for group in self]})"


class OptimizerState(MutableMapping[Any, Any]):
    """The state of an optimizer by the names of its parameters: ``state["0.weight"]["exp_avg"]``.

    A parameter itself works as a key too. Iteration gives names, since the parameters that torch's own mapping gives
    belong to another path. The state of a parameter that has no name gets the name ``"#3"``, with its place.

    Args:
        optimizer: The optimizer.
        path: The path of the state, for messages.
        named: A function that returns the parameters by name.
        writable: Whether the state may be changed.
    """

    def __init__(
        self, optimizer: Optimizer, path: str, named: Callable[[], Mapping[str, torch.Tensor]], *, writable: bool
    ) -> None:
        self._state: Any = optimizer.state
        self._path = path
        self._find = named
        self._writable = writable

    @cached_property
    def _named(self) -> Mapping[str, torch.Tensor]:
        return self._find()

    def _param(self, key: Any) -> Any:
        """Return the parameter of a name, which is the key of torch's own mapping; a parameter as it is."""
        if not isinstance(key, str):
            return key
        if key in self._named:
            return self._named[key]
        # A parameter without a name has the name that `__iter__` gives it, by its place.
        param = next((param for name, param in zip(self, self._state, strict=True) if name == key), None)
        if param is None:
            raise KeyError(f"{self._path}: there is no parameter {key!r}.{nearest(key, self._named)}")
        return param

    def __getitem__(self, key: Any) -> Any:
        param = self._param(key)
        return self._state[param] if self._writable else readonly(self._state, self._path)[param]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._writable:
            raise refuse(self._path)
        self._state[self._param(key)] = value

    def __delitem__(self, key: Any) -> None:
        if not self._writable:
            raise refuse(self._path)
        del self._state[self._param(key)]

    def __contains__(self, key: object) -> bool:  # that of the base class would make a twin of the state
        return (key in set(self)) if isinstance(key, str) else key in self._state

    def __iter__(self) -> Iterator[str]:
        names = {id(param): name for name, param in self._named.items()}
        return iter([names.get(id(param), f"#{place}") for place, param in enumerate(self._state)])

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        return f"OptimizerState({', '.join(self)})"


class OptimizerParts:
    """An optimizer as handlers see it: `hyperparams`, `state`, and all other attributes of the optimizer itself.

    Args:
        optimizer: The optimizer.
        path: The path of the optimizer, for messages.
        named: A function that returns the parameters of the optimizer by name.
        writable: Whether the optimizer may be changed.

    Attributes:
        hyperparams: The parameter groups without their parameters.
    """

    __slots__ = ("_named", "_optimizer", "_path", "_twins", "_writable", "hyperparams")

    _twins: OptimizerParts | None
    _named: Callable[[], Mapping[str, torch.Tensor]]
    _optimizer: Optimizer
    _path: str
    _writable: bool
    hyperparams: HyperParams

    def __init__(
        self,
        optimizer: Optimizer,
        path: str = "optimizer",
        named: Callable[[], Mapping[str, torch.Tensor]] = dict,
        *,
        writable: bool = True,
    ) -> None:
        assign = partial(object.__setattr__, self)  # the class refuses assignments, which handlers may try
        assign("_named", named)
        assign("_optimizer", optimizer)
        assign("_path", path)
        assign("_writable", writable)
        assign("hyperparams", HyperParams(optimizer, f"{path}.hyperparams", writable=writable))
        assign("_twins", OptimizerParts(optimizer, path, named, writable=False) if writable else None)

    @property
    def __twins__(self) -> OptimizerParts:
        return self if self._twins is None else self._twins

    def __twin__(self) -> OptimizerParts:
        return self.__twins__

    @property
    def state(self) -> OptimizerState:
        """The state of the optimizer by parameter. It is looked up each time, since `load_state_dict` replaces it."""
        return OptimizerState(self._optimizer, f"{self._path}.state", self._named, writable=self._writable)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols such as copying look these up, and must not find the optimizer's
            raise AttributeError(name)
        if name in _STEPS and not self._writable:
            raise ProtectedException("Write", self._path, f'{name}() writes. Declare {{"{self._path}": Write()}}.')
        value = getattr(self._optimizer, name)
        return value if self._writable else readonly(value, f"{self._path}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise UsageError(
            f"{self._path}.{name} cannot be replaced: the training core holds the optimizer. Change it in place, as "
            f'{self._path}.hyperparams[0]["lr"] = 0.1.'
        )

    def __repr__(self) -> str:
        return f"OptimizerParts({type(self._optimizer).__name__})"
