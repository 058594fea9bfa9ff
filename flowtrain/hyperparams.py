"""What handlers see of an optimizer: its hyperparameters and its state, as two things apart.

A schedule writes ``optimizer.hyperparams`` while another callback reads ``optimizer.state``; neither touches the
parameters, which belong to ``model``. Both are paths of their own, and bare ``optimizer`` covers them.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from flowtrain.errors import ProtectedException, UsageError
from flowtrain.readonly import readonly, refuse

__all__ = ["HyperParamGroup", "HyperParams", "OptimizerParts"]

_STEPS = frozenset({"add_param_group", "load_state_dict", "step", "zero_grad"})


class HyperParamGroup(MutableMapping[str, Any]):
    """One parameter group without its parameters: ``group["lr"] = 0.1``."""

    __slots__ = ("_group", "_path", "_writable")

    def __init__(self, group: dict[str, Any], path: str, *, writable: bool) -> None:
        self._group = group
        self._path = path
        self._writable = writable

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            raise KeyError("params: the parameters are at learner.params; a group here has hyperparameters only")
        value = self._group[name]
        return value if self._writable else readonly(value, self._path)

    def __setitem__(self, name: str, value: Any) -> None:
        if not self._writable:
            raise refuse(self._path)
        if name == "params":
            raise KeyError("params: a group here has hyperparameters only")
        self._group[name] = value

    def __delitem__(self, name: str) -> None:
        if not self._writable:
            raise refuse(self._path)
        raise UsageError(f"{self._path}: {name!r} cannot be deleted, the optimizer needs it. Assign another value.")

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._group if name != "params")

    def __len__(self) -> int:
        return len(self._group) - ("params" in self._group)

    def __repr__(self) -> str:
        return f"HyperParamGroup({dict(self)})"


class HyperParams(Sequence[HyperParamGroup]):
    """The parameter groups of an optimizer without their parameters."""

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


class OptimizerParts:
    """An optimizer as handlers see it. Anything else of the optimizer is reached by its own name.

    Attributes:
        hyperparams: `HyperParams`.
        state: The optimizer's state by parameter.
    """

    __slots__ = ("__twins__", "_optimizer", "_path", "_writable", "hyperparams")

    __twins__: OptimizerParts
    _optimizer: Optimizer
    _path: str
    _writable: bool
    hyperparams: HyperParams

    def __init__(self, optimizer: Optimizer, path: str = "optimizer", *, writable: bool = True) -> None:
        keep = partial(object.__setattr__, self)
        keep("_optimizer", optimizer)
        keep("_path", path)
        keep("_writable", writable)
        keep("hyperparams", HyperParams(optimizer, f"{path}.hyperparams", writable=writable))
        keep("__twins__", OptimizerParts(optimizer, path, writable=False) if writable else self)

    def __twin__(self) -> OptimizerParts:
        return self.__twins__

    @property
    def state(self) -> Any:
        """The optimizer's state by parameter; load_state_dict replaces it, so it is looked up each time."""
        state = self._optimizer.state
        return state if self._writable else readonly(state, f"{self._path}.state")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
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
