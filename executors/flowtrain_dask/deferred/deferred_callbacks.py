"""The deferred callbacks of one executor: their lanes, and the snapshot nodes that stand for them in the plans.

A *snapshot node* takes the place of a deferred handler in a plan, with the handler's conditions and all of its edges.
It copies the state that the handler declares to read and puts the copy into the lane of the callback. Snapshot nodes
run on the training thread, because a lane is filled by that thread alone.

An executor has one `DeferredCallbacks`: it decides and checks which callbacks are deferred before a learner uses
them (`DeferredCallbacks.check`), connects to the cluster, and makes `Lanes` when the first plan is compiled
(`DeferredCallbacks.use`). When the callbacks change, it makes new `Lanes`. A lane itself is made at its first event,
when the run to which it belongs is known.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flowtrain.callback.callback import draws_own
from flowtrain.callback.handler import Handler
from flowtrain.errors import ExecutorError, raise_worst
from flowtrain.graph.executor import Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, Plan
from flowtrain.graph.reach import Reach
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.deferred.placement import Placement, PlanKey, Turn, retiring, snapshot_node
from flowtrain_dask.deferred.policy import (
    Defer,
    Deferral,
    Options,
    check_options,
    decide,
    job_of,
    name_of,
    transport_of,
    validate,
    why_here,
)
from flowtrain_dask.deferred.shutdown import Teardown
from flowtrain_dask.deferred.waiting import failures_of, finish, log_pending, saved, wait
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.report import LaneReport, Report
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.taker import Shared, Taker, copy_groups

__all__ = ["DeferredCallbacks", "Lanes"]

if TYPE_CHECKING:
    from flowtrain_dask.cluster.connect import Connection


_logger = logging.getLogger("flowtrain")

_SHORT = 1.0
"""Seconds for which lanes are flushed before the checkpoint of an interrupt. The events that are left are in it, so it
need not wait for them: a batch system kills the process 30 seconds after the signal."""


class Lanes:
    """The lanes for the present callbacks of a learner.

    Args:
        deferral: The decision which callbacks are deferred.
        site: The loop.
        options: How deferred callbacks are run.
        connection: The cluster; ``None`` for threads of this process.
        sequences: In a run that is resumed, the number of earlier events of each lane by its name.
        lanes: The list to which a lane is added at its first event. It outlives this object: the lanes must end even if
            the learner is dropped, so no lane refers to the learner.
        stale: Gets the plans that must be compiled again, because callbacks have moved or are no longer timed; ``None``
            if all events go to the lanes, and cost does not decide.

    Attributes:
        deferral: The same.
        lanes: The same.
        names: The names of the callbacks that have lanes.
        gave_up: Whether the last `flush` has left events, because training was stopped.
    """

    def __init__(
        self,
        deferral: Deferral,
        site: Site,
        options: Options,
        connection: Connection | None,
        sequences: Mapping[str, int],
        lanes: list[Lane],
        stale: set[PlanKey] | None,
    ) -> None:
        self.deferral = deferral
        self._options = options
        self._connection = connection
        self.lanes = lanes
        self._site = weakref.ref(site)
        self._pool = Pool(options.limits.bytes)
        self._by_cost = stale is not None
        turn = Turn() if self._by_cost else None
        here: Lanes = weakref.proxy(self)  # the placements outlive this object in the plans
        self._planned = [
            Placement(
                nodes,
                name_of(nodes),
                sequences.get(name_of(nodes), 0),
                lambda placement: here.make_lane(placement),
                partial(_is_stopping, self._site),
                connection is not None and not why_here(nodes),
                turn,
                set() if stale is None else stale,
            )
            for nodes in deferral.lanes
        ]
        self.names = frozenset(node.name for nodes in deferral.lanes for node in nodes)
        self._planned_of = {node: planned for planned in self._planned for node in planned.nodes}
        self._takers: dict[tuple[Node, Handler], Taker] = {}
        self._reach = Reach(site.state)
        for planned in self._planned:
            for node in planned.nodes:
                for _, handler in node.handlers:
                    access = node.access[handler]
                    taker = Taker(access, site.state, self._pool, tail=planned.far, lane=planned)
                    self._takers[node, handler] = taker
        self._logged: list[str] = []
        self.gave_up = False

    # --- plans

    def positions(self, plan: Plan) -> frozenset[int]:
        """Return the positions of the handlers in a plan that are deferred, or timed to decide whether they will be."""
        found = {at for at, each in enumerate(plan.handlers) if each.node in self._planned_of}
        if self._options.on_error == "warn":  # a failure in place is caught by the call that takes the handler's place
            return frozenset(found)
        return frozenset(at for at in found if self._place(plan, at) != "in place")

    def are_settled(self, plan: Plan) -> bool:
        """Return whether no callback with a handler in a plan is being measured."""
        return all(self._place(plan, at) for at in self.positions(plan))

    def _place(self, plan: Plan, at: int) -> str:
        """Return where the handler at a position of a plan runs; empty while this is being measured."""
        each = plan.handlers[at]
        return self._planned_of[each.node].settled(_key(plan), each.node, each.handler)

    def rewrite(self, plan: Plan) -> tuple[Plan, Shared | None]:
        """Return a plan with snapshot nodes, and the mapping of copies that these share in a firing, if any two do."""
        positions = self.positions(plan)
        if not positions:
            return plan, None
        groups = copy_groups(plan, positions, self._reach)
        keys = [(path, key) for at in positions for path, key in groups[at].items()]
        shared: Shared | None = {} if len(set(keys)) < len(keys) else None
        calls: dict[int, Call] = {}
        for at in positions:
            each = plan.handlers[at]
            planned = self._planned_of[each.node]
            position = planned.position(each.node, each.handler)
            taker = self._takers[each.node, each.handler].sharing(groups[at])
            draws = found.state.draws if (found := self._site()) is not None and draws_own(each.callback) else None
            hand_over = snapshot_node(planned, position, taker, shared, draws, each.node.name)
            here = each.call if each.unasked is None else each.unasked
            if self._by_cost and self._options.on_error == "warn":
                here = retiring(here, planned, each)
            calls[at] = planned.node(_key(plan), each.node, each.handler, here, hand_over)
        return plan.with_calls(calls), shared

    def explain(self, plan: Plan) -> str:
        """Say in a line for each deferrable handler of a plan to which lane it is deferred, or why it is not."""
        parts = []
        for each in plan.handlers:
            planned = self._planned_of.get(each.node)
            if planned is not None:
                place, lane = planned.report(), f"lane {planned.name} ({self._where(planned.nodes)})"
                why = f": {place.why}" if self._by_cost else ""
                is_at = f"is deferred to {lane}" if place.where == "lane" else f"runs in place, and not in {lane}"
                parts.append(f"{each.label} {is_at}{why}")
            elif why := self.deferral.why_kept(each.node):
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
            planned.name: planned.first + (0 if planned.lane is None else planned.lane.report().events)
            for planned in self._planned
        }

    def resume(self, sequences: Mapping[str, int]) -> None:
        """Let the lanes that have had no event yet number their events from here on."""
        for planned in self._planned:
            if planned.lane is None:
                planned.first = sequences.get(planned.name, 0)

    def report(self) -> Report:
        """Return the counts of the lanes."""
        places = tuple(planned.report() for planned in self._planned) if self._by_cost else ()
        return Report(tuple(lane.report() for lane in self.lanes), places)

    def look_again(self) -> None:
        """Have callbacks measured again whose place was decided on long ago."""
        for planned in self._planned:
            planned.look_again()

    def put_back(self, node: Node, handler: Handler, entry: Entry, recorded: bool) -> bool:
        """Put an event of a checkpoint into the lane of its callback; return whether its events go there now."""
        planned = self._planned_of.get(node)
        if planned is None or not planned.deferred:
            return False
        planned.opened().put_back(entry, planned.position(node, handler), recorded)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Flush; return the number of events of each lane and, if training is about to stop, those that still wait.

        Lanes with such events stand still, until they are flushed or get another event.
        """
        self.flush(_SHORT)
        waiting = saved(self.lanes, self._options.drain_timeout)
        self._log_troubles()
        counts = {name: number - waiting[name]["count"] for name, number in self.sequences.items() if name in waiting}
        return {"sequences": {**self.sequences, **counts}, "waiting": waiting}

    def flush(self, patience: float | None = None) -> None:
        """Wait until all events are done; then raise the failures, and log problems that a user should know of.

        Args:
            patience: For how many seconds at most, if training is about to stop; by default `Options.drain_timeout`,
                after which the events that are left are logged.
        """
        limit, stopping = self._options.drain_timeout, partial(_is_stopping, self._site)
        failures: list[BaseException] = []
        while True:
            self.gave_up = not wait(self.lanes, stopping, limit if patience is None else min(patience, limit))
            found = failures_of(self.lanes)
            failures += found
            if not found:
                break
            # Again, because `FitEnd` runs after a failure was raised, and may fail as well.
        if patience is None:
            log_pending(self.lanes, limit)
        self._log_troubles()
        if failures:
            raise_worst(failures)

    def close(self) -> None:
        """End the lanes. Events that are not done are dropped."""
        for lane in self.lanes:
            lane.close()
        self.release()

    def release(self) -> None:
        """Free the memory that is kept for snapshots. Snapshots that are still in use are not affected."""
        self._pool.clear()

    def _log_troubles(self) -> None:
        """Log the problems of the lanes, unless they are the same as the last time."""
        troubles = self.report().troubles()
        if troubles != self._logged:
            self._logged = troubles
            _logger.warning("flowtrain: %s", "; ".join(troubles))

    def make_lane(self, planned: Placement) -> Lane:
        """Make a lane, for its first event."""
        site = self._site
        loop = site()
        job = job_of(planned.nodes, self.deferral, loop.run.id if loop is not None else "", planned.first)

        def surface(raise_it: Callable[[], None]) -> None:
            """Have a failure raised on the training thread."""
            loop = site()
            if loop is not None:
                loop.mailbox.put(raise_it)

        lane = Lane(
            job,
            transport_of(job, planned.nodes, self._options, self._connection),
            self._options.limits,
            surface=surface,
            on_error=self._options.on_error,
            stopping=partial(_is_stopping, site),
        )
        lane.holds = loop.open_sinks if loop is not None else None
        self.lanes.append(lane)
        return lane


