"""Parameters and gradients by name, looked up in the live modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flowtrain.errors import nearest
from flowtrain.state.readonly import refuse

__all__ = ["Gradients", "Parameters", "named_parameters"]


class Parameters(Mapping[str, torch.nn.Parameter]):
    """Parameters by name, looked up in the live modules; with several models the name begins with the model's."""

    __slots__ = ("_models",)

    def __init__(self, models: Mapping[str, torch.nn.Module]) -> None:
        self._models = models

    def detached(self) -> Mapping[str, torch.Tensor]:
        """Return the parameters as tensors that record no gradients and have none, by the same names."""
        return DetachedParameters(self._models)

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield names and parameters: the quick way through all of them."""
        for prefix, model in self._models.items():
            yield from model.named_parameters(prefix)

    def __getitem__(self, name: str) -> torch.nn.Parameter:
        # Not by a search through all: whoever goes through this mapping would pay for it at every parameter.
        prefix, _, rest = ("", "", name) if "" in self._models else name.partition(".")
        try:
            return self._models[prefix].get_parameter(rest)
        except (AttributeError, KeyError):
            raise KeyError(f"there is no parameter {name!r}.{nearest(name, self)}") from None

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.named())

    def __len__(self) -> int:
        return sum(1 for _ in self.named())


class DetachedParameters(Parameters):
    """The same as tensors that record no gradients and have none: what a deferrable callback sees."""

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

    def detached(self) -> Gradients:
        """Return them read-only, and detached where a graph of the backward pass was kept."""
        return DetachedGradients(self._params)

    def __getitem__(self, name: str) -> torch.Tensor:
        gradient = self._params[name].grad
        if gradient is None:
            raise KeyError(f"{name} has no gradient: it took no part in the loss, or it is frozen")
        return gradient

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
    """The twin of `Gradients`, and its own: a property and no attribute, since that would be a circle."""

    __slots__ = ()

    def __init__(self, params: Parameters) -> None:
        self._params = params

    @property
    def twin(self) -> ReadOnlyGradients:  # type: ignore[override]
        """Itself."""
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
    """The same without a graph: what a deferrable callback sees."""

    __slots__ = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).detach()

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and detached gradients."""
        return ((name, gradient.detach()) for name, gradient in super().named())
