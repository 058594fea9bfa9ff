"""What handlers see of an optimizer: its hyperparameters and its state, as two things apart.

A schedule writes ``optimizer.hyperparams`` while another callback reads ``optimizer.state``; neither leads to the
parameters, which belong to ``model``. Both are paths of their own, and bare ``optimizer`` covers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.optim import Optimizer

from flowtrain.errors import ProtectedException, UsageError, nearest
from flowtrain.state.readonly import readonly, refuse

__all__ = ["HyperParamGroup", "HyperParams", "OptimizerParts", "OptimizerState"]

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


class OptimizerState(MutableMapping[Any, Any]):
    """The state of an optimizer: ``state["0.weight"]["exp_avg"]``. A parameter can be given instead of its name.

    Iteration gives names. torch's own mapping gives the parameters, which belong to another path. A state whose
    parameter has no name goes by its place, as ``"#3"``.
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

    def _key(self, key: Any) -> Any:
        if not isinstance(key, str):
            return key
        if key in self._named:
            return self._named[key]
        found = next((param for name, param in zip(self, self._state, strict=True) if name == key), None)
        if found is None:
            raise KeyError(f"{self._path}: there is no parameter {key!r}.{nearest(key, self._named)}")
        return found

    def __getitem__(self, key: Any) -> Any:
        found = self._key(key)
        return self._state[found] if self._writable else readonly(self._state, self._path)[found]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._writable:
            raise refuse(self._path)
        self._state[self._key(key)] = value

    def __delitem__(self, key: Any) -> None:
        if not self._writable:
            raise refuse(self._path)
        del self._state[self._key(key)]

    def __contains__(self, key: object) -> bool:
        return (key in set(self)) if isinstance(key, str) else key in self._state

    def __iter__(self) -> Iterator[str]:
        names = {id(param): name for name, param in self._named.items()}
        return iter([names.get(id(param), f"#{place}") for place, param in enumerate(self._state)])

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        return f"OptimizerState({', '.join(self)})"


class OptimizerParts:
    """An optimizer as handlers see it. Anything else of the optimizer is reached by its own name.

    Args:
        optimizer: The optimizer.
        path: Where it is, dotted.
        named: Returns its parameters by name.
        writable: Whether it may be changed.

    Attributes:
        hyperparams: `HyperParams`.
        state: `OptimizerState`.
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
        keep = partial(object.__setattr__, self)
        keep("_named", named)
        keep("_optimizer", optimizer)
        keep("_path", path)
        keep("_writable", writable)
        keep("hyperparams", HyperParams(optimizer, f"{path}.hyperparams", writable=writable))
        keep("_twins", OptimizerParts(optimizer, path, named, writable=False) if writable else None)

    @property
    def __twins__(self) -> OptimizerParts:
        return self if self._twins is None else self._twins

    def __twin__(self) -> OptimizerParts:
        return self.__twins__

    @property
    def state(self) -> OptimizerState:
        """The optimizer's state by parameter; load_state_dict replaces it, so it is looked up each time."""
        return OptimizerState(self._optimizer, f"{self._path}.state", self._named, writable=self._writable)

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
