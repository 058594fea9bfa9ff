"""Snapshots: what a deferred handler declares to read, as it is at the handler's place in the plan.

A `Taker` is compiled once for each handler; `Taker.take` runs on the training thread. Handlers of one firing share the
copy of an entry where no other handler in between declares to write it (`copy_groups`). Copies live in memory of a
`Pool`, which takes it back when nobody refers to a copy any more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from copy import copy
from typing import Any, TypeAlias

from flowtrain.callback.access import Declaration, Path, Write, dotted, meet
from flowtrain.errors import UsageError
from flowtrain.graph.plan import Plan
from flowtrain.graph.reach import Reach
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.snapshots.copiers import Copying, Pool
from flowtrain_dask.snapshots.series import Cutter
from flowtrain_dask.snapshots.slots import MISSING, Slot, compile_slots, slots_now

__all__ = ["Copied", "Groups", "Shared", "Snapshot", "Taker", "copy_groups"]

Groups: TypeAlias = Mapping[Path, Hashable]
"""For each declared path of a handler, a key that is equal where handlers of one firing may share a copy."""


class Copied:
    """The copy of one entry, perhaps in several snapshots.

    Attributes:
        value: The copy.
        nbytes: Its bytes.
        events: What has to be waited for before it is complete.
        counted: The lanes in whose waiting bytes it is already.
    """

    __slots__ = ("counted", "events", "nbytes", "value")

    def __init__(self, value: Any, nbytes: int, events: tuple[Any, ...]) -> None:
        self.value = value
        self.nbytes = nbytes
        self.events = events
        self.counted: tuple[object, ...] = ()

    def bytes_for(self, lane: object) -> int:
        """Return the bytes that one more snapshot of it adds to a lane: none, if the lane has one of this firing."""
        if lane is None:
            return self.nbytes
        if lane in self.counted:
            return 0
        self.counted += (lane,)
        return self.nbytes


Shared: TypeAlias = dict[Hashable, Copied]
"""The copies of one firing, for the handlers that come later in it; a new dict for each firing."""


class Snapshot:
    """What one handler reads at one event.

    Attributes:
        payload: The copies by path.
        nbytes: The bytes of all of them; a copy that snapshots of one lane share counts in the first.
    """

    __slots__ = ("_events", "nbytes", "payload")

    def __init__(self) -> None:
        self.payload: dict[Path, Any] = {}
        self.nbytes = 0
        self._events: tuple[Any, ...] = ()

    def add(self, path: Path, copied: Copied, lane: object) -> None:
        """Take a copy into it."""
        self.payload[path] = copied.value
        self.nbytes += copied.bytes_for(lane)
        self._events += copied.events

    def ready(self) -> None:
        """Wait until the copies are complete; only those from an accelerator are not at once."""
        for event in self._events:
            event.synchronize()
        self._events = ()


class Taker:
    """Takes the snapshots for one handler.

    Args:
        declaration: What the handler declares.
        state: The learner's state.
        pool: Where the memory comes from.
        fresh: The paths whose tensors nobody changes later, such as ``("batch", "loss")``; they are detached and not
            copied. ``("batch",)`` stands for all of the batch but its gradients.
        tail: Whether the handler runs in another process: of a series it gets the newest values.
        groups: What `copy_groups` gives for the handler; without it, it shares with every handler.
        lane: What snapshots wait in, to count shared bytes once; ``None``: they count in each snapshot.

    Raises:
        AccessError: It declares what no snapshot can hold.
        UsageError: A series is read in full, for another process.
    """

    def __init__(
        self,
        declaration: Declaration,
        state: LearnerState,
        pool: Pool,
        *,
        fresh: frozenset[Path],
        tail: bool,
        groups: Groups | None = None,
        lane: object = None,
    ) -> None:
        self._slots = tuple((slot, _key(slot, groups)) for slot in compile_slots(declaration))
        self._state = state
        self._pool = pool
        self._fresh = fresh
        self._lane = lane
        self._cutter = Cutter(tail=tail, late=bool(state.lag))
        full = [slot for slot, _ in self._slots if slot.full]
        if tail and full:
            raise UsageError(
                f"{dotted(full[0].declared[0])} is declared with Read(full=True), so the handler needs all of a series "
                f"and stays in the process that trains; a taker with tail=True gives the newest values only."
            )

    def sharing(self, groups: Groups) -> Taker:
        """Return this taker for a plan with these `copy_groups`; both know what of a series the lane has seen."""
        other = copy(self)
        other._slots = tuple((slot, _key(slot, groups)) for slot, _ in self._slots)
        return other

    def take(self, shared: Shared | None = None) -> Snapshot:
        """Copy what is declared, as it is now. What is not there is left out.

        Args:
            shared: What other handlers of the same firing have copied; what is copied now is added.

        Raises:
            AccessError: Something that is there now cannot be copied.
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
        return snapshot

    def _copied(self, slot: Slot, key: Hashable, shared: Shared | None) -> Copied | None:
        where = (slot.path, key)
        if shared is not None and where in shared:
            return shared[where]
        copying = Copying(self._pool, fresh=self._is_fresh(slot.path), cutter=self._cutter)
        value = slot.take(self._state, copying)
        if value is MISSING:
            return None
        copied = Copied(value, copying.nbytes, tuple(copying.events))
        if shared is not None and not (copying.has_series and self._cutter.tail):
            shared[where] = copied  # a tail is the handler's own: it begins at that one's last event
        return copied

    def _is_fresh(self, path: Path) -> bool:
        # Nobody can promise that gradients stay: they are clipped, and added to.
        return path in self._fresh or (path[:1] in self._fresh and path != ("batch", "grads"))


def copy_groups(plan: Plan, deferred: Iterable[int], reach: Reach | None = None) -> dict[int, dict[Path, Hashable]]:
    """Return, for each deferred handler and path, a key that is equal where they may share a copy (rule 20).

    Two handlers may if no handler between them declares to write a path that meets it.

    Args:
        plan: The plan.
        deferred: The positions of its deferred handlers.
        reach: Which state a path reaches; without it the regions that hold without a learner.
    """
    reach = reach or Reach()
    writes = [
        (position, region)
        for position, step in enumerate(plan.steps)
        for path, kind in step.node.access[step.handler]
        if isinstance(kind, Write) and path[0] != "resource"
        for region in reach(path)
    ]

    def last_writer(path: Path, before: int) -> int:
        """Return the position of the last handler before another that writes what meets a path, -1 if none does."""
        # A copy of parameters has no gradients, so writing those does not make it old.
        regions = [region for region in reach(path) if path[0] == "batch" or region[0] != "batch.grads"]
        earlier = ((at, written) for at, written in writes if at < before)
        return max((at for at, written in earlier if any(meet(written, region) for region in regions)), default=-1)

    return {
        position: {
            path: last_writer(path, position)
            for path, _ in plan.steps[position].node.access[plan.steps[position].handler]
            if path[0] != "resource"
        }
        for position in deferred
    }


def _key(slot: Slot, groups: Groups | None) -> Hashable:
    """Return what must be equal for two handlers to share an entry, besides its path."""
    of_each = tuple(None if groups is None else groups.get(path) for path in slot.declared)
    return (slot.declared if slot.inside is not None else None, of_each)
