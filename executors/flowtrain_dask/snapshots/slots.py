"""What a declaration makes a snapshot of: one slot for each entry of the batch and of ``cbstate``, and for each root.

A slot knows how to find its entry in the learner's state, and what of it is declared. For a declaration of all of
``batch`` or ``cbstate`` there is a slot for each entry that is there when the snapshot is taken.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from flowtrain.callback.access import Declaration, Path, Read, Write, dotted
from flowtrain.errors import AccessError
from flowtrain.state.container import Tree
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.partial_view import tree
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.modules import copy_optimizers

__all__ = ["MISSING", "Slot", "compile_slots", "slots_now"]

MISSING: Final = object()
"""What is found where nothing is."""

_OPEN = ("batch", "cbstate")
"""The roots whose entries are slots."""


class Slot(NamedTuple):
    """One entry of a snapshot.

    Attributes:
        path: Where it is: ``("batch", "loss")``, ``("cbstate", "history")``, ``("params",)``.
        inside: What is declared inside it; ``None`` is all.
        declared: The declared paths that it serves.
        full: Whether a series in it is iterated over.
    """

    path: Path
    inside: Tree | None
    declared: tuple[Path, ...]
    full: bool

    def take(self, state: LearnerState, copying: Copying) -> Any:
        """Return a copy of what is there now, or `MISSING`.

        Raises:
            AccessError: It cannot be copied.
        """
        root = self.path[0]
        if root in _OPEN:
            value = vars(getattr(state, root)).get(self.path[1], MISSING)
            return value if value is MISSING else copying.entry(value, self.path, self.inside)
        if root == "optimizer":
            return copying.at(self.path, copy_optimizers, state, self.inside, copying)
        return copying.entry(getattr(state, root), self.path, self.inside)


def compile_slots(declaration: Declaration) -> tuple[Slot, ...]:
    """Return the slots of a declaration; ``("batch",)`` and ``("cbstate",)`` stand for each of their entries.

    Raises:
        AccessError: It declares what no snapshot can hold: a `Write`, ``data`` or ``callbacks``.
    """
    slots: list[Slot] = []
    for root, inside in tree(tuple(item for item in declaration if item[0][0] != "resource")).items():
        paths = [path for path, _ in declaration if path[0] == root]
        _check_root(root, declaration)
        if not isinstance(inside, dict) or "" in inside or root not in _OPEN:
            part = inside if isinstance(inside, dict) and "" not in inside else None
            slots.append(_slot((root,), part, paths, declaration))
            continue
        for name, below in inside.items():
            part = below if isinstance(below, dict) and "" not in below else None
            here = [path for path in paths if path[1] == name]
            slots.append(_slot((root, name), part, here, declaration))
    if ("model",) in [slot.path for slot in slots if slot.inside is None]:
        return tuple(slot for slot in slots if slot.path != ("params",))  # they are those of the model's copy
    return tuple(slots)


def slots_now(slot: Slot, state: LearnerState) -> tuple[Slot, ...]:
    """Return the slot; or one for each entry that is there now, where all entries are declared."""
    root = slot.path[0]
    if root not in _OPEN or slot.path != (root,):
        return (slot,)
    return tuple(slot._replace(path=(root, name)) for name in list(vars(getattr(state, root))))


def _slot(path: Path, inside: Tree | None, declared: list[Path], declaration: Declaration) -> Slot:
    kinds = [kind for at, kind in declaration if at in declared]
    return Slot(path, inside, tuple(declared), any(isinstance(kind, Read) and kind.full for kind in kinds))


def _check_root(root: str, declaration: Declaration) -> None:
    for path, kind in declaration:
        if path[0] != root:
            continue
        if isinstance(kind, Write):
            raise AccessError(
                f"A deferred callback declares Write() on {dotted(path)!r}, and works on a snapshot: what it writes "
                f"would be lost. Declare Read(), or set deferrable = False on the callback."
            )
        if root in ("data", "callbacks"):
            raise AccessError(
                f"A deferred callback declares {dotted(path)!r}, and there is no snapshot of {root}: "
                f"{'loaders are used by training meanwhile' if root == 'data' else 'they hold the learner'}. Take "
                f"what it needs in another way, or set deferrable = False on the callback."
            )