def _key(plan: Plan) -> PlanKey:
    return plan.event_type, plan.phase_type


def _is_stopping(site: weakref.ref[Site]) -> bool:
    """Return whether training is about to stop."""
    loop = site()
    return loop is None or loop.mailbox.stopping




class DeferredCallbacks:
    """The deferrable callbacks of an executor's learner.

    Args:
        cluster: Where they run; see `flowtrain_dask.cluster.connect.connect`.
        defer: Whether the cost of each callback decides where it runs, or all of them are deferred, or none is.
        resources: The resources that a worker must have.
        options: How they are run.

    Attributes:
        defer: Which of them are deferred.
        stale: The plans that must be compiled again, because callbacks have moved or are no longer timed.

    Raises:
        ExecutorError: An argument has a wrong value.
    """

    def __init__(self, cluster: object, defer: Defer | bool, resources: dict[str, float], options: Options) -> None:
        self._cluster = cluster
        self.defer = check_options(defer, resources, options)
        self._resources = resources
        self._options = options
        self._teardown = Teardown(options.drain_timeout)
        self._nodes: tuple[Node, ...] = ()
        self._decided: tuple[tuple[Node, ...], Deferral] = (), Deferral()
        self._lanes: Lanes | None = None
        self._sequences: dict[str, int] = {}
        self._past: tuple[LaneReport, ...] = ()
        self.stale: set[PlanKey] = set()
        weakref.finalize(self, self._teardown.drop).atexit = False  # for a learner that nobody closes

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Decide which callbacks are deferred, and check that they can be. Then process all events that wait.

        Raises:
            FlowtrainError: A callback cannot be deferred, or the cluster cannot be used.
            Exception: The exception of a deferred callback that failed.
        """
        deferral = self._decide(nodes, state)
        if deferral.lanes and self._teardown.connection is None and self._cluster is not None:
            try:
                from flowtrain_dask.cluster.connect import connect  # distributed takes a while to import
            except ModuleNotFoundError as error:
                raise ExecutorError(
                    f"DaskExecutor({self._cluster!r}) needs {error.name}, which is not installed: "
                    f"pip install 'flowtrain[dask]'. DaskExecutor() defers to threads and does not need it."
                ) from error
            self._teardown.connection = connect(
                self._cluster, self._options.drain_timeout, resources=self._resources or None
            )
        validate(deferral, state, self._options, self._teardown.connection)
        self.flush()
        self._decided = tuple(nodes), deferral

    def use(self, site: Site) -> Lanes:
        """Return the lanes for the callbacks that the loop has now."""
        nodes = tuple(site.nodes)
        if self._lanes is None or nodes != self._nodes:
            past, sequences = self._past, self.sequences
            if self._lanes is not None:
                past += tuple(replace(lane, where="ended") for lane in self._lanes.report().lanes)
                self._lanes.close()
            # If a change of callbacks was checked and then refused, the last decision is about other callbacks.
            deferral = self._decided[1] if self._decided[0] == nodes else self._decide(nodes, site.state)
            made: list[Lane] = []
            stale = self.stale if self.defer == "auto" else None
            lanes = Lanes(deferral, site, self._options, self._teardown.connection, sequences, made, stale)
            # Together, so that an interrupt does not leave closed lanes for callbacks that are taken as decided on.
            self._past, self._sequences, self._nodes = past, sequences, nodes
            self._lanes, self._teardown.lanes = lanes, made
        return self._lanes

    def _decide(self, nodes: Sequence[Node], state: LearnerState) -> Deferral:
        return decide(nodes, state, threads=self._cluster is None) if self.defer != "never" else Deferral()

    def explain(self, plan: Plan) -> str:
        """Say in lines which handlers of a plan are deferred, and why others are not; empty if none is deferrable."""
        return "" if self._lanes is None else self._lanes.explain(plan)

    @property
    def sequences(self) -> dict[str, int]:
        """The number of events that each lane has had, by its name."""
        return self._sequences | ({} if self._lanes is None else self._lanes.sequences)

    def resume(self, sequences: Mapping[str, int]) -> None:
        """Let the lanes number their events from here on. This is called before their first event."""
        self._sequences = dict(sequences)
        if self._lanes is not None:
            self._lanes.resume(self._sequences)

    def state_dict(self) -> dict[str, Any]:
        """Flush; return the state for a checkpoint, see `Lanes.state_dict`."""
        found = {} if self._lanes is None else self._lanes.state_dict()
        return {**found, "sequences": self._sequences | found.get("sequences", {})}

    def finish(self, waiting: Mapping[str, Any], site: Site) -> None:
        """Have the events that waited in a checkpoint processed, in lanes and in place; see `waiting.finish`."""
        finish(waiting, site, self.sequences, self.use(site).put_back)
        self.flush()

    @property
    def dashboard_link(self) -> str | None:
        """The address of dask's dashboard; ``None`` without a cluster."""
        connection = self._teardown.connection
        return None if connection is None else str(connection.client.dashboard_link)

    def report(self) -> Report:
        """Return the counts of all lanes; those from before a change of callbacks come first."""
        if self._lanes is None:
            return Report(self._past)
        report = self._lanes.report()
        return replace(report, lanes=self._past + report.lanes)

    def look_again(self) -> None:
        """Have callbacks measured again whose place was decided on long ago."""
        if self._lanes is not None:
            self._lanes.look_again()

    def flush(self) -> None:
        """Wait until all events are done, and raise the failures."""
        if self._lanes is not None:
            self._lanes.flush()

    def close(self) -> None:
        """Flush, end the lanes, and close the connection; failures are raised at the end.

        If the last flush gave up after an interrupt, this does not wait for the remaining events again.
        """
        try:
            if self._lanes is not None and not self._lanes.gave_up:
                self.flush()
        finally:
            self._teardown.close()
            if self._lanes is not None:
                self._lanes.release()
