"""The model of a replay: the state that a module had at an event, with or without the module itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from flowtrain.errors import UsageError

__all__ = ["RecordedModule"]


class RecordedModule:
    """The state of a module at one event. It has the methods that show the state, and cannot be called.

    Args:
        of: The name of the module's class.
        params: The parameters by name, also by further names of the same parameter.
        buffers: The buffers by name.
        state: The ``state_dict`` of the module.
        training: Whether the module was in train mode.
    """

    def __init__(
        self,
        of: str,
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        training: bool,
    ) -> None:
        self._of = of
        self._params = dict(params)
        self._buffers = dict(buffers)
        self._state = dict(state)
        self.training = training

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the values of each parameter once."""
        return _once(self._params)

    def parameters(self) -> Iterator[torch.Tensor]:
        """Yield the values of each parameter once."""
        return (each for _, each in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the values of each buffer once."""
        return _once(self._buffers)

    def buffers(self) -> Iterator[torch.Tensor]:
        """Yield the values of each buffer once."""
        return (each for _, each in self.named_buffers())

    def state_dict(self) -> dict[str, Any]:
        """Return the ``state_dict`` of the module."""
        return dict(self._state)

    def load_into(self, module: nn.Module) -> nn.Module:
        """Give a module of the user this state, and return it.

        Raises:
            UsageError: The module has other parameters.
        """
        try:
            module.load_state_dict(self._state)
        except (RuntimeError, KeyError) as error:
            raise UsageError(
                f"replay(model={type(module).__name__}(...)): the state of the recorded {self._of} cannot be loaded "
                f"into it: {error}. Pass a module that is built as the one that was trained."
            ) from error
        return module.train(self.training)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a recording has no code of the module."""
        self._refuse("calls the model")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._params:
            return self._params[name]
        if name in self._buffers:
            return self._buffers[name]
        return self._refuse(f"reads model.{name}")

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"The callback {what}, and a recording has the parameters and buffers of {self._of}, not the module. Pass "
            f"one that is built as it was: flowtrain.replay(path, callback, model={self._of}(...)), or on the command "
            f"line --model module:function."
        )


def _once(named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors, each tensor under the first of its names."""
    seen: set[int] = set()
    for name, each in named.items():
        if id(each) not in seen:
            seen.add(id(each))
            yield name, each
