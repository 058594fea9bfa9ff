"""The deferred callbacks of one learner: their lanes, and the snapshot nodes that stand for them in the plans.

A snapshot node takes the place of a deferred handler in a plan, with the handler's conditions and all of its edges. It
copies what the handler declares to read and puts it into the callback's lane. Nodes run on the training thread, since
a lane is filled by that thread alone.

Lanes are made when their first event comes: the run that they belong to is known by then.

Deferring: what an executor does about deferrable callbacks, from its arguments to the end of the lanes.

Callbacks are decided on and checked before a learner uses them (`Deferring.check`), which is also when a cluster is
connected to. `Deferring.use` makes the lanes for them when the first plan is compiled.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flowtrain.callback.access import Write
from flowtrain.callback.callback import draws_own
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError, raise_worst
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, Plan
from flowtrain.graph.reach import Reach
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.random_numbers import Draws
from flowtrain_dask.deferred.policy import (
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
from flowtrain_dask.deferred.shutdown import Held
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.report import LaneReport, Report
from flowtrain_dask.snapshots.copiers import Pool
from flowtrain_dask.snapshots.taker import Shared, Taker, copy_groups

__all__ = ["Deferred", "Deferring", "sharing"]

if TYPE_CHECKING:
    from flowtrain_dask.cluster.connect import Connection


_logger = logging.getLogger("flowtrain")


class _Slot:
    """One lane: its callbacks, and the lane itself once there are events."""

    def __init__(self, nodes: Sequence[Node], first: int, of: Deferred) -> None:
        self.nodes = nodes
        self.first = first
        self.lane: Lane | None = None
        self._of: Deferred = weakref.proxy(of)  # which holds the slot

    def duty(self, node: Node, handler: Handler) -> int:
        """Return the position of a handler in the lane's job."""
        return [(one, each) for one in self.nodes for _, each in one.handlers].index((node, handler))

    def opened(self) -> Lane:
        """Return the lane."""
        if self.lane is None:
            self.lane = self._of.make_lane(self)
        return self.lane


