"""The state of an event as a replayed handler sees it: the view of it, and the model.

The view is of the class that the handler would get in training, and shows the recorded state. A module is shown by its
parameters and buffers (`RecordedModule`), unless the user has passed one to load them into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn

from flowtrain.callback.access import Path
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.state.batch import BatchState, ReadOnlyBatch
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.optimizer_view import OptimizerParts
from flowtrain.state.partial_view import Owner
from flowtrain.state.readonly import UNPROTECTED
from flowtrain.state.views import bind_view

__all__ = ["EventView", "RecordedEvent", "RecordedModule"]


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
                f"into it: {' '.join(str(error).split())} Pass a module that is built as the one that was trained."
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


@dataclass
class RecordedEvent:
    """One event of a recording.

    Attributes:
        number: The number of the event.
        event: The event.
        phase: The phase.
        document: The rest of it.
        payload: The values by path.
        exchanged: The values of all ranks by path.
        state: The state of the callback before the event, if that is known.
    """

    number: int
    event: Event
    phase: Phase
    document: dict[str, Any]
    payload: dict[Path, Any]
    exchanged: dict[Path, Any]
    state: Mapping[str, Any] | None


class EventView:
    """The learner as one handler sees it in a replay.

    Args:
        owner: The callback and the handler, with the declaration.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def show(self, given: RecordedEvent) -> LearnerView:
        """Return a view of an event."""
        state, batch, twin = LearnerState(), BatchState(), False
        entries: dict[str, Any] = {}
        optimizers: dict[str, Any] = {}
        for path, value in given.payload.items():
            if path[0] == "batch":
                vars(batch)[path[1]] = value
                twin = twin or type(value) not in UNPROTECTED
            elif path[0] == "cbstate":
                entries[path[1]] = value
            elif path[0] == "optimizer":
                optimizers[".".join(path[1:-1])] = SimpleNamespace(param_groups=value, state={}, defaults={})
            else:
                setattr(state, path[0], value)
        state.batch, state.batch_twin = batch, ReadOnlyBatch(batch) if twin else batch
        state.cbstate.__rewind__(entries)
        if ("model",) in given.payload and ("params",) not in given.payload:
            state.params = dict(_parameters_of(given.payload["model",]))
        parts: dict[str, Any] = {
            name: OptimizerParts(each, f"optimizer.{name}" if name else "optimizer")
            for name, each in (optimizers or {"": SimpleNamespace(param_groups=[])}).items()
        }
        state.optimizers = parts[""] if "" in parts else Named("optimizer", parts)
        state.rank, state.world_size = given.document.get("rank", (0, 1))
        exchanged = given.exchanged or None
        owner = replace(self._owner, exchanged=exchanged)
        return bind_view(owner.declaration, state, owner)


def _parameters_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a model by name, or of several models."""
    if isinstance(model, (RecordedModule, nn.Module)):
        yield from model.named_parameters()
    elif isinstance(model, Mapping):
        for name, each in model.items():
            yield from ((f"{name}.{inner}", value) for inner, value in each.named_parameters())
