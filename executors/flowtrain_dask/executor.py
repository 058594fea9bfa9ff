"""The executor: one for a learner, with a task graph, strands and a decision for each plan.

``compile`` gives a plan the runner that costs least. A plan of which no two handlers may run at the same time gets the
serial executor's own. For the others a `Decision` is made, or ``parallel=`` says it. A runner that is no longer right
is replaced in the loop (`flowtrain.graph.executor.Site.swap`), so a decision is not asked for at every event.

How one plan is run, and why: what the executor keeps of it, and the words in which it explains it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from flowtrain.callback.events import EpochBegin, Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError, whole_number
from flowtrain.graph.executor import Runner, SerialExecutor, Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.deferred.manager import Deferring, sharing
from flowtrain_dask.deferred.policy import Options, check_choice
from flowtrain_dask.lanes.lane import OnError
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import Report
from flowtrain_dask.lanes.transport import OnLoss
from flowtrain_dask.parallel.decision import Decision
from flowtrain_dask.parallel.firing import CLOSED, Crew, TimedPlan
from flowtrain_dask.parallel.strands import Strands, at_home, is_chain, pack
from flowtrain_dask.parallel.task_graph import EventGraph, compile_plan
from flowtrain_dask.snapshots.taker import Shared

__all__ = [
    "DaskExecutor",
    "Parallel",
    "Route",
    "spread",
    "why_serial",
]


class DaskExecutor:
    """Runs the independent handlers of an event at the same time, on a dask task graph; the result is the serial one.

    It starts threads when an event first runs in parallel. They end with `close`, or with the learner.

    Deferrable callbacks are taken off the training thread: they run later, in order, on exact snapshots of what they
    declare to read, in threads of this process or on a cluster; `report` says how far they are.

    Args:
        cluster: Where deferred callbacks run. ``None``: in threads of this process. ``"local"``: in worker processes
            that the executor starts and ends, for callbacks that compute in Python. A ``distributed.Client``, a cluster
            object or the address of a scheduler: on that cluster. Only what was started here is closed here.
        workers: How many handlers can run at the same time, the training thread's included; the number of cores that
            this process may use if not given.
        parallel: ``"auto"`` runs an event in parallel where timing shows that this is faster, ``"always"`` wherever
            two handlers are independent, ``"never"`` nowhere.
        defer: Whether deferrable callbacks are deferred at all.
        resources: What a worker of the cluster must have, such as ``{"flowtrain": 1}``; see ``docs/cluster.md``.
        drain_timeout: Seconds for which deferred events are still processed when training is interrupted, and for which
            a cluster is waited for before training.
        limits: How many events, and how many bytes, may wait.
        on_error: ``"raise"``: a deferred callback that fails ends training. ``"warn"``: it is logged, and its lane
            takes no more events.
        on_cluster_loss: ``"local"``: what is pending when the cluster is gone is processed in this process.
            ``"raise"``: that is an error.

    Raises:
        ExecutorError: A value means nothing.
    """

    name = "dask"

    def __init__(
        self,
        cluster: Any = None,
        *,
        workers: int | None = None,
        parallel: Parallel = "auto",
        defer: bool = True,
        resources: Mapping[str, float] | None = None,
        drain_timeout: float = 30.0,
        limits: Limits | None = None,
        on_error: OnError = "raise",
        on_cluster_loss: OnLoss = "local",
    ) -> None:
        check_choice("parallel", parallel, ("auto", "always", "never"))
        self.parallel: Parallel = parallel
        options = Options(Limits() if limits is None else limits, on_error, on_cluster_loss, drain_timeout)
        self._deferring = Deferring(cluster, defer, dict(resources or {}), options)
        if workers is not None:
            workers = whole_number(
                "DaskExecutor(): workers, of which the training thread is one,", workers, 1, ExecutorError
            )
        self._crew = Crew(_cores() if workers is None else workers)
        self._serial = SerialExecutor()
        self._site: Site | None = None
        self._entries: dict[tuple[type[Event], type[Phase]], Route] = {}

    @property
    def workers(self) -> int:
        """How many handlers can run at the same time, the training thread's included."""
        return self._crew.workers

    def bind(self, site: Site) -> None:
        """Belong to one loop.

        Raises:
            ExecutorError: It belongs to another one, or is closed.
        """
        self._check_open()
        if self._site is not None and self._site is not site:
            raise ExecutorError("This DaskExecutor belongs to another learner. Give each learner its own.")
        self._site = site
        self._serial.bind(site)

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Raise if it cannot run these callbacks; connect to the cluster if some of them are deferred to it.

        Raises:
            ExecutorError: The cluster cannot be reached, or does not fit; a callback cannot be sent to it.
            CallbackError: A deferred callback keeps the learner's state.
            AccessError: A deferred callback reads what cannot be copied.
        """
        self._check_open()
        self._deferring.check(nodes, state)

    def compile(self, plan: Plan) -> Runner:
        """Return what runs a plan; what it returns may be replaced when firings have been timed."""
        self._check_open()
        if self._site is None:
            raise ExecutorError("DaskExecutor.compile() before bind(); Learner(executor=...) binds it.")
        deferred = self._deferring.use(self._site)
        rewritten, shared = deferred.rewrite(plan)
        entry = self._make(rewritten, self._site, deferred.positions(plan))
        entry.original, entry.shared = plan, shared
        self._entries[plan.event_type, plan.phase_type] = entry
        return self._hooked(entry, entry.runner)

    def graph(self, event_type: type[Event], phase_type: type[Phase]) -> EventGraph:
        """Return the task graph of an event in a phase: one task for each handler. ``dask.visualize`` draws it.

        Args:
            event_type: The event.
            phase_type: The phase.

        Raises:
            ExecutorError: No callback has a handler for it, or the executor has no learner.
        """
        self._check_open()
        if self._site is None:
            raise ExecutorError("This DaskExecutor has no learner yet. Write learner.executor.graph(...).")
        # Asked each time: what was compiled before the callbacks changed does not count.
        if self._site.runner(event_type, phase_type) is None:
            where = f"({event_type.__name__}, {phase_type.__name__})"
            raise ExecutorError(f"There is no graph for {where}: no callback has a handler for it.")
        return self._entries[event_type, phase_type].graph

    def explain(self, plan: Plan) -> str:
        """Say in one line whether a plan runs inline or in parallel, on which strands, and why."""
        if self._site is not None and not self._crew.closed:
            self._deferring.use(self._site)  # lanes are decided on before the first event, and can be asked for
        deferred = self._deferring.explain(plan)
        return f"{self._explain(plan)}\n{deferred}" if deferred else self._explain(plan)

    def report(self) -> Report:
        """Return how the lanes of deferred callbacks stand: what is done, what waits, who made training wait."""
        return self._deferring.report()

    def _explain(self, plan: Plan) -> str:
        entry = self._entries.get((plan.event_type, plan.phase_type))
        if entry is None or entry.original is not plan:
            why = why_serial(plan, at_home(plan), self.workers, self.parallel)
            return f"inline: {why}" if why else f"parallel={self.parallel!r}: not fired yet"
        return entry.explain()

    def flush(self) -> None:
        """Wait until every deferred event is processed; plans that were decided on long ago are timed again.

        Raises:
            Exception: What a deferred callback raised.
        """
        self._look_again()
        self._deferring.flush()

    def state_dict(self) -> dict[str, Any]:
        """Flush, and return what a checkpoint must hold: how many events each lane has had."""
        self.flush()
        return {"sequences": self._deferring.sequences}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned: lanes go on counting from there."""
        self._deferring.resume(state.get("sequences", {}))

    def close(self) -> None:
        """End the threads. A closed executor runs nothing more.

        Raises:
            ExecutorError: It was called in a handler.
        """
        self._crew.close()
        self._deferring.close()
        if self._site is not None:
            for entry in self._entries.values():
                self._site.swap(entry.plan, _closed)
        self._entries.clear()

    # --- plans

    def _make(self, plan: Plan, site: Site, deferred: frozenset[int]) -> Route:
        graph, serial = compile_plan(plan), self._serial.compile(plan)
        home = at_home(plan) | deferred
        why = why_serial(plan, home, self.workers, self.parallel)
        if why:
            return Route(plan, graph, serial, why)
        timed = TimedPlan(plan, self._crew, site, serial)
        pack = partial(spread, graph, self.workers, home)
        if self.parallel == "auto":
            decision = Decision(timed, pack, partial(self._swap, plan))
            return Route(plan, graph, decision.measure, "", decision=decision)
        strands = pack([1.0] * len(plan))
        return Route(plan, graph, partial(timed.fire, strands), "parallel='always'", strands)

    def _swap(self, plan: Plan, runner: Runner) -> None:
        entry = self._entries.get((plan.event_type, plan.phase_type))
        if entry is not None and entry.plan is plan and self._site is not None:
            self._site.swap(plan, self._hooked(entry, runner))

    def _hooked(self, entry: Route, runner: Runner) -> Runner:
        """Return the runner; that of the beginning of an epoch also has plans timed again."""
        if entry.shared is not None:
            runner = sharing(runner, entry.shared)
        if not issubclass(entry.plan.event_type, EpochBegin):
            return runner

        def begin(event: Event, phase: Phase) -> None:
            self._look_again()
            runner(event, phase)

        return begin

    def _look_again(self) -> None:
        for entry in self._entries.values():
            if entry.decision is not None:
                entry.decision.look_again()

    def _check_open(self) -> None:
        if self._crew.closed:
            raise ExecutorError(CLOSED)

    def __repr__(self) -> str:
        return f"DaskExecutor(workers={self.workers}, parallel={self.parallel!r})"


