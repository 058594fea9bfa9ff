# pyright: reportPrivateUsage=false
# The tables of a module are private in torch, and its public methods may run properties that the user has written.
"""The model of conflicts: the state that a path reaches, and the places where two declarations meet.

Several paths can reach one object: ``params["0.weight"]`` is a parameter of ``model``, its ``.grad`` is an entry of
``batch.grads``, and the optimizer holds it in ``param_groups``. So `Reach` maps a path to *regions*. A region is
written like a path, and stands for one piece of state:

- ``model.…`` and ``lossfn.…`` are values of parameters and buffers, and attributes of modules.
- ``batch.grads.…`` are gradients, by the names of the parameters of ``model``. The first part of these regions is
  ``"batch.grads"``, so that the other entries of the batch are not above them.
- ``optimizer.hyperparams`` and ``optimizer.state`` are parts of the optimizer; with several optimizers the name of the
  optimizer comes between the two parts.
- Any other path is a region itself.

A region covers everything below it. Two paths overlap where a region of one covers a region of the other. Two callbacks
conflict where their paths overlap and at least one of them writes; `meetings` finds all such pairs.
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

from flowtrain.callback.access import Declaration, Path, Write, canonical, dotted, overlap
from flowtrain.callback.events import BatchBegin
from flowtrain.state.learner_state import LearnerState, Named, by_name

__all__ = ["COMPUTED", "Meeting", "Reach", "attribute", "meetings"]

_GRADS = "batch.grads"
_PARTS = ("hyperparams", "state", "param_groups", "defaults")
"""The attributes that only an instance of an optimizer has. Any other name may be that of one of several optimizers."""


class Reach:
    """Maps a path to all regions that it reaches.

    Args:
        state: The learner's state. It gives the names of models and optimizers, the parameters of each optimizer, and
            the modules and tensors that have several names (tied weights). Without a state an optimizer with a name is
            assumed to train the model of that name.
    """

    def __init__(self, state: LearnerState | None = None) -> None:
        self._state = LearnerState() if state is None else state
        self._cache: dict[Path, tuple[Path, ...]] = {}

    def __call__(self, path: Path) -> tuple[Path, ...]:
        """Return the regions that a path reaches, sorted."""
        if path not in self._cache:
            self._cache[path] = tuple(sorted(self._find(path)))
        return self._cache[path]

    def overlap(self, one: Path, other: Path) -> bool:
        """Tell whether two paths reach one piece of state."""
        return any(overlap(region, reached) for region in self(one) for reached in self(other))

    def _find(self, path: Path) -> set[Path]:
        """Return the regions that a path reaches, without the cache."""
        if path[:2] == ("batch", "grads"):  # has the parameters of models only, not those of the loss function
            return {(_GRADS, *name[1:]) for name in self._names(("model", *path[2:])) if name[0] == "model"}
        if path == ("batch",):
            return {path, (_GRADS,)}  # the view of the whole batch gives the gradients too
        if path[0] in ("model", "params", "lossfn"):
            return self._with_gradients(self._names(canonical(path)))
        if path[0] == "optimizer":
            return self._optimizer(path)
        if path[0] == "data":
            return {path, *self._loaded()}
        return {path}

    def _optimizer(self, path: Path) -> set[Path]:
        """Return the regions that a path below ``optimizer`` reaches."""
        optimizer = self._state.optimizer
        # Without a learner the path itself has to tell whether its second part is the name of an optimizer.
        several = isinstance(optimizer, Named) or (
            optimizer is None and not (path[1:2] and (path[1] in _PARTS or hasattr(Optimizer, path[1])))
        )
        root, part = path[: 1 + several], path[1 + several : 2 + several]
        if part in (("hyperparams",), ("state",), ("defaults",)):
            return self._names(path)
        # Everything else of an optimizer leads to its parameters too: its methods, and its groups.
        region = (*root, "hyperparams") if part == ("param_groups",) else root
        return self._names(region) | self._trained(*root[1:])

    def _trained(self, name: str = "") -> set[Path]:
        """Return the regions of the modules whose parameters an optimizer holds.

        An optimizer without a name is the only one, and holds the parameters of all models and of the loss function.
        """
        state = self._state
        if not name:
            roots: list[Path] = [("model",), ("lossfn",)]
        elif state.optimizer is None or name not in state.optimizer:
            roots = [("model", name), ("lossfn",)]
        else:
            # The name of an optimizer need not be that of a model, so its parameters tell which models it trains.
            held = {id(param) for group in state.optimizer[name].param_groups for param in group["params"]}
            roots = [root for root, module in self._modules if any(id(param) in held for param in module.parameters())]
        return self._with_gradients({region for root in roots for region in self._names(root)})

    def _with_gradients(self, regions: set[Path]) -> set[Path]:
        """Add the gradients of the parameters in regions of the model, which are reached as ``.grad``."""
        # Without a learner the parameters are not known, so every part of the model may have some.
        with_params = [
            region
            for region in regions
            if region[0] == "model" and (not self._modules or any(overlap(region, param) for param in self._parameters))
        ]
        return regions | {(_GRADS, *region[1:]) for region in with_params}

    def _loaded(self) -> set[Path]:
        """Return the entries of the batch that may be items of a loader, such as a list that gives its own items."""
        entries: set[Path] = {("batch", "inputs"), ("batch", "targets")}
        for phase in self._state.data:
            if phase.provides is None:
                return {("batch",)}  # any entry of the batch may come from the loader
            entries |= {("batch", name) for name, event in phase.provides.items() if event is BatchBegin}
        return entries

    def explains(self, path: Path, changed: Path) -> bool:
        """Tell whether a write of a path can have changed the state at another path, which strict mode found changed.

        A write of a gradient does not change the value of its parameter, although both paths reach the gradient.
        """
        regions = self(changed) if changed[:2] == ("batch", "grads") else (changed,)
        return any(overlap(region, reached) for region in regions for reached in self(path))

    # --- modules and tensors with several names

    def _names(self, path: Path) -> set[Path]:
        """Return a region under all names that the modules and tensors at it, above it and below it have."""
        path = self._registered(path)
        regions = {path}
        for names in self._shared:
            for name in names:
                if overlap(name, path):
                    regions |= {(*other, *path[len(name) :]) for other in names}
        return regions

    def _registered(self, path: Path) -> Path:
        """Return a region by the names under which modules are registered.

        A path may go through a plain attribute that holds a module, or a part of one, from elsewhere in the model.
        """
        root, module = next(((at, module) for at, module in self._modules if path[: len(at)] == at), ((), None))
        for depth in range(len(root), len(path)):
            name = path[depth]
            if module is None or name in module._parameters or name in module._buffers:
                return path
            if name in module._modules:
                module = module._modules[name]
                continue
            if "_orig_mod" in module._modules:  # a compiled module: users write the names of the module inside it
                return self._registered((*path[:depth], "_orig_mod", *path[depth:]))
            try:
                value = attribute(module, name)
            except AttributeError:
                return path
            if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
                return path  # a plain value belongs to this attribute alone
            place = self._places.get(id(value))
            # An unknown object, or a property, may show any part of the module: the region is the whole module.
            return path[:depth] if place is None else self._registered((*place, *path[depth + 1 :]))
        return path

    @cached_property
    def _modules(self) -> list[tuple[Path, nn.Module]]:
        """The models and the loss function, if it is a module, each with its region."""
        state = self._state
        roots: list[tuple[Path, Any]] = [(_join(("model",), name), each) for name, each in by_name(state.model).items()]
        roots.append((("lossfn",), state.lossfn))
        if not isinstance(state.lossfn, nn.Module):  # a plain object may hold the model, or a part of it
            roots += [(("lossfn", name), value) for name, value in getattr(state.lossfn, "__dict__", {}).items()]
        return [(root, module) for root, module in roots if isinstance(module, nn.Module)]

    @cached_property
    def _parameters(self) -> list[Path]:
        return [_join(root, name) for root, module in self._modules for name, _ in module.named_parameters()]

    def _named(self) -> list[tuple[Path, Any]]:
        """Return every module and tensor of models and loss function, and the tensors among hyperparameters, by name.

        A module or tensor that has several names is there once under each of them.
        """
        named: list[tuple[Path, Any]] = []
        for root, module in self._modules:
            for members in (module.named_modules, module.named_parameters, module.named_buffers):
                named += [(_join(root, name), member) for name, member in members(remove_duplicate=False)]
        for name, one in by_name(self._state.optimizer).items():
            root = _join(("optimizer",), name)
            # A learning rate may be a tensor, and one tensor may be in several groups or optimizers.
            for part, groups in (("hyperparams", one.param_groups), ("defaults", [one.defaults])) if one else ():
                values = [value for group in groups for value in group.values()]
                named += [((*root, part), value) for value in values if isinstance(value, torch.Tensor)]
        return named

    @cached_property
    def _places(self) -> dict[int, Path]:
        """The first name of each module and tensor, by its id."""
        # Reversed, so that the first of several names is assigned last.
        return {id(value): path for path, value in reversed(self._named())}

    @cached_property
    def _shared(self) -> list[list[Path]]:
        """The groups of names that reach one module, or tensors in overlapping memory; each has at least two names."""
        spans = sorted((*_span(value), path) for path, value in self._named())
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
    """Return an attribute of an object without running code of its class; `COMPUTED` if that code would have to run.

    The code of a property may draw random numbers, and the code of a spectral norm changes a buffer.

    Raises:
        AttributeError: The object has no attribute of that name.
    """
    if isinstance(holder, nn.Module):
        for members in (holder._parameters, holder._buffers, holder._modules):
            if name in members:
                return members[name]
        if "_orig_mod" in holder._modules:  # a compiled module shows the attributes of the module inside it
            return attribute(holder._modules["_orig_mod"], name)
    if name in (own := getattr(holder, "__dict__", {})):
        return own[name]
    value = inspect.getattr_static(type(holder), name, _MISSING)
    if value is not _MISSING:
        return COMPUTED if hasattr(type(value), "__get__") else value
    # A `__getattr__` of the user's class may know the name; that of modules looks into the tables from above only.
    if inspect.getattr_static(type(holder), "__getattr__", _MODULE_GETATTR) is _MODULE_GETATTR:
        raise AttributeError(name)
    return COMPUTED


COMPUTED = object()
"""Stands for the value of an attribute that only running code can tell, and that may not exist at all."""
_MISSING = object()
_MODULE_GETATTR = nn.Module.__getattr__


def _join(root: Path, *names: str) -> Path:
    """Add dotted names to a path; an empty one adds nothing."""
    return (*root, *(part for name in names for part in name.split(".") if part))


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _span(value: Any) -> tuple[str, int, int]:
    """Return the device of a tensor and the addresses of its first byte and of the byte behind its last one.

    For any other object the span is its id alone, so that it overlaps with itself and with nothing else.
    """
    if isinstance(value, torch.Tensor):
        try:
            begin = value.data_ptr() if value.numel() else 0
            last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
        except (RuntimeError, ValueError):  # a tensor without memory, such as a fake or a lazy one
            begin = last = 0
        if begin:
            return str(value.device), begin, begin + (last + 1) * value.element_size()
    return "", id(value), id(value) + 1


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two declarations that reach one piece of state, of which at least one writes.

    Attributes:
        first: The position of the first declaration, which is the smaller one.
        second: The position of the second declaration.
        paths: The path that each of the two declares, in the same order.
        writes: Whether each of the two writes, in the same order.
        region: The piece of state that both reach; the first one of several.
    """

    first: int
    second: int
    paths: tuple[Path, Path]
    writes: tuple[bool, bool]
    region: Path

    @property
    def why(self) -> str:
        """The region in brackets, for a message that names both paths; empty where the paths themselves overlap."""
        one, other = map(canonical, self.paths)
        return "" if overlap(one, other) else f" (both reach {dotted(self.region)})"


