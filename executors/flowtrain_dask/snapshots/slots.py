"""Slots: the entries of a snapshot, one for each declared entry of ``batch`` and ``cbstate``, and for other roots.

A slot finds its entry in the state of the learner, and knows which parts of the entry are declared. If the whole
``batch`` or ``cbstate`` is declared, there is a slot for each entry that exists when the snapshot is taken.
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
"""Stands for an entry that does not exist."""

_WITH_ENTRIES = ("batch", "cbstate")
"""The roots that have a slot for each entry."""


class Slot(NamedTuple):
    """One entry of a snapshot.

    Attributes:
        path: The path of the entry: ``("batch", "loss")``, ``("cbstate", "history")``, ``("params",)``.
        inside: The declared paths below it; ``None`` for the whole entry.
        declared: The declared paths for which the slot is there.
        full: Whether whole series in the entry are declared.
    """

    path: Path
    inside: Tree | None
    declared: tuple[Path, ...]
    full: bool

    def take(self, state: LearnerState, copying: Copying) -> Any:
        """Return a copy of the entry as it is now, or `MISSING`.

        Raises:
            AccessError: An object in the entry cannot be copied.
        """
        root = self.path[0]
        if root in _WITH_ENTRIES:
            value = vars(getattr(state, root)).get(self.path[1], MISSING)
            return value if value is MISSING else copying.entry(value, self.path, self.inside)
        if root == "optimizer":
            return copying.at(self.path, copy_optimizers, state, self.inside, copying)
        return copying.entry(getattr(state, root), self.path, self.inside)


def compile_slots(declaration: Declaration) -> tuple[Slot, ...]:
    """Return the slots of a declaration; one with the path ``("batch",)`` or ``("cbstate",)`` stands for all entries.

    Raises:
        AccessError: The declaration has a `Write`, or a path below ``data`` or ``callbacks``.
    """
    slots: list[Slot] = []
    for root, inside in tree(tuple(item for item in declaration if item[0][0] != "resource")).items():
        paths = [path for path, _ in declaration if path[0] == root]
        _check_root(root, declaration)
        if not isinstance(inside, dict) or "" in inside or root not in _WITH_ENTRIES:
            part = inside if isinstance(inside, dict) and "" not in inside else None
            slots.append(_slot((root,), part, paths, declaration))
            continue
        for name, below in inside.items():
            part = below if isinstance(below, dict) and "" not in below else None
            here = [path for path in paths if path[1] == name]
            slots.append(_slot((root, name), part, here, declaration))
    if ("model",) in [slot.path for slot in slots if slot.inside is None]:
        return tuple(slot for slot in slots if slot.path != ("params",))  # the copy of the model has these parameters
    return tuple(slots)


def slots_now(slot: Slot, state: LearnerState) -> tuple[Slot, ...]:
    """Return the slot, or, if it stands for all entries of its root, a slot for each entry that exists now."""
    root = slot.path[0]
    if root not in _WITH_ENTRIES or slot.path != (root,):
        return (slot,)
    return tuple(slot._replace(path=(root, name)) for name in list(vars(getattr(state, root))))


def _slot(path: Path, inside: Tree | None, declared: list[Path], declaration: Declaration) -> Slot:
    kinds = [kind for at, kind in declaration if at in declared]
    return Slot(path, inside, tuple(declared), any(isinstance(kind, Read) and kind.full for kind in kinds))


def _check_root(root: str, declaration: Declaration) -> None:
    for path, kind in declaration:
        if path[0] != root:
            continue
        if isinstance(kind, Write) and kind.lag is None:
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
