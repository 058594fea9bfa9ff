"""Snapshots: copies of the state that a deferred handler declares to read, taken at the handler's place in the plan.

A `Taker` is compiled once for each handler, and `Taker.take` runs on the training thread. Handlers of one firing share
the copy of an entry if no handler between them declares to write it (`copy_groups`). Copies lie in the memory of a
`Pool`, which reuses it when nobody refers to a copy any more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from copy import copy
from typing import Any, TypeAlias

from flowtrain.callback.access import Declaration, Path, Write, dotted, overlap
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.graph.executor import Runner
from flowtrain.graph.plan import Plan
from flowtrain.graph.reach import Reach
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cutter
from flowtrain_dask.snapshots.slots import MISSING, Slot, compile_slots, slots_now

__all__ = ["Copied", "CopiesOfFiring", "Groups", "Snapshot", "Taker", "copy_groups", "forgetting_copies"]

Groups: TypeAlias = Mapping[Path, Hashable]
"""A key for each declared path of a handler. Handlers of one firing with equal keys may share a copy."""


class Copied:
    """The copy of one entry, which several snapshots may share.

    Attributes:
        value: The copy.
        nbytes: Its bytes.
        events: The events of an accelerator that must have passed before the copy is complete.
        counted: The lanes that have counted its bytes.
    """

    __slots__ = ("counted", "events", "nbytes", "value")

    def __init__(self, value: Any, nbytes: int, events: tuple[Any, ...]) -> None:
        self.value = value
        self.nbytes = nbytes
        self.events = events
        self.counted: tuple[object, ...] = ()

    def bytes_for(self, lane: object) -> int:
        """Return the bytes that the copy adds to a lane: 0 if another snapshot in the lane has the same copy."""
        if lane is None:
            return self.nbytes
        if lane in self.counted:
            return 0
        self.counted += (lane,)
        return self.nbytes


CopiesOfFiring: TypeAlias = dict[Hashable, Copied]
"""The copies of one firing, for later handlers of the same firing; empty again for the next one."""


class Snapshot:
    """The copies for one handler at one event.

    Attributes:
        payload: The copies by path.
        nbytes: The bytes of the copies. A copy that snapshots in one lane share counts in the first of them only.
    """

    __slots__ = ("_events", "nbytes", "payload")

    def __init__(self) -> None:
        self.payload: dict[Path, Any] = {}
        self.nbytes = 0
        self._events: tuple[Any, ...] = ()

    def add(self, path: Path, copied: Copied, lane: object) -> None:
        """Add a copy."""
        self.payload[path] = copied.value
        self.nbytes += copied.bytes_for(lane)
        self._events += copied.events

    def ready(self) -> None:
        """Wait until the copies are complete. Only copies from an accelerator are not complete at once."""
        for event in self._events:
            event.synchronize()
        self._events = ()


class Taker:
    """Takes the snapshots for one handler.

    Args:
        declaration: The declaration of the handler.
        state: The state of the learner.
        pool: Gives the memory for tensors.
        tail: Whether the handler runs in another process, and gets only the newest values of a series.
        lane: The lane in which the snapshots wait, so that shared bytes are counted once; ``None``: each snapshot
            counts them.

    Raises:
        AccessError: The handler declares a path of which there is no snapshot.
        UsageError: `tail` is true, and the handler declares to read a whole series.
    """

    def __init__(
        self, declaration: Declaration, state: LearnerState, pool: Pool, *, tail: bool, lane: object = None
    ) -> None:
        self._slots = tuple((slot, _key(slot, None)) for slot in compile_slots(declaration))
        self._state = state
        self._pool = pool
        self._lane = lane
        self._cutter = Cutter(tail=tail, late=bool(state.lag))
        full = [slot for slot, _ in self._slots if slot.full]
        if tail and full:
            raise UsageError(
                f"{dotted(full[0].declared[0])} is declared with Read(full=True), so the handler needs all of a series "
                f"and stays in the process that trains; a taker with tail=True gives the newest values only."
            )

    def for_groups(self, groups: Groups) -> Taker:
        """Return this taker for a plan with these `copy_groups`. Both share what the lane has seen of series."""
        other = copy(self)
        other._slots = tuple((slot, _key(slot, groups)) for slot, _ in self._slots)
        return other

    def take(self, shared: CopiesOfFiring | None = None) -> Snapshot:
        """Copy the declared state as it is now. Entries that do not exist are left out.

        Args:
            shared: The copies of earlier handlers of the same firing; new copies are added.

        Raises:
            AccessError: An object in the declared state cannot be copied.
        """
        snapshot = Snapshot()
        for slot, key in self._slots:
            if slot.path[0] == "cbstate" and slot.inside is None and len(slot.path) == 2:
                value = vars(self._state.cbstate).get(slot.path[1])
                # Quicker than to copy them, and loggers read them at every batch.
                if type(value) is PhaseMap and (cut := self._cutter.by_phase(value)) is not None:
                    snapshot.payload[slot.path] = cut
                    continue
            for each in slots_now(slot, self._state):
                copied = self._copied(each, key, shared)
                if copied is not None:
                    snapshot.add(each.path, copied, self._lane)
        self._cutter.end_event()
        return snapshot

    def _copied(self, slot: Slot, key: Hashable, shared: CopiesOfFiring | None) -> Copied | None:
        where = (slot.path, key)
        if shared is not None and where in shared:
            return shared[where]
        copying = Copying(COPIERS, self._pool, cutter=self._cutter)
        value = slot.take(self._state, copying)
        if value is MISSING:
            return None
        copied = Copied(value, copying.nbytes, tuple(copying.events))
        if shared is not None and not (copying.has_series and self._cutter.tail):
            shared[where] = copied  # but no tail, which begins at the previous event of this handler
        return copied


def forgetting_copies(runner: Runner, shared: CopiesOfFiring) -> Runner:
    """Return a runner that forgets the copies that snapshot nodes have shared, before and after each firing."""

    def run(event: Event, phase: Phase) -> None:
        """Fire, with no copies yet."""
        shared.clear()
        try:
            runner(event, phase)
        finally:
            shared.clear()

    return run


def copy_groups(plan: Plan, deferred: Iterable[int], reach: Reach | None = None) -> dict[int, dict[Path, Hashable]]:
    """Return a key for each deferred handler and path; handlers with equal keys may share a copy (rule 20).

    Two handlers may share the copy of a path if no handler between them declares to write a path that meets it.

    Args:
        plan: The plan.
        deferred: The positions of its deferred handlers.
        reach: Finds the state that a path reaches; without it, the relations that hold for every learner are used.
    """
    reach = reach or Reach()
    writes = [
        (position, region)
        for position, planned in enumerate(plan.handlers)
        for path, kind in planned.node.access[planned.handler]
        if isinstance(kind, Write) and path[0] != "resource"
        for region in reach(path)
    ]

    def last_writer(path: Path, before: int) -> int:
        """Return the position of the last earlier handler that declares a write meeting a path; -1 if there is none."""
        # A copy of parameters has no gradients, so writing gradients does not make it outdated.
        regions = [region for region in reach(path) if path[0] == "batch" or region[0] != "batch.grads"]
        earlier = ((at, written) for at, written in writes if at < before)
        return max((at for at, written in earlier if any(overlap(written, region) for region in regions)), default=-1)

    return {
        position: {
            path: last_writer(path, position)
            for path, _ in plan.handlers[position].node.access[plan.handlers[position].handler]
            if path[0] != "resource"
        }
        for position in deferred
    }


def _key(slot: Slot, groups: Groups | None) -> Hashable:
    """Return the key that must be equal, besides the path, for two handlers to share the copy of an entry."""
    # A copy of declared parts is no copy of the whole entry, so the parts belong to the key.
    of_each = tuple(None if groups is None else groups.get(path) for path in slot.declared)
    return (slot.declared if slot.inside is not None else None, of_each)
