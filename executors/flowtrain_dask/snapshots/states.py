"""Copies of flowtrain's own containers: series, maps by phase, namespaces, parameters and gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from flowtrain.errors import nearest
from flowtrain.state.by_phase import CountsMap, PhaseMap
from flowtrain.state.learner_state import Named, State
from flowtrain.state.parameters import Gradients, Parameters
from flowtrain.state.partial_view import Tree
from flowtrain.state.readonly import refuse
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask.snapshots.copying import Copier, Copying, Pruner, declared_inside
from flowtrain_dask.snapshots.tensors import copy_tensors

__all__ = ["STATE_COPIERS", "STATE_PRUNERS", "NamedGradients", "NamedTensors"]


class NamedTensors(Mapping[str, torch.Tensor]):
    """Parameters by name, as they were.

    Args:
        tensors: The tensors by name.

    Attributes:
        tensors: The tensors by name.
        aliases: For a parameter that a model has under several names, the other ones, with the one in `tensors`.
    """

    __slots__ = ("aliases", "tensors")

    def __init__(self, tensors: dict[str, torch.Tensor], aliases: Mapping[str, str] | None = None) -> None:
        self.tensors = tensors
        self.aliases: Mapping[str, str] = aliases or {}

    def __twin__(self) -> NamedTensors:
        return self

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

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return type(self), (self.tensors, self.aliases)


class NamedGradients(NamedTensors):
    """Gradients by the name of their parameter, as they were."""

    __slots__ = ()

    @property
    def twin(self) -> NamedGradients:
        """What a view gives for reading: itself, since it cannot be changed."""
        return self

    def __setitem__(self, name: str, gradient: torch.Tensor) -> None:
        raise refuse("batch.grads")

    def _unknown(self, name: str) -> str:
        return f"{name} has no gradient: it took no part in the loss, or it is frozen"


def _copy_series(value: Series, copying: Copying) -> Series:
    copying.has_series = True
    return copying.cut(value)


def _copy_series_map(value: SeriesMap, copying: Copying) -> SeriesMap:
    return _series_map(value, list(value), copying)


def _prune_series_map(value: SeriesMap, inside: Tree, copying: Copying) -> SeriesMap:
    return _series_map(value, [name for name in value if declared_inside(inside, name) is not None], copying)


def _series_map(value: SeriesMap, names: list[str], copying: Copying) -> SeriesMap:
    copy = SeriesMap(value._path)  # pyright: ignore[reportPrivateUsage]  # a copy is made of all that there is
    copying.has_series = True
    copy.restore({name: copying.cut(value[name]) for name in names})
    return copy


def _copy_counts(value: CountsMap, copying: Copying) -> CountsMap:
    copy = CountsMap(value._path)  # pyright: ignore[reportPrivateUsage]  # as above
    for phase, counts in value.items():
        copy[phase] = counts
    return copy


def _copy_phase_map(value: PhaseMap[Any], copying: Copying) -> PhaseMap[Any]:
    return _phase_map(value, lambda item, phase: copying.copy_at(item, phase), copying)


def _prune_phase_map(value: PhaseMap[Any], inside: Tree, copying: Copying) -> PhaseMap[Any]:
    if isinstance(value, CountsMap):
        return _copy_counts(value, copying)
    return _phase_map(value, lambda item, phase: copying.inside(item, inside), copying)


def _phase_map(value: PhaseMap[Any], item: Callable[[Any, Any], Any], copying: Copying) -> PhaseMap[Any]:
    path = value._path  # pyright: ignore[reportPrivateUsage]  # as above
    copy: PhaseMap[Any] = PhaseMap(path, None if value.make is None else _maker(value.make(), path, copying))
    for phase in list(value):
        copy[phase] = item(value[phase], phase)
    return copy


def _maker(made: Any, path: str, copying: Copying) -> Callable[[], Any]:
    """Return what makes the same as a map's own function, which might not travel, or look at training."""
    if isinstance(made, (Series, SeriesMap)):
        return partial(type(made), path)
    return partial(_same, copying.copy_at(made, ".make()"))


def _same(value: Any) -> Any:
    return value


def _copy_state(value: State, copying: Copying) -> State:
    return _state(value, {name: copying.copy_at(item, f".{name}") for name, item in vars(value).items()})


def _prune_state(value: State, inside: Tree, copying: Copying) -> State:
    own = vars(value)
    return _state(value, {name: copying.part(own[name], inside[name], f".{name}") for name in inside if name in own})


def _state(value: State, entries: dict[str, Any]) -> State:
    copy = State(value._path)  # pyright: ignore[reportPrivateUsage]  # as above
    for name, item in entries.items():
        setattr(copy, name, item)
    return copy


def _copy_named(value: Named, copying: Copying) -> Named:
    return Named(value.__dict__["_what"], {name: copying.copy_at(item, f".{name}") for name, item in value.items()})


def _copy_tensors(value: Parameters | Gradients, copying: Copying) -> NamedTensors:
    return _tensors(value, None, copying)


def _prune_tensors(value: Parameters | Gradients, inside: Tree, copying: Copying) -> NamedTensors:
    return _tensors(value, inside, copying)


def _tensors(value: Parameters | Gradients, inside: Tree | None, copying: Copying) -> NamedTensors:
    found, aliases = _found(value)
    if inside is not None:
        named = {name for name in (*found, *aliases) if declared_inside(inside, name) is not None}
        named |= {aliases[name] for name in named & aliases.keys()}
        found = {name: tensor for name, tensor in found.items() if name in named}
    copies = copy_tensors(found, copying)
    kind = NamedTensors if isinstance(value, Parameters) else NamedGradients
    return kind(copies, aliases)


def _found(value: Parameters | Gradients) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return what iteration gives by name, and the further names of what a model has more than once."""
    # In one walk through the models, since it is as much work as a small copy.
    grads = isinstance(value, Gradients)
    params: Parameters = value._params if isinstance(value, Gradients) else value  # pyright: ignore[reportPrivateUsage]  # as above
    found: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for prefix, model in params._models.items():  # pyright: ignore[reportPrivateUsage]  # as above
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(prefix, remove_duplicate=False):
            known = first.setdefault(id(parameter), name)
            if known != name:
                aliases[name] = known
            elif not grads:
                found[name] = parameter
            elif parameter.grad is not None:
                found[name] = parameter.grad
    return found, aliases


STATE_COPIERS: Mapping[type, Copier] = {
    Series: _copy_series,
    SeriesMap: _copy_series_map,
    CountsMap: _copy_counts,
    PhaseMap: _copy_phase_map,
    State: _copy_state,
    Named: _copy_named,
    Parameters: _copy_tensors,
    Gradients: _copy_tensors,
}
"""How each type of flowtrain, and its subclasses, are copied; the first that fits."""

STATE_PRUNERS: Mapping[type, Pruner] = {
    SeriesMap: _prune_series_map,
    PhaseMap: _prune_phase_map,
    State: _prune_state,
    Parameters: _prune_tensors,
    Gradients: _prune_tensors,
}
