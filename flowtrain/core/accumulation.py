"""Accumulation groups: the batches that each optimizer has taken gradients from since its last update.

A group is the batches whose gradients make one update. It begins with zeroed gradients, takes in one batch after the
other, and ends with the update. The update comes when the group is full, or at the last batch of the epoch, or after
the last batch if that batch was cancelled or if the loader gave fewer batches than it had said. Each optimizer has a
group of its own, since the step of a user's phase may update one optimizer alone.

After an update the gradients stay until the next batch begins, so that handlers can read them. They are *spent*: they
belong to no group any more.
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
        size: The number of batches in a full group.
        last_batch: Whether the current batch is the last of its epoch, which ends a group even if it is not full.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], size: int) -> None:
        self.size = size
        self.last_batch = False
        self._optimizers = optimizers
        self._zero = {name: zeroing(optimizer) for name, optimizer in optimizers.items()}
        self._counts = dict.fromkeys(optimizers, 0)
        # The argument of the last call of `due` for each optimizer, in the order of these calls.
        self._asked: dict[str, str | None] = {}
        self._complete = dict.fromkeys(optimizers, True)
        self._spent: set[str] = set()  # the optimizers that have made their update in this batch
        self._given = {param for optimizer in optimizers.values() for param in optimizer.state}

    @property
    def open(self) -> bool:
        """Whether any group has begun and not ended."""
        return not all(self._complete.values())

    @property
    def fills(self) -> bool:
        """Whether the present batch, which is not counted yet, completes the group of every optimizer."""
        return self.last_batch or all(count + 1 >= self.size for count in self._counts.values())

    @property
    def waiting(self) -> list[str]:
        """The optimizers whose gradients, if there are any, wait for an update."""
        return [name for name in self._optimizers if name not in self._spent]

    def note_last(self, last: bool) -> None:
        """Note whether the batch that comes next is the last of its epoch."""
        self.last_batch = last

    def begin(self) -> None:
        """Begin a batch: zero the gradients of every optimizer whose next group begins with it."""
        self._spent.clear()
        for name, complete in self._complete.items():
            if complete:
                self._zero[name]()
                self._complete[name] = False

    def drop_spent(self) -> None:
        """Zero the gradients that are spent already in this batch, before a further backward pass in it."""
        for name in self._spent:
            self._zero[name]()
        self._spent.clear()

    def due(self, name: str | None = None) -> list[str]:
        """Count a batch for one optimizer, or for all, and return the optimizers whose group is complete.

        Args:
            name: The name of one optimizer; ``None`` for all.
        """
        names = list(self._optimizers) if name is None else [name]
        for optimizer in names:
            self._counts[optimizer] += 1
            self._asked.pop(optimizer, None)  # so that the assignment puts it at the end
            self._asked[optimizer] = name
        return [optimizer for optimizer in names if self.last_batch or self._counts[optimizer] >= self.size]

    @property
    def unfilled(self) -> list[list[str]]:
        """The optimizers whose groups have taken in batches and are not full, in lists of those to update together.

        Optimizers are updated together if `due` was called for all of them at once.
        """
        waiting = {name: call for name, call in self._asked.items() if self._counts[name]}
        return [[name for name in waiting if waiting[name] == call] for call in dict.fromkeys(waiting.values())]

    def share(self, name: str) -> float:
        """Return the factor for the gradients of a group that is due.

        Each loss was divided by the size of a full group, so the gradients of a shorter group are too small.
        """
        return self.size / self._counts[name] if self._counts[name] < self.size else 1.0

    def end(self, names: Iterable[str]) -> None:
        """End the groups of the optimizers that have made their update."""
        for name in names:
            self._counts[name] = 0
            self._complete[name] = True
            self._spent.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Return which groups have begun, and how many batches each has taken in. The gradients are not part of it."""
        asked = [[name, call] for name, call in self._asked.items()]  # a list, since its order matters
        return {"counts": dict(self._counts), "complete": dict(self._complete), "asked": asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._counts, self._complete = dict(state["counts"]), dict(state["complete"])
        self._asked = dict(state.get("asked", []))
        self._spent.clear()

    def drop_unused_states(self) -> None:
        """Drop the optimizer states with which no update was made yet, because memory ran out in an update.

        torch makes the tensors of a state one by one in the first update of a parameter, and takes a state that has any
        of them as complete. So an update that fails between two of them would make all later ones fail too. States that
        the optimizers had from the beginning stay.
        """
        for optimizer in self._optimizers.values():
            for param, state in list(optimizer.state.items()):
                if "step" in state and not state["step"] and param not in self._given:
                    del optimizer.state[param]

    def discard(self) -> None:
        """Zero the gradients of all groups; the next batch begins new groups."""
        for name, zero in self._zero.items():
            zero()
            self._counts[name] = 0
            self._complete[name] = True