class Deferred:
    """The lanes of one learner.

    Args:
        nodes: All callbacks of the learner.
        deferral: Which of them are deferred.
        site: The loop.
        options: How they are run.
        connection: The cluster; ``None`` for threads of this process.
        sequences: For each lane by its name the number of events that it had before, in a run that is resumed.
        lanes: Where the lanes are entered when they have their first event. A lane has a thread, and nothing that it
            holds leads to the learner, which would never be dropped then.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        deferral: Deferral,
        site: Site,
        options: Options,
        connection: Connection | None,
        sequences: Mapping[str, int],
        lanes: list[Lane],
    ) -> None:
        self.deferral = deferral
        self._options = options
        self._connection = connection
        self.lanes = lanes
        self._site = weakref.ref(site)
        self._pool = Pool(options.limits.bytes)
        self._slots = [_Slot(lane, sequences.get(name_of(lane), 0), self) for lane in deferral.lanes]
        self._slot_of = {node: slot for slot in self._slots for node in slot.nodes}
        self._takers: dict[tuple[Node, Handler], Taker] = {}
        self._reach = Reach(site.state)
        fresh = _fresh(nodes, self._reach)
        for slot in self._slots:
            tail = connection is not None and not why_here(slot.nodes)
            for node in slot.nodes:
                for _, handler in node.handlers:
                    access = node.access[handler]
                    taker = Taker(access, site.state, self._pool, fresh=fresh, tail=tail, lane=slot)
                    self._takers[node, handler] = taker
        self._told: list[str] = []
        self.gave_up = False

    # --- plans

    def positions(self, plan: Plan) -> frozenset[int]:
        """Return the positions of a plan's deferred handlers."""
        return frozenset(at for at, step in enumerate(plan.steps) if step.node in self._slot_of)

    def rewrite(self, plan: Plan) -> tuple[Plan, Shared | None]:
        """Return a plan with snapshot nodes in it, and what its nodes share in one firing, if any two can."""
        positions = self.positions(plan)
        if not positions:
            return plan, None
        groups = copy_groups(plan, positions, self._reach)
        keys = [(path, key) for at in positions for path, key in groups[at].items()]
        shared: Shared | None = {} if len(set(keys)) < len(keys) else None
        calls: dict[int, Call] = {}
        for at in positions:
            step = plan.steps[at]
            slot = self._slot_of[step.node]
            duty = slot.duty(step.node, step.handler)
            taker = self._takers[step.node, step.handler].sharing(groups[at])
            draws = found.state.draws if (found := self._site()) is not None and draws_own(step.callback) else None
            calls[at] = _node(slot, duty, taker, shared, draws, step.node.name)
        return plan.with_calls(calls), shared

    def explain(self, plan: Plan) -> str:
        """Say in lines which handlers of a plan are deferred, to where, and why others that could be are not."""
        parts = []
        for step in plan.steps:
            slot = self._slot_of.get(step.node)
            if slot is not None:
                parts.append(f"{step.label} is deferred to lane {name_of(slot.nodes)} ({self._where(slot.nodes)})")
            elif why := self.deferral.why_kept(step.node):
                parts.append(f"{step.label} runs in place: {why}")
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
            name_of(slot.nodes): slot.first + (0 if slot.lane is None else slot.lane.report().events)
            for slot in self._slots
        }

    def resume(self, sequences: Mapping[str, int]) -> None:
        """Let the lanes that have had no event yet begin to count at these numbers."""
        for slot in self._slots:
            if slot.lane is None:
                slot.first = sequences.get(name_of(slot.nodes), 0)

    def report(self) -> Report:
        """Return how the lanes stand."""
        return Report(tuple(lane.report() for lane in self.lanes))

    def flush(self) -> None:
        """Wait until everything is done; then raise what failed, and log what a user should know.

        While training is being stopped it waits for `Options.drain_timeout` at most.
        """
        self.gave_up = False
        failures: list[BaseException] = []
        while True:
            self._wait()
            found = self._failures()
            failures += found
            if not found:
                break
            # Once more: `FitEnd` is run after a failure, and may fail itself.
        self._tell()
        if failures:
            raise_worst(failures)

    def _wait(self) -> None:
        """Wait until the lanes have nothing left to do, have failed, or training is being stopped for too long."""
        end: float | None = None
        for lane in self.lanes:
            lane.given_up = False
            while not lane.flush(0.25) and not lane.over:
                if end is None and _is_stopping(self._site):
                    end = time.monotonic() + self._options.drain_timeout
                if end is not None and time.monotonic() >= end:
                    self.gave_up = lane.given_up = True
                    left, limit = lane.report().pending, self._options.drain_timeout
                    _logger.warning(
                        "flowtrain: %d events of lane %s were not processed in %g s", left, lane.job.lane, limit
                    )
                    break

    def _failures(self) -> list[BaseException]:
        """Return what the lanes have to raise."""
        failures: list[BaseException] = []
        for lane in self.lanes:
            try:
                lane.raise_failure()
            except BaseException as failure:  # those of all lanes are raised together
                failures.append(failure)
        return failures

    def close(self) -> None:
        """End the lanes; what they have not processed is dropped."""
        for lane in self.lanes:
            lane.close()
        self.release()

    def release(self) -> None:
        """Keep no memory for snapshots any more; what somebody still has of it stays as it is."""
        self._pool.clear()

    def _tell(self) -> None:
        """Log what is new among the troubles."""
        troubles = self.report().troubles()
        if troubles != self._told:
            self._told = troubles
            _logger.warning("flowtrain: %s", "; ".join(troubles))

    def make_lane(self, slot: _Slot) -> Lane:
        """Make the lane of a slot, for its first event."""
        site = self._site
        found = site()
        job = job_of(slot.nodes, self.deferral, found.run.id if found is not None else "", slot.first)

        def surface(raise_it: Callable[[], None]) -> None:
            """Have a failure raised on the training thread."""
            there = site()
            if there is not None:
                there.mailbox.put(raise_it)

        lane = Lane(
            job,
            transport_of(job, slot.nodes, self._options, self._connection),
            self._options.limits,
            surface=surface,
            on_error=self._options.on_error,
            stopping=partial(_is_stopping, site),
        )
        lane.holds = found.open_sinks if found is not None else None
        self.lanes.append(lane)
        return lane


def _is_stopping(site: weakref.ref[Site]) -> bool:
    """Return whether training is about to end."""
    there = site()
    return there is None or there.mailbox.stopping


def sharing(runner: Runner, shared: Shared) -> Runner:
    """Return a runner that forgets, after each firing, what its snapshot nodes have shared."""

    def run(event: Event, phase: Phase) -> None:
        """Fire, with nothing copied yet."""
        shared.clear()
        try:
            runner(event, phase)
        finally:
            shared.clear()

    return run


def _node(slot: _Slot, duty: int, taker: Taker, shared: Shared | None, draws: Draws | None, name: str) -> Call:
    def node(event: Event, phase: Phase, view: Any) -> None:
        """Copy what the handler reads, and put it into its lane."""
        seed = None if draws is None else draws.next(name)
        snapshot = taker.take(shared)
        (slot.lane or slot.opened()).put(duty, event, phase, snapshot, snapshot.nbytes, seed)

    return node


