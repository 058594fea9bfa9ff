"""The running value of a metric that accumulates: a clone of a torchmetrics object for each phase, over all ranks.

In a training of several ranks the object of each rank has accumulated other batches. `Running.rank_state` gives the
declared states of the object, and `Running.merge_ranks` merges those of all ranks by the reductions that the object
declares for them. So torchmetrics, which would start a collective whenever a value is computed, never does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from flowtrain.errors import RankError

__all__ = ["Accumulator", "Running", "check_mergeable"]


@runtime_checkable
class Accumulator(Protocol):
    """The methods of a torchmetrics object that are used (https://lightning.ai/docs/torchmetrics)."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch."""

    def compute(self) -> Any:
        """Return the value over all batches since `reset`."""

    def reset(self) -> Any:
        """Forget all batches."""


class Running:
    """A torchmetrics object in one phase: it is reset for each epoch, and moved to the device of the batches.

    Args:
        f: The torchmetrics object, which is cloned.
        name: The name of the metric, for messages.
        on_step: Whether values of single batches are asked for too, which needs a second clone.

    Attributes:
        total: The clone that accumulates the batches of the epoch.
        updates: The number of these batches.
    """

    def __init__(self, f: Any, name: str, *, on_step: bool = False) -> None:
        self.total = _fresh(f)
        self.updates = 0
        self._name = name
        self._placed = False  # whether the clones are on the device of the batches
        self._single = _fresh(f) if on_step else None
        self._first = _plain(self.total)  # the plain attributes before the first batch

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""
        if not self._placed:
            self._placed = True
            device = next((each.device for each in (outputs, targets) if isinstance(each, torch.Tensor)), None)
            parts: list[Any] = [self.total, self._single]
            for each in parts:
                if device is not None and hasattr(each, "to"):
                    each.to(device)
        self.total.update(outputs, targets)
        self.updates += 1

    def value_of(self, outputs: Any, targets: Any) -> Any:
        """Return the value of one batch alone, or NaN if a single batch has no value, such as R2 of one sample."""
        single = self._single
        assert single is not None  # only metrics with `on_step` are asked for values of batches
        single.reset()
        single.update(outputs, targets)
        try:
            return _computed(single)
        except (ValueError, RuntimeError, ZeroDivisionError):
            return math.nan
        finally:
            single.reset()

    def compute(self) -> Any:
        """Return the value over the batches of the epoch; for a collection, a mapping from names to values."""
        return _computed(self.total)

    def reset(self) -> None:
        """Forget the batches."""
        if self.updates:
            self.total.reset()
            self.updates, self._placed = 0, False

    def rank_state(self) -> tuple[int, Any] | None:
        """Return the number of batches of this rank and their state, on the CPU; ``None`` without a batch."""
        if not self.updates:
            return None
        if _merges_itself(self.total):
            return self.updates, self.total.rank_state()
        if isinstance(self.total, torch.nn.ModuleDict):
            list(self.total.items())  # members that share their state have it in one of them; `items` copies it
        return self.updates, [_Part.of(*each) for each in zip(self.total.modules(), _plain(self.total), strict=True)]

    def merge_ranks(self, states: Sequence[tuple[int, Any] | None]) -> None:
        """Take in the batches of all ranks instead of those of this rank.

        Args:
            states: What `rank_state` has returned on each rank. Ranks without a batch are left out.

        Raises:
            RankError: The object keeps a value that is not declared as a state and differs between the ranks.
        """
        added = [state for state in states if state is not None]
        if not added:
            return
        self.updates = sum(updates for updates, _ in added)
        if _merges_itself(self.total):
            self.total.merge_ranks([state for _, state in added])
            return
        for place, module in enumerate(self.total.modules()):
            _Part.merge(module, [parts[place] for _, parts in added], self._name)

    def state_dict(self) -> tuple[list[Any], int]:
        """Return the state and the changed plain attributes of each clone, and the number of updates."""
        return [_state_of(each, self._first) for each in (self.total, self._single) if each is not None], self.updates

    def load_state_dict(self, parts: Sequence[Any], updates: int) -> None:
        """Restore the state that `state_dict` returned."""
        self.updates, self._placed = updates, False
        for f, (state, plain) in zip((self.total, self._single), parts, strict=False):
            if f is not None:
                _load_state(f, state, plain)


def check_mergeable(f: Any, name: str) -> None:
    """Check that the states of an object on several ranks can be merged.

    Raises:
        RankError: The object is no torchmetrics object, and does not say how it is merged.
    """
    modules = f.modules() if isinstance(f, torch.nn.Module) else ()
    if not _merges_itself(f) and not any(hasattr(module, "_reductions") for module in modules):
        kind = type(f).__name__
        raise RankError(
            f"The metric {name} is a {kind}, which adds up batches itself, and nothing says how to merge what several "
            f"ranks have added up. Give {kind} two methods: rank_state(self), which returns what this rank has added "
            f"up, and merge_ranks(self, states), which replaces it by the merged states of all ranks. Or make it a "
            f"torchmetrics.Metric that declares its states: self.add_state('total', torch.tensor(0.0), "
            f"dist_reduce_fx='sum')."
        )


def _merges_itself(f: Any) -> bool:
    return hasattr(f, "rank_state") and hasattr(f, "merge_ranks")


class _Part(NamedTuple):
    """The state of one module of a torchmetrics object on one rank, as another process can read it.

    Attributes:
        states: The states that the module declares with ``add_state``, on the CPU.
        plain: The plain attributes that the module has beside them.
        device: The type of the device that the module is on; empty for a module that declares no states.
    """

    states: dict[str, Any]
    plain: dict[str, Any]
    device: str

    @classmethod
    def of(cls, module: Any, plain: dict[str, Any]) -> _Part:
        """Return the state of a module."""
        states = {name: getattr(module, name) for name in getattr(module, "_reductions", ())}
        return cls(_moved(states, "cpu"), _moved(plain, "cpu"), module.device.type if states else "")

    @staticmethod
    def merge(module: Any, parts: Sequence[_Part], name: str) -> None:
        """Give a module the merged states of the ranks that have batches.

        A state that is a list becomes the lists of all ranks one after another, as if one process had seen all batches.
        A state that is a tensor is reduced as the module declares it, or stacked if it declares no reduction.

        Raises:
            RankError: As for `Running.merge_ranks`.
        """
        first = parts[0]
        for attribute in dict.fromkeys(chain.from_iterable(part.plain for part in parts)):
            values: list[Any] = [part.plain.get(attribute) for part in parts]
            value = values[0]
            if attribute == "_update_count":  # by it torchmetrics knows whether there is a value to compute
                value = sum(values)
            elif not all(_equal(value, each) for each in values):
                raise RankError(
                    f"The metric {name} keeps {attribute!r} in {type(module).__name__}, which is no declared state. It "
                    f"is {', '.join(map(repr, values))} on the ranks with batches, and nothing says which value the "
                    f"ranks have together. Declare it with self.add_state({attribute!r}, ..., dist_reduce_fx='sum'), "
                    f"or give the object two methods, rank_state(self) and merge_ranks(self, states)."
                )
            setattr(module, attribute, value)
        if not first.states:
            return
        if module.device.type != first.device:  # this rank had no batch, whose device it would have moved to
            module.to(first.device)
        for attribute, reduction in module._reductions.items():
            merged = _reduced(reduction, [part.states[attribute] for part in parts])
            setattr(module, attribute, _moved(merged, module.device))
        module._computed = None  # a value that was computed before the merge


def _reduced(reduction: Callable[[torch.Tensor], torch.Tensor] | None, values: list[Any]) -> Any:
    """Return the merged values of one state, in the order of the ranks."""
    if any(isinstance(value, list) for value in values):
        return [*chain.from_iterable(value if isinstance(value, list) else [value] for value in values)]
    if len(values) == 1:
        return values[0]
    if getattr(reduction, "__name__", "") == "dim_zero_cat":
        return torch.cat(values)
    stacked = torch.stack(torch.broadcast_tensors(*values))  # torchmetrics 1.4 changes some from shape () to (1,)
    return stacked if reduction is None else reduction(stacked)


def _moved(value: Any, device: Any) -> Any:
    """Return a state with its tensors on a device, without graphs."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if type(value) is dict:
        return {name: _moved(each, device) for name, each in value.items()}
    return [_moved(each, device) for each in value] if type(value) is list else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    return type(one) is type(other) and repr(one) == repr(other)  # their texts, because NaN does not equal itself


def _alone() -> bool:
    """Return that torchmetrics has no other processes to synchronise with: `Running.merge_ranks` does that."""
    return False


def _state_of(f: Any, first: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Return the state of a torchmetrics object, and the plain attributes of each of its modules that have changed."""
    if not isinstance(f, torch.nn.Module):
        return f.state_dict() if hasattr(f, "state_dict") else copy.deepcopy(vars(f)), []
    if isinstance(f, torch.nn.ModuleDict):
        list(f.items())  # members that share their state have it in one of them; `items` copies it to the others
    changed = [
        {name: value for name, value in own.items() if name not in before or before[name] is not value}
        for own, before in zip(_plain(f), first, strict=True)
    ]
    return f.state_dict(), changed


def _load_state(f: Any, state: dict[str, Any], plain: Sequence[Any]) -> None:
    if not isinstance(f, torch.nn.Module) and not hasattr(f, "load_state_dict"):
        vars(f).update(copy.deepcopy(state))
        return
    if state:
        f.load_state_dict(state)
    for module, own in zip(f.modules() if plain else (), plain, strict=True):
        own = own if isinstance(own, Mapping) else {"_update_count": own}  # early checkpoints have only this number
        for name, value in own.items():
            setattr(module, name, value)


def _plain(f: Any) -> list[dict[str, Any]]:
    """Return the plain attributes of each module of a torchmetrics object that are not in its ``state_dict``.

    Some objects keep more than their declared state, such as the number of values in a window, or the least value of
    all epochs.
    """
    found = []
    for part in f.modules() if isinstance(f, torch.nn.Module) else ():
        left_out = {*getattr(part, "_defaults", ()), "_computed", "_forward_cache", "_cache"}  # the state, and caches
        kinds = (int, float, str, bool, torch.Tensor)
        found.append({name: each for name, each in vars(part).items() if type(each) in kinds and name not in left_out})
    return found


def _fresh(f: Any) -> Any:
    """Return a clone of a torchmetrics object without batches, whose whole state is in its ``state_dict``."""
    clone = f.clone() if hasattr(f, "clone") else copy.deepcopy(f)
    clone.reset()  # the user may have updated the object
    parts: list[Any] = [*clone.modules()] if isinstance(clone, torch.nn.Module) else []
    for part in parts:
        if hasattr(part, "persistent"):
            part.persistent(mode=True)  # of each part, because a wrapper does not pass this on to its metric
        if hasattr(part, "distributed_available_fn"):  # or `compute` would wait for ranks that have other handlers
            part.distributed_available_fn = _alone
    members = [*clone.values()] if isinstance(clone, torch.nn.ModuleDict) else []
    if any(isinstance(child, Accumulator) for member in members for child in member.children()):
        # A collection finds members with equal states and updates only one of them. It wrongly takes a wrapper, which
        # has no state of its own, for equal to another member.
        vars(clone).update(_enable_compute_groups=False, _groups_checked=False, _groups={})
    return clone


def _computed(f: Any) -> Any:
    # Compute the members of a collection one by one: its own `compute` leaves out the name of the member for a wrapper.
    if not isinstance(f, torch.nn.ModuleDict):
        return f.compute()
    members: list[tuple[str, Any]] = [*f.items()]
    return {name: member.compute() for name, member in members}