def _closed(event: Event, phase: Phase) -> None:
    raise ExecutorError(CLOSED)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Parallel: TypeAlias = Literal["auto", "always", "never"]


@dataclass
class Route:
    """What is known of one plan: its graph, its runner, and why it is run like that.

    `plan` is what runs, with snapshot nodes; `original` is what the learner knows.
    """

    plan: Plan
    graph: EventGraph
    runner: Runner
    reason: str
    strands: Strands | None = None
    decision: Decision | None = None
    original: Plan | None = None
    shared: Shared | None = None

    def explain(self) -> str:
        """Say in one line whether the plan runs inline or in parallel, on which strands, and why."""
        found = self.decision
        if found is None:
            return _shown("inline" if self.strands is None else "parallel", self.reason, self.plan, self.strands)
        return _shown(found.mode, found.reason, self.plan, found.strands if found.mode == "parallel" else None)


def why_serial(plan: Plan, home: frozenset[int], workers: int, parallel: Parallel) -> str:
    """Return why a plan can only, or must, be run by the serial executor's runner; empty if it need not."""
    if len(plan) == 1:
        return "one handler"
    if is_chain(plan):
        return "one chain"
    if plan.always:
        return "every handler runs, even after an interrupt"
    if len(home) == len(plan):
        return "no handler may leave the training thread"
    if plan.watched:
        return "strict mode looks at the whole state around each handler"
    if workers == 1:
        return "one worker"
    return "parallel='never'" if parallel == "never" else ""


def spread(graph: EventGraph, workers: int, home: frozenset[int], costs: Sequence[float]) -> Strands:
    """Spread the handlers of a graph over strands, by their costs; those at `home` stay on the training thread."""
    return pack(graph.before, costs, workers, home)


def _shown(mode: str, reason: str, plan: Plan, strands: Strands | None) -> str:
    text = f"{mode}: {reason}"
    if strands is not None:
        names = [", ".join(plan.steps[position].node.name for position in strand) for strand in strands.strands]
        text += f"; strands: {' | '.join(names)}"
    return text
