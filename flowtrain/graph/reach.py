# pyright: reportPrivateUsage=false
# torch has no public way to the tables of a module without running properties of the user's.
"""The model of conflicts: which state a path reaches, and where two declarations meet.

Several paths can reach one object: ``params["0.weight"]`` is a parameter of ``model``, its ``.grad`` is an entry of
``batch.grads``, and the optimizer holds it in ``param_groups``. So a path is mapped to *regions* (`Reach`). A region is
written as a path, and stands for one piece of state:

- ``model.…`` and ``lossfn.…``: values of parameters and buffers, and attributes of modules;
- ``batch.grads.…``: gradients, by the names of the parameters of ``model``. The first part of these is
  ``"batch.grads"``, since not all that reaches the batch reaches gradients;
- ``optimizer.hyperparams`` and ``optimizer.state``, with several optimizers after the name of each;
- any other path for itself.

A region covers everything below it. Two paths meet where a region of one covers a region of the other, and two
callbacks conflict where their paths meet and at least one of them writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from flowtrain.callback.access import Declaration, Path, Write, canonical, dotted, meet
from flowtrain.callback.events import BatchBegin
from flowtrain.state.learner_state import LearnerState, Named

__all__ = ["COMPUTED", "Meeting", "Reach", "attribute", "meetings"]

_GRADS = "batch.grads"
_PARTS = ("hyperparams", "state", "param_groups", "defaults")
"""The attributes of an optimizer that its class does not have: any other name may be one of several optimizers."""


class Reach:
    """Maps a path to all regions that it reaches.

    Args:
        state: The learner's state, which tells the names of models and optimizers, the parameters of each optimizer,
            and modules and tensors that have several names (tied weights). Without it an optimizer that has a name is
            taken to train the model of that name.
    """

    def __init__(self, state: LearnerState | None = None) -> None:
        self._state = LearnerState() if state is None else state
        self._known: dict[Path, tuple[Path, ...]] = {}

    def __call__(self, path: Path) -> tuple[Path, ...]:
        """Return the regions that a path reaches, sorted."""
        if path not in self._known:
            self._known[path] = tuple(sorted(self._find(path)))
        return self._known[path]

    def meet(self, one: Path, other: Path) -> bool:
        """Tell whether two paths reach one piece of state."""
        return any(meet(region, reached) for region in self(one) for reached in self(other))

    def _find(self, path: Path) -> set[Path]:
        if path[:2] == ("batch", "grads"):
            return {(_GRADS, *name[1:]) for name in self._names(("model", *path[2:])) if name[0] == "model"}
        if path == ("batch",):
            return {path, (_GRADS,)}
        if path[0] in ("model", "params", "lossfn"):
            return self._with_gradients(self._names(canonical(path)))
        if path[0] == "optimizer":
            return self._optimizer(path)
        if path[0] == "data":
            return {path, *self._loaded()}
        return {path}

    def _optimizer(self, path: Path) -> set[Path]:
        optimizer = self._state.optimizer
        several = isinstance(optimizer, Named) or (
            optimizer is None and not (path[1:2] and (path[1] in _PARTS or hasattr(Optimizer, path[1])))
        )
        whole, part = path[: 1 + several], path[1 + several : 2 + several]
        if part in (("hyperparams",), ("state",), ("defaults",)):
            return self._names(path)
        own = (*whole, "hyperparams") if part == ("param_groups",) else whole
        return self._names(own) | self._trained(*whole[1:])

    def _trained(self, name: str = "") -> set[Path]:
        """Return the regions of the modules whose parameters an optimizer holds; one without a name trains all."""
        state = self._state
        if not name:
            roots: list[Path] = [("model",), ("lossfn",)]
        elif state.optimizer is None or name not in state.optimizer:
            roots = [("model", name), ("lossfn",)]
        else:
            held = {id(param) for group in state.optimizer[name].param_groups for param in group["params"]}
            roots = [root for root, module in self._modules if any(id(param) in held for param in module.parameters())]
        return self._with_gradients({region for root in roots for region in self._names(root)})

    def _with_gradients(self, regions: set[Path]) -> set[Path]:
        """Add the gradients of the parameters that are in regions of the model: both hang on one object."""
        with_params = [
            region
            for region in regions
            if region[0] == "model" and (not self._modules or any(meet(region, param) for param in self._parameters))
        ]
        return regions | {(_GRADS, *region[1:]) for region in with_params}

    def _loaded(self) -> set[Path]:
        """Return the entries of the batch that may be objects which a loader keeps, as the items of a list are."""
        found: set[Path] = {("batch", "inputs"), ("batch", "targets")}
        for phase in self._state.data:
            if phase.provides is None:
                return {("batch",)}
            found |= {("batch", name) for name, event in phase.provides.items() if event is BatchBegin}
        return found

    def explains(self, path: Path, changed: Path) -> bool:
        """Tell whether a write of a path may be what changed the state at another, which `fingerprints` names.

        A parameter's own value is not changed by a write of its gradient, though both paths reach the gradient.
        """
        regions = self(changed) if changed[:2] == ("batch", "grads") else (changed,)
        return any(meet(region, reached) for region in regions for reached in self(path))

    # --- things with several names

    def _names(self, path: Path) -> set[Path]:
        """Return a region, and all other names of the modules and tensors at it, above it and below it."""
        path = self._registered(path)
        found = {path}
        for names in self._shared:
            for name in names:
                if meet(name, path):
                    found |= {(*other, *path[len(name) :]) for other in names}
        return found

    def _registered(self, path: Path) -> Path:
        """Return a region by registered names: an attribute of a module may be another module, or any part of it."""
        root, module = next(((at, each) for at, each in self._modules if path[: len(at)] == at), ((), None))
        for depth in range(len(root), len(path)):
            name = path[depth]
            if module is None or name in module._parameters or name in module._buffers:
                return path
            if name in module._modules:
                module = module._modules[name]
                continue
            if "_orig_mod" in module._modules:  # compiled: the names are those of the module inside
                return self._registered((*path[:depth], "_orig_mod", *path[depth:]))
            try:
                value = attribute(module, name)
            except AttributeError:
                return path
            if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
                return path  # nothing that another name could reach
            place = self._places.get(id(value))
            return path[:depth] if place is None else self._registered((*place, *path[depth + 1 :]))
        return path

    @cached_property
    def _modules(self) -> list[tuple[Path, nn.Module]]:
        """The models and the loss function, where they are modules, with the region of each."""
        state = self._state
        models = dict(state.model) if isinstance(state.model, Named) else {"": state.model}
        found: list[tuple[Path, Any]] = [(_join(("model",), name), model) for name, model in models.items()]
        found.append((("lossfn",), state.lossfn))
        if not isinstance(state.lossfn, nn.Module):  # an object that may hold the model, or a part of it
            found += [(("lossfn", name), value) for name, value in getattr(state.lossfn, "__dict__", {}).items()]
        return [(root, module) for root, module in found if isinstance(module, nn.Module)]

    @cached_property
    def _parameters(self) -> list[Path]:
        return [_join(root, name) for root, module in self._modules for name, _ in module.named_parameters()]

    def _named(self) -> list[tuple[Path, Any]]:
        """Every module and tensor of models and loss, and the tensors among hyperparameters, by every name."""
        found: list[tuple[Path, Any]] = []
        for root, module in self._modules:
            for named in (module.named_modules, module.named_parameters, module.named_buffers):
                found += [(_join(root, name), each) for name, each in named(remove_duplicate=False)]
        optimizer = self._state.optimizer
        for name, each in dict(optimizer).items() if isinstance(optimizer, Named) else (("", optimizer),):
            root = _join(("optimizer",), name)
            for part, groups in (("hyperparams", each.param_groups), ("defaults", [each.defaults])) if each else ():
                values = [value for group in groups for value in group.values()]
                found += [((*root, part), value) for value in values if isinstance(value, torch.Tensor)]
        return found

    @cached_property
    def _places(self) -> dict[int, Path]:
        """The first name of each module and tensor by its id."""
        return {id(each): path for path, each in reversed(self._named())}

    @cached_property
    def _shared(self) -> list[list[Path]]:
        """The names of each module, and of all tensors in one piece of memory, where there are at least two."""
        spans = sorted((*_span(each), path) for path, each in self._named())
        groups: list[list[Path]] = []
        last, last_end = "", 0
        for kind, begin, end, path in spans:
            if kind != last or begin >= last_end:
                groups.append([])
                last, last_end = kind, end
            last_end = max(last_end, end)
            groups[-1].append(path)
        return [names for names in map(_distinct, groups) if len(names) > 1]


def attribute(holder: object, name: str) -> Any:
    """Return an attribute of an object, without running code of its class; `COMPUTED` where that would have to run.

    The code of a property may draw random numbers, and that of a spectral norm changes a buffer.

    Raises:
        AttributeError: There is none.
    """
    if isinstance(holder, nn.Module):
        for members in (holder._parameters, holder._buffers, holder._modules):
            if name in members:
                return members[name]
        if "_orig_mod" in holder._modules:  # compiled
            return attribute(holder._modules["_orig_mod"], name)
    if name in (own := getattr(holder, "__dict__", {})):
        return own[name]
    value = inspect.getattr_static(type(holder), name, _MISSING)
    if value is not _MISSING:
        return COMPUTED if hasattr(type(value), "__get__") else value
    if inspect.getattr_static(type(holder), "__getattr__", _OF_MODULES) is _OF_MODULES:
        raise AttributeError(name)
    return COMPUTED


COMPUTED = object()
"""Stands for an attribute that exists only when code has run, if at all."""
_MISSING = object()
_OF_MODULES = nn.Module.__getattr__


def _join(root: Path, *names: str) -> Path:
    """Add dotted names to a path; an empty one adds nothing."""
    return (*root, *(part for name in names for part in name.split(".") if part))


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _span(value: Any) -> tuple[str, int, int]:
    """Return where a tensor's memory is, from its first byte to behind its last; for anything else its identity."""
    if isinstance(value, torch.Tensor):
        try:
            begin = value.data_ptr() if value.numel() else 0
            last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
        except (RuntimeError, ValueError):  # it has no memory of its own, or has none yet
            begin = last = 0
        if begin:
            return str(value.device), begin, begin + (last + 1) * value.element_size()
    return "", id(value), id(value) + 1


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two declarations that reach one piece of state, at least one of them writing.

    Attributes:
        first: Position of the one declaration, the smaller of the two.
        second: Position of the other.
        paths: What each declares, in the same order.
        writes: Whether each writes, in the same order.
        region: What both reach; of several regions the first.
    """

    first: int
    second: int
    paths: tuple[Path, Path]
    writes: tuple[bool, bool]
    region: Path

    @property
    def why(self) -> str:
        """What both reach, in brackets, for a message that names the paths; empty where the paths show it."""
        one, other = map(canonical, self.paths)
        return "" if meet(one, other) else f" (both reach {dotted(self.region)})"


def meetings(declarations: Sequence[Declaration], reach: Reach | None = None) -> Iterator[Meeting]:
    """Yield every pair of positions whose declarations meet with a write, once for each pair of paths.

    The regions are indexed, and each is looked up under its own prefixes: the cost grows with the number of regions
    and of meetings, not with the square of the declarations.

    Args:
        declarations: What each callback declares.
        reach: The regions of paths; without it the ones that hold without a learner.
    """
    seen: set[tuple[int, int, tuple[Path, Path]]] = set()
    for meeting in _all_meetings(declarations, reach or Reach()):
        key = (meeting.first, meeting.second, meeting.paths)
        if key not in seen:
            seen.add(key)
            yield meeting


def _all_meetings(declarations: Sequence[Declaration], reach: Reach) -> Iterator[Meeting]:
    """Yield the meetings, once for each pair of regions."""
    readers: dict[Path, list[tuple[int, Path]]] = {}
    writers: dict[Path, list[tuple[int, Path]]] = {}
    for position, declaration in enumerate(declarations):
        for path, kind in declaration:
            index = writers if isinstance(kind, Write) else readers
            for region in reach(path):
                index.setdefault(region, []).append((position, path))
    # Sorted, so that messages and `explain` are the same in every run; gradients last, since they come with parameters.
    for region in sorted(readers.keys() | writers.keys(), key=lambda each: (each[0] == _GRADS, each)):
        for length in range(1, len(region) + 1):
            prefix = region[:length]
            above, below = writers.get(prefix, ()), writers.get(region, ())
            for one in above:
                for other in readers.get(region, ()):
                    yield from _meeting(one, other, (True, False), region)
            for one in readers.get(prefix, ()):
                for other in below:
                    yield from _meeting(one, other, (False, True), region) if prefix != region else ()
            for number, one in enumerate(above):
                for other in below[number + 1 :] if prefix == region else below:
                    yield from _meeting(one, other, (True, True), region)


def _meeting(
    one: tuple[int, Path], other: tuple[int, Path], writes: tuple[bool, bool], region: Path
) -> Iterator[Meeting]:
    if one[0] < other[0]:
        yield Meeting(one[0], other[0], (one[1], other[1]), writes, region)
    elif other[0] < one[0]:
        yield Meeting(other[0], one[0], (other[1], one[1]), (writes[1], writes[0]), region)