def _fresh(nodes: Sequence[Node], reach: Reach) -> frozenset[tuple[str, ...]]:
    """Return what the core has just made and no callback declares to write: the norm of the gradients.

    Not the loss: a loss function that reuses its memory gives the same tensor at each batch of a validation.
    """
    written = [path for node in nodes for path, kind in node.union if isinstance(kind, Write)]
    made = ("batch", "grad_norm")
    return frozenset(() if any(reach.meet(path, made) for path in written) else (made,))


class Deferring:
    """The deferrable callbacks of an executor's learner.

    Args:
        cluster: Where they run; see `flowtrain_dask.cluster.connect.connect`.
        defer: Whether they are deferred.
        resources: What a worker must have.
        options: How they are run.

    Raises:
        ExecutorError: A value means nothing.
    """

    def __init__(self, cluster: object, defer: bool, resources: dict[str, float], options: Options) -> None:
        check_options(defer, resources, options)
        self._cluster = cluster
        self._defer = defer
        self._resources = resources
        self._options = options
        self._held = Held(options.drain_timeout)
        self._nodes: tuple[Node, ...] = ()
        self._decided: tuple[tuple[Node, ...], Deferral] = (), Deferral()
        self._deferred: Deferred | None = None
        self._sequences: dict[str, int] = {}
        self._past: tuple[LaneReport, ...] = ()
        weakref.finalize(self, self._held.drop).atexit = False  # with a learner that nobody closes

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Decide which callbacks are deferred, and check that they can be. What the lanes have is processed first."""
        deferral = self._decide(nodes, state)
        if deferral.lanes and self._held.connection is None and self._cluster is not None:
            try:
                from flowtrain_dask.cluster.connect import connect  # distributed takes a while to import
            except ModuleNotFoundError as error:
                raise ExecutorError(
                    f"DaskExecutor({self._cluster!r}) needs {error.name}, which is not installed: "
                    f"pip install 'flowtrain[dask]'. DaskExecutor() defers to threads and does not need it."
                ) from error
            self._held.connection = connect(
                self._cluster, self._options.drain_timeout, resources=self._resources or None
            )
        validate(deferral, state, self._options, self._held.connection)
        self.flush()
        self._decided = tuple(nodes), deferral

    def use(self, site: Site) -> Deferred:
        """Return what defers the callbacks that the loop uses now."""
        nodes = tuple(site.nodes)
        if self._deferred is None or nodes != self._nodes:
            if self._deferred is not None:
                self._sequences |= self._deferred.sequences
                self._past += tuple(replace(lane, where="ended") for lane in self._deferred.report().lanes)
                self._deferred.close()
            # A change that was refused after it was checked has left its own decision behind.
            deferral = self._decided[1] if self._decided[0] == nodes else self._decide(nodes, site.state)
            self._nodes = nodes
            self._held.lanes = []
            self._deferred = Deferred(
                nodes, deferral, site, self._options, self._held.connection, self._sequences, self._held.lanes
            )
        return self._deferred

    def _decide(self, nodes: Sequence[Node], state: LearnerState) -> Deferral:
        return decide(nodes, state, threads=self._cluster is None) if self._defer else Deferral()

    def explain(self, plan: Plan) -> str:
        """Say what of a plan is deferred; empty where there is nothing to say."""
        return "" if self._deferred is None else self._deferred.explain(plan)

    @property
    def sequences(self) -> dict[str, int]:
        """The number of events that each lane has had, by its name."""
        return self._sequences | ({} if self._deferred is None else self._deferred.sequences)

    def resume(self, sequences: Mapping[str, int]) -> None:
        """Let the lanes go on counting from these numbers; called before their first event."""
        self._sequences = dict(sequences)
        if self._deferred is not None:
            self._deferred.resume(self._sequences)

    def report(self) -> Report:
        """Return how the lanes stand; those from before a change of callbacks come first."""
        return Report(self._past + (() if self._deferred is None else self._deferred.report().lanes))

    def flush(self) -> None:
        """Wait until everything is processed, and raise what failed."""
        if self._deferred is not None:
            self._deferred.flush()

    def close(self) -> None:
        """Flush, end the lanes, and close what was opened; what failed is raised at the end.

        After an interrupt that did not leave the time to process everything, what is left is not waited for again.
        """
        try:
            if self._deferred is not None and not self._deferred.gave_up:
                self.flush()
        finally:
            self._held.give_back()
            if self._deferred is not None:
                self._deferred.release()
