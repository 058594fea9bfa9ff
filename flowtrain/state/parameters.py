"""Parameters and gradients by name: of the live modules, and as they were when a snapshot was taken.

`Parameters` and `Gradients` look everything up in the modules. Detached, for handlers that may run elsewhere, they do
so as well. `NamedTensors` and `NamedGradients` are the same for a snapshot, which has copies of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch

from flowtrain.errors.describing import nearest
from flowtrain.state.container import Freezer, Tree, declared_items
from flowtrain.state.readonly import refuse

__all__ = [
    "DetachedGradients",
    "DetachedParameters",
    "Gradients",
    "NamedGradients",
    "NamedTensors",
    "Parameters",
    "ReadOnlyGradients",
    "named_parameters",
]


class Parameters(Mapping[str, torch.nn.Parameter]):
    """Parameters by name, looked up in the live modules; with several models the name begins with the model's."""

    __slots__ = ("_models",)

    def __init__(self, models: Mapping[str, torch.nn.Module]) -> None:
        self._models = models

    def __detached__(self, detach: Callable[[Any], Any]) -> Parameters:
        return DetachedParameters(self._models)

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> NamedTensors:
        found, aliases = self.with_aliases()
        frozen: NamedTensors = freezer.copy(NamedTensors(found, aliases).part(inside))
        return frozen

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield names and parameters: the quick way through all of them."""
        for prefix, model in self._models.items():
            yield from model.named_parameters(prefix)

    def with_aliases(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the parameters by name, and for each further name of one of them the name that it is found by."""
        found: dict[str, torch.Tensor] = {}
        aliases: dict[str, str] = {}
        for prefix, model in self._models.items():  # one walk through the models, which costs as much as a small copy
            first: dict[int, str] = {}
            for name, parameter in model.named_parameters(prefix, remove_duplicate=False):
                known = first.setdefault(id(parameter), name)
                if known == name:
                    found[name] = parameter
                else:
                    aliases[name] = known
        return found, aliases

    def __getitem__(self, name: str) -> torch.nn.Parameter:
        found = self._find(name)
        if found is None:
            raise KeyError(f"there is no parameter {name!r}.{nearest(name, self)}")
        return found

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None  # without the message of a look-up, which compares all names

    def get(self, name: Any, default: Any = None) -> Any:
        """Return a parameter, or the default."""
        if name in self:
            return self[name]
        return default

    def _find(self, name: object) -> torch.nn.Parameter | None:
        # Not by a search through all: a loop over this mapping would pay for it at every parameter.
        prefix, _, rest = ("", "", str(name)) if "" in self._models else str(name).partition(".")
        try:
            return self._models[prefix].get_parameter(rest)
        except (AttributeError, KeyError):
            return None

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.named())

    def __len__(self) -> int:
        return sum(1 for _ in self.named())


class DetachedParameters(Parameters):
    """Parameters as tensors that record no gradients and have none, for deferrable callbacks."""

    __slots__ = ()

    def named(self) -> Iterator[tuple[str, Any]]:
        """Yield names and detached parameters."""
        return ((name, parameter.detach()) for name, parameter in super().named())

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name).detach()