def meetings(declarations: Sequence[Declaration], reach: Reach | None = None) -> Iterator[Meeting]:
    """Yield every pair of declarations that meet and of which at least one writes, once for each pair of paths.

    The regions are indexed, and each region is looked up under its own prefixes. So the cost grows with the number of
    regions and of meetings, and not with the square of the number of declarations.

    Args:
        declarations: The declarations of the callbacks.
        reach: Maps paths to regions; without it the regions are used that hold without a learner.
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
    # Sorted, so that messages and `explain` are the same in every run. Gradients go last, so that a meeting is reported
    # by its parameter, whose name users know.
    for region in sorted(readers.keys() | writers.keys(), key=lambda path: (path[0] == _GRADS, path)):
        for length in range(1, len(region) + 1):
            prefix = region[:length]
            above, below = writers.get(prefix, ()), writers.get(region, ())
            for one in above:
                for other in readers.get(region, ()):
                    yield from _meeting(one, other, (True, False), region)
            for one in readers.get(prefix, ()):
                for other in below:
                    # At the region itself, the loop above has already yielded each writer with each reader.
                    yield from _meeting(one, other, (False, True), region) if prefix != region else ()
            for number, one in enumerate(above):
                for other in below[number + 1 :] if prefix == region else below:
                    yield from _meeting(one, other, (True, True), region)


def _meeting(
    one: tuple[int, Path], other: tuple[int, Path], writes: tuple[bool, bool], region: Path
) -> Iterator[Meeting]:
    """Yield the meeting of two declarations, the smaller position first; nothing if both are the same declaration."""
    if one[0] < other[0]:
        yield Meeting(one[0], other[0], (one[1], other[1]), writes, region)
    elif other[0] < one[0]:
        yield Meeting(other[0], one[0], (other[1], one[1]), (writes[1], writes[0]), region)
