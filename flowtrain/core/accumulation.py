"""Accumulation groups: how many batches each optimizer has gone without an update, and whose gradients are spent.

A group is the batches that make one update. It begins with zeroed gradients, takes in one batch after the other, and
ends with the optimizer's step: when it is full, at the last batch of the epoch, or behind it, where the last batches
were cancelled or the loader gave fewer than it had said. Each optimizer has its own, since a step of one's own may
update one of them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from flowtrain.core.optimizers import zeroing

__all__ = ["Groups"]


class Groups:
    """The accumulation groups of the optimizers of one core.

    Attributes:
        size: Batches in a full group.
        last_batch: Whether this batch is the last of its epoch; that ends a group which is not full.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], size: int) -> None:
        self.size = size
        self.last_batch = False
        self._optimizers = optimizers
        self._zero = {name: zeroing(optimizer) for name, optimizer in optimizers.items()}
        self._counts = dict.fromkeys(optimizers, 0)
        self._asked: dict[str, str | None] = {}  # for each optimizer the argument of `due`; the latest call is the last
        self._complete = dict.fromkeys(optimizers, True)
        self._spent: set[str] = set()  # stepped in this batch: their gradients belong to no group any more

    @property
    def open(self) -> bool:
        """Whether some group has begun and not ended."""
        return not all(self._complete.values())

    @property
    def waiting(self) -> list[str]:
        """The optimizers with gradients that they have not stepped with, if they have any."""
        return [name for name in self._optimizers if name not in self._spent]

    def begin(self) -> None:
        """Zero the gradients of every optimizer whose next group begins here."""
        self._spent.clear()
        for name, complete in self._complete.items():
            if complete:
                self._zero[name]()
                self._complete[name] = False

    def drop_spent(self) -> None:
        """Zero the gradients that an optimizer has stepped with in this batch, before a further backward pass in it."""
        for name in self._spent:
            self._zero[name]()
        self._spent.clear()

    def due(self, name: str | None = None) -> list[str]:
        """Count a batch for one optimizer, or for all, and return those whose group is complete."""
        names = list(self._optimizers) if name is None else [name]
        for each in names:
            self._counts[each] += 1
            self._asked.pop(each, None)
            self._asked[each] = name
        return [each for each in names if self.last_batch or self._counts[each] >= self.size]

    @property
    def unfilled(self) -> list[list[str]]:
        """The optimizers whose groups have taken in batches and are not full; together if `due` was asked for all."""
        waiting = {name: call for name, call in self._asked.items() if self._counts[name]}
        return [[name for name in waiting if waiting[name] == call] for call in dict.fromkeys(waiting.values())]

    def share(self, name: str) -> float:
        """Return what the gradients of a group that is due are to be multiplied with.

        Each loss was divided by the size of a full group; one that turned out shorter has to make up for it.
        """
        return self.size / self._counts[name] if self._counts[name] < self.size else 1.0

    def end(self, names: Iterable[str]) -> None:
        """End the groups of the optimizers that have stepped."""
        for name in names:
            self._counts[name] = 0
            self._complete[name] = True
            self._spent.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Return which groups have begun, and after how many batches; the gradients are with the parameters."""
        asked = [[name, call] for name, call in self._asked.items()]  # a list keeps its order in every format
        return {"counts": dict(self._counts), "complete": dict(self._complete), "asked": asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._counts, self._complete = dict(state["counts"]), dict(state["complete"])
        self._asked = dict(state.get("asked", []))
        self._spent.clear()

    def discard(self) -> None:
        """Throw away the gradients of all groups; the next batch begins new ones."""
        for name, zero in self._zero.items():
            zero()
            self._counts[name] = 0
            self._complete[name] = True