class Gradients(Mapping[str, torch.Tensor]):
    """Gradients by parameter name; only of parameters that have one. Assigning replaces a gradient.

    Attributes:
        twin: The same, read-only.
    """

    __slots__ = ("_params", "twin")

    def __init__(self, params: Parameters) -> None:
        self._params = params
        self.twin: Mapping[str, torch.Tensor] = ReadOnlyGradients(params)

    def __twin__(self) -> Mapping[str, torch.Tensor]:
        return self.twin

    def __detached__(self, detach: Callable[[Any], Any]) -> Gradients:
        return DetachedGradients(self._params)  # a graph of the backward pass may have been kept

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> NamedGradients:
        params, aliases = self._params.with_aliases()
        found = {name: param.grad for name, param in params.items() if param.grad is not None}
        frozen: NamedGradients = freezer.copy(NamedGradients(found, aliases).part(inside))
        return frozen

    def __getitem__(self, name: str) -> torch.Tensor:
        gradient = self._params[name].grad
        if gradient is None:
            raise KeyError(_no_gradient(name))
        return gradient

    def __contains__(self, name: object) -> bool:
        param = self._params.get(str(name))
        return param is not None and param.grad is not None

    def get(self, name: Any, default: Any = None) -> Any:
        """Return a gradient, or the default."""
        if name in self:
            return self[name]
        return default

    def __setitem__(self, name: str, gradient: torch.Tensor) -> None:
        self._params[name].grad = gradient

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and gradients: the quick way through all of them."""
        return ((name, param.grad) for name, param in self._params.named() if param.grad is not None)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.named())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ReadOnlyGradients(Gradients):
    """The read-only twin of `Gradients`, which is its own twin.

    `twin` is a property, because an attribute that refers to its own object is a reference cycle.
    """

    __slots__ = ()

    def __init__(self, params: Parameters) -> None:
        self._params = params

    @property
    def twin(self) -> ReadOnlyGradients:  # type: ignore[override]  # the twin of the base is an attribute
        """The object that a view gives for reading: this one, since it cannot be changed."""
        return self

    def __setitem__(self, name: str, gradient: torch.Tensor) -> None:
        raise refuse("batch.grads")


def named_parameters(params: Mapping[str, torch.Tensor], lossfn: object) -> dict[str, torch.Tensor]:
    """Return all that optimizers may hold: the parameters by name, and those of the loss as ``lossfn.…``."""
    found: dict[str, torch.Tensor] = dict(params.named() if isinstance(params, Parameters) else params)
    if isinstance(lossfn, torch.nn.Module):
        found |= lossfn.named_parameters("lossfn")
    return found


class DetachedGradients(ReadOnlyGradients):
    """Gradients without a graph, for deferrable callbacks."""

    __slots__ = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).detach()

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and detached gradients."""
        return ((name, gradient.detach()) for name, gradient in super().named())


class NamedTensors(Mapping[str, torch.Tensor]):
    """Parameters by name, as they were.

    Args:
        tensors: The tensors by name.
        aliases: For each further name of a tensor the name that `tensors` has it by.

    Attributes:
        tensors: The tensors by name.
        aliases: For each further name of a tensor the name that `tensors` has it by.
    """

    __slots__ = ("aliases", "tensors")

    def __init__(self, tensors: dict[str, torch.Tensor], aliases: Mapping[str, str] | None = None) -> None:
        self.tensors = tensors
        self.aliases: Mapping[str, str] = aliases or {}

    def __twin__(self) -> NamedTensors:
        return self

    def part(self, inside: Tree | None) -> Self:
        """Return the same without the tensors of which nothing is declared; ``None`` means that all are declared."""
        if inside is None:
            return self
        declared = {self.aliases.get(name, name) for name, _ in declared_items([*self.tensors, *self.aliases], inside)}
        return type(self)({name: each for name, each in self.tensors.items() if name in declared}, self.aliases)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.tensors.get(self.aliases.get(name, name))
        if found is None:
            raise KeyError(self._unknown(name))
        return found

    def _unknown(self, name: str) -> str:
        return f"there is no parameter {name!r}.{nearest(str(name), self.tensors)}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tensors, self.aliases)


class NamedGradients(NamedTensors):
    """Gradients by the name of their parameter, as they were."""

    __slots__ = ()

    @property
    def twin(self) -> NamedGradients:
        """The object that a view gives for reading: itself, since it cannot be changed."""
        return self

    def __setitem__(self, name: str, gradient: torch.Tensor) -> None:
        raise refuse("batch.grads")

    def _unknown(self, name: str) -> str:
        return _no_gradient(name)


def _no_gradient(name: str) -> str:
    return (
        f"{name} has no gradient: it took no part in the loss, or it is frozen. Test `name in learner.batch.grads` "
        f"first."
    )
