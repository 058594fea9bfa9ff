"""The plans of a learner with snapshot nodes, which stand for the handlers of deferred callbacks.

A *snapshot node* takes the place of a deferred handler in a plan, with the handler's conditions and all of its edges.
It copies the state that the handler declares to read and puts the copy into the lane of the callback. Snapshot nodes
run on the training thread, because a lane is filled by that thread alone.

`Placements` has a `Placement` for the callbacks of each lane. A lane itself is opened at its first event, when the run
to which it belongs is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowtrain.callback.callback import draws_own
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, Plan, PlanKey, PlannedHandler
from flowtrain.graph.reach import Reach
from flowtrain.state.arrivals import LateStream
from flowtrain.state.random_numbers import CallbackSeeds
from flowtrain_dask.deferred.placement import Placement, Turn
from flowtrain_dask.deferred.policy import Deferral, name_of, why_here
from flowtrain_dask.deferred.preparing import Options, job_of, transport_of
from flowtrain_dask.lanes.answers import Answer
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.lane_set import LaneSet
from flowtrain_dask.lanes.report import PlaceReport
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.taker import CopiesOfFiring, Taker, copy_groups

__all__ = ["Placements"]

if TYPE_CHECKING:
    from flowtrain_dask.cluster.connection import Connection


class Placements:
    """The deferred callbacks that a learner has now, and its plans with their snapshot nodes.

    Args:
        deferral: The decision which callbacks are deferred.
        site: The loop.
        options: How deferred callbacks are run.
        connection: The cluster; ``None`` for threads of this process.
        sequences: In a run that is resumed, the number of earlier events of each lane by its name.
        lanes: Opens the lanes.
        stale: Gets the plans that must be compiled again, because callbacks have moved or are no longer timed; ``None``
            if all events go to the lanes, and cost does not decide.

    Attributes:
        placements: The callbacks of each lane.
    """

    def __init__(
        self,
        deferral: Deferral,
        site: Site,
        options: Options,
        connection: Connection | None,
        sequences: Mapping[str, int],
        lanes: LaneSet,
        stale: set[PlanKey] | None,
    ) -> None:
        self._deferral = deferral
        self._options = options
        self._connection = connection
        self._lanes = lanes
        self._site = weakref.ref(site)
        self._pool = Pool(options.limits.bytes)
        self._by_cost = stale is not None
        turn = Turn() if self._by_cost else None
        here: Placements = weakref.proxy(self)  # the placements outlive this object in the plans
        self.placements = [
            Placement(
                nodes,
                name_of(nodes),
                sequences.get(name_of(nodes), 0),
                lambda placement: here.open_lane(placement),
                lanes.is_stopping,
                connection is not None and not why_here(nodes),
                turn,
                set() if stale is None else stale,
            )
            for nodes in deferral.lanes
        ]
        self._of = {node: placement for placement in self.placements for node in placement.nodes}
        self._takers: dict[tuple[Node, Handler], Taker] = {}
        self._reach = Reach(site.state)
        for placement in self.placements:
            for node in placement.nodes:
                for _, handler in node.handlers:
                    access = node.access[handler]
                    taker = Taker(access, site.state, self._pool, tail=placement.is_remote, lane=placement)
                    self._takers[node, handler] = taker

    def positions(self, plan: Plan) -> frozenset[int]:
        """Return the positions of the handlers in a plan that are deferred, or timed to decide whether they will be."""
        found = {at for at, each in enumerate(plan.handlers) if each.node in self._of}
        if self._options.on_error == "warn":  # a failure in place is caught by the call that takes the handler's place
            return frozenset(found)
        return frozenset(at for at in found if self._place(plan, at) != "in place")

    def are_settled(self, plan: Plan) -> bool:
        """Return whether no callback with a handler in a plan is being measured."""
        return all(self._place(plan, at) for at in self.positions(plan))

    def _place(self, plan: Plan, at: int) -> str:
        """Return where the handler at a position of a plan runs; empty while this is being measured."""
        each = plan.handlers[at]
        return self._of[each.node].settled(_key(plan), each.node, each.handler)

    def rewrite(self, plan: Plan) -> tuple[Plan, CopiesOfFiring | None]:
        """Return a plan with snapshot nodes, and the mapping of copies that these share in a firing, if any two do."""
        positions = self.positions(plan)
        if not positions:
            return plan, None
        groups = copy_groups(plan, positions, self._reach)
        keys = [(path, key) for at in positions for path, key in groups[at].items()]
        shared: CopiesOfFiring | None = {} if len(set(keys)) < len(keys) else None
        calls: dict[int, Call] = {}
        for at in positions:
            each = plan.handlers[at]
            placement = self._of[each.node]
            position = placement.position(each.node, each.handler)
            taker = self._takers[each.node, each.handler].for_groups(groups[at])
            draws = found.state.draws if (found := self._site()) is not None and draws_own(each.callback) else None
            stream = None if each.late is None else each.late.stream
            hand_over = _snapshot_node(placement, position, taker, shared, draws, each.node.name, stream)
            if found is not None and found.clock is not None:
                hand_over = found.clock.hand_over(plan, at, hand_over)
            here = each.call if each.unasked is None else each.unasked
            if self._by_cost and self._options.on_error == "warn":
                here = _retiring(here, placement, each)
            calls[at] = placement.node(_key(plan), each.node, each.handler, here, hand_over)
        return plan.with_calls(calls), shared

    def explain(self, plan: Plan) -> str:
        """Say in a line for each deferrable handler of a plan to which lane it is deferred, or why it is not."""
        parts = []
        for each in plan.handlers:
            placement = self._of.get(each.node)
            if placement is not None:
                place, lane = placement.report(), f"lane {placement.name} ({self._where(placement.nodes)})"
                why = f": {place.why}" if self._by_cost else ""
                is_at = f"is deferred to {lane}" if place.where == "lane" else f"runs in place, and not in {lane}"
                parts.append(f"{each.label} {is_at}{why}")
            elif why := self._deferral.why_kept(each.node):
                parts.append(f"{each.label} runs in place: {why}")
        return "\n".join(parts)

    def _where(self, nodes: Sequence[Node]) -> str:
        if self._connection is None:
            return "a thread"
        if why := why_here(nodes):
            return f"a thread: {why}"
        return "a process" if self._connection.cluster is not None else self._connection.address

    # --- lanes

    @property
    def sequences(self) -> dict[str, int]:
        """The number of events that each lane has had, by its name."""
        return {
            placement.name: placement.first + (0 if placement.lane is None else placement.lane.report().events)
            for placement in self.placements
        }

    def resume(self, sequences: Mapping[str, int]) -> None:
        """Let the lanes that have had no event yet number their events from here on."""
        for placement in self.placements:
            if placement.lane is None:
                placement.first = sequences.get(placement.name, 0)

    def report(self) -> tuple[PlaceReport, ...]:
        """Return where the callbacks of each lane run, and why; nothing unless cost decides."""
        return tuple(placement.report() for placement in self.placements) if self._by_cost else ()

    def costs(self, plan: Plan) -> dict[int, float]:
        """Return the measured seconds that handlers of these callbacks cost the event of a plan, by position."""
        found = {
            at: self._of[each.node].cost(_key(plan), each.node, each.handler)
            for at, each in enumerate(plan.handlers)
            if each.node in self._of
        }
        return {at: seconds for at, seconds in found.items() if seconds is not None}

    def divides_race(self, plan: Plan) -> bool:
        """Return whether the events of a plan divide the rounds of a race of lanes, or will do so."""
        return any(placement.divides_race(_key(plan)) for placement in self.placements)

    def begin_races_later(self, plan: Plan) -> None:
        """Let no round of a race of lanes begin with the last event of a plan."""
        for placement in self.placements:
            if placement.divides_race(_key(plan)):
                placement.last = 0.0

    def look_again(self) -> None:
        """Have callbacks measured again whose place was decided on long ago."""
        for placement in self.placements:
            placement.look_again()

    def put_back(self, node: Node, handler: Handler, entry: Entry, recorded: bool) -> bool:
        """Put an event of a checkpoint into the lane of its callback; return whether its events go there now."""
        placement = self._of.get(node)
        if placement is None or not placement.deferred:
            return False
        lane, answer = placement.opened(), None
        if entry.number is not None and (site := self._site()) is not None:
            answer = Answer(lane, entry.number, node.name)
            site.state.arrivals.expect(entry.number, answer)
        lane.put_back(entry, placement.position(node, handler), recorded, answer)
        return True

    def open_lane(self, placement: Placement) -> Lane:
        """Open the lane of some callbacks, for its first event."""
        loop = self._site()
        job = job_of(placement.nodes, self._deferral, loop.run.id if loop is not None else "", placement.first)
        return self._lanes.open(job, transport_of(job, placement.nodes, self._options, self._connection))

    def release(self) -> None:
        """Free the memory that is kept for snapshots. Snapshots that are still in use are not affected."""
        self._pool.clear()


def _key(plan: Plan) -> PlanKey:
    return plan.event_type, plan.phase_type


def _snapshot_node(
    placement: Placement,
    position: int,
    taker: Taker,
    shared: CopiesOfFiring | None,
    draws: CallbackSeeds | None,
    name: str,
    stream: LateStream | None,
) -> Call:
    """Return the call that hands an event of a handler over to its lane.

    Args:
        placement: The callbacks of the lane.
        position: The position of the handler in the job of the lane.
        taker: Takes the snapshots.
        shared: The copies of earlier handlers of the same firing.
        draws: Makes the seed of each event; ``None`` if the handler draws no random numbers.
        name: The name of the callback.
        stream: The arrivals of what the handler writes with a lag; ``None`` if it writes nothing.
    """

    def node(event: Event, phase: Phase, view: Any) -> None:
        """Take a snapshot of the state that the handler declares to read, and put it into the lane."""
        seed = None if draws is None else draws.next(name)
        snapshot = taker.take(shared)
        (placement.lane or placement.opened()).put(position, event, phase, snapshot, snapshot.nbytes, seed)

    def answering(event: Event, phase: Phase, view: Any) -> None:
        """Do the same, and let the lane give what the handler writes when it is to arrive."""
        assert stream is not None
        seed = None if draws is None else draws.next(name)
        snapshot = taker.take(shared)
        lane = placement.lane or placement.opened()
        answer = Answer(lane, stream.number, name, stream.readers)
        taken = lane.put(position, event, phase, snapshot, snapshot.nbytes, seed, answer)
        stream.put(awaited=answer if taken else None)

    return node if stream is None else answering


def _retiring(call: Call, placement: Placement, handler: PlannedHandler) -> Call:
    """Return the call of a handler that runs in place, which retires the lane if the handler fails."""

    def run(event: Event, phase: Phase, view: Any) -> None:
        """Run the handler."""
        try:
            call(event, phase, view)
        except Exception as raised:  # a handler may raise anything
            failure = handler.failure(raised, event, phase)
            failure.add_note(f"raised in {handler.label} at ({type(event).__name__}, {phase!r}), in place")
            placement.retire(failure)

    return run
