"""`DaskExecutor`: how each plan of one learner is run, and why.

For each plan the executor keeps a `Route`: the plan with its snapshot nodes, its task graph, its runner and the reason
for that runner. `DaskExecutor.compile` chooses the runner:

- If no two handlers may run at the same time (`why_serial`), the serial executor's runner.
- Otherwise ``parallel="always"`` gives a runner on strands, and with ``parallel="auto"`` a `Decision` measures which
  runner is faster. When the decision changes, the executor replaces the runner in the loop
  (`flowtrain.graph.executor.Site.swap`), so that an event does not have to ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flowtrain.callback.events import EpochBegin, Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError
from flowtrain.errors.arguments import whole_number
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan
from flowtrain.graph.serial import SerialExecutor
from flowtrain.graph.what_if import WhatIf
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.deferred.deferred_callbacks import DeferredCallbacks
from flowtrain_dask.deferred.preparing import Defer, Options, check_choice
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import Report
from flowtrain_dask.lanes.transport import OnError, OnLoss
from flowtrain_dask.parallel.decision import Decision
from flowtrain_dask.parallel.firing import POOL_CLOSED, StrandPool, TimedPlan
from flowtrain_dask.parallel.strands import needs_training_thread
from flowtrain_dask.parallel.task_graph import EventGraph, compile_plan
from flowtrain_dask.parallel.threads import cores
from flowtrain_dask.route import Parallel, Route, assign_strands, key_of, why_serial
from flowtrain_dask.snapshots.taker import forgetting_copies
from flowtrain_dask.what_if import estimate

__all__ = ["DaskExecutor"]


class DaskExecutor:
    """Runs the independent handlers of an event at the same time, and deferrable callbacks beside training.

    The result is the serial result. Independent handlers run on threads, in the order of a dask task graph, which
    `graph` returns. The threads start when an event first runs in parallel, and end with `close` or with the learner.

    A deferrable callback is taken off the training thread where that saves time. Its handlers then run later, in order,
    on exact snapshots of the state that they declare to read: in threads of this process or on a cluster. `report`
    tells where each callback is, why, and how far its events are.

    Args:
        cluster: Where deferred callbacks run. ``None``: in threads of this process. ``"local"``: in worker processes
            that the executor starts and ends, for callbacks that compute in Python. A ``distributed.Client``, a cluster
            object or the address of a scheduler: on that cluster, which the executor does not close.
        workers: How many handlers can run at the same time, including one on the training thread. By default the number
            of cores that this process may use, and more if handlers wait.
        parallel: ``"auto"`` runs an event in parallel if measuring shows that this is faster, ``"always"`` if two
            handlers are independent, ``"never"`` not at all. A like plan of a later learner of the process begins as
            measured before; the results are the same.
        defer: ``"auto"`` leaves a deferrable callback in place until measuring shows that training is faster without
            it, ``"always"`` or ``True`` defers it from the first event on, ``"never"`` or ``False`` not at all. With
            `resources` ``"auto"`` is ``"always"``.
        resources: The resources that each worker must have, as ``{"flowtrain": 1}``; see ``docs/cluster.md``.
        drain_timeout: The seconds for which deferred events are still processed after training was interrupted and its
            checkpoint is written, and for which the executor waits for a cluster before training.
        limits: How many deferred events, and how many bytes of them, may wait.
        on_error: ``"raise"``: a deferred callback that fails ends training. ``"warn"``: the failure is logged, and the
            lane of the callback takes no more events.
        on_cluster_loss: ``"local"``: when the cluster is lost, pending and further events are processed in this
            process, until the cluster is back. ``"raise"``: losing the cluster is an error.

    Raises:
        ExecutorError: An argument has a wrong value.
    """

    name = "dask"

    def __init__(
        self,
        cluster: Any = None,
        *,
        workers: int | None = None,
        parallel: Parallel = "auto",
        defer: Defer | bool = "auto",
        resources: Mapping[str, float] | None = None,
        drain_timeout: float = 30.0,
        limits: Limits | None = None,
        on_error: OnError = "raise",
        on_cluster_loss: OnLoss = "local",
    ) -> None:
        check_choice("parallel", parallel, ("auto", "always", "never"))
        self.parallel: Parallel = parallel
        self._cluster = cluster
        options = Options(Limits() if limits is None else limits, on_error, on_cluster_loss, drain_timeout)
        self._deferred = DeferredCallbacks(cluster, defer, dict(resources or {}), options)
        if workers is not None:
            what = "DaskExecutor(): workers, of which the training thread is one,"
            workers = whole_number(what, workers, 1, ExecutorError)
        self._bounded = workers is not None
        self._pool = StrandPool(cores() if workers is None else workers)
        self._serial = SerialExecutor()
        self._site: Site | None = None
        self._routes: dict[tuple[type[Event], type[Phase]], Route] = {}

    @property
    def workers(self) -> int:
        """How many handlers can run at the same time, including one on the training thread."""
        return self._pool.workers

    @property
    def dashboard_link(self) -> str | None:
        """The address of dask's dashboard, which shows the tasks of lanes; ``None`` if no lane is on a cluster."""
        return self._deferred.dashboard_link

    def bind(self, site: Site) -> None:
        """Belong to the loop of one learner from now on.

        Raises:
            ExecutorError: The executor belongs to another learner, or is closed.
        """
        self._check_open()
        if self._site is not None and self._site is not site:
            raise ExecutorError("This DaskExecutor belongs to another learner. Give each learner its own.")
        self._site = site
        self._serial.bind(site)

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Raise if the executor cannot run these callbacks; connect to the cluster if one of them is deferred to it.

        Raises:
            ExecutorError: The cluster cannot be reached, has other versions, or a callback cannot be sent to it.
            CallbackError: A deferred callback keeps state of the learner in an attribute.
            AccessError: A deferred callback reads an object that cannot be copied.
        """
        self._check_open()
        self._deferred.check(nodes, state)

    def compile(self, plan: Plan) -> Runner:
        """Return the runner of a plan. It may be replaced in the loop when firings have been measured.

        Raises:
            ExecutorError: The executor is closed, or belongs to no learner.
        """
        self._check_open()
        if self._site is None:
            raise ExecutorError(
                "DaskExecutor.compile() was called before bind(site). Pass the executor to Learner(executor=...), "
                "which binds it, or call bind(site) first."
            )
        placements = self._deferred.use(self._site)
        rewritten, shared = placements.rewrite(plan)
        made = self._make_route(rewritten, self._site, placements.positions(plan))
        route = replace(made, original=plan, shared=shared, settled=placements.are_settled(plan))
        self._routes[plan.event_type, plan.phase_type] = route
        return self._wrapped(route, route.runner)

    def graph(self, event_type: type[Event], phase_type: type[Phase]) -> EventGraph:
        """Return the task graph of an event in a phase, with one task for each handler. ``dask.visualize`` draws it.

        Args:
            event_type: The type of the event.
            phase_type: The type of the phase.

        Raises:
            ExecutorError: No callback has a handler for the event in that phase, or the executor has no learner.
        """
        self._check_open()
        if self._site is None:
            raise ExecutorError("This DaskExecutor has no learner yet. Write learner.executor.graph(...).")
        # The loop compiles the plan if it has not been yet, and again after the callbacks have changed.
        if self._site.runner(event_type, phase_type) is None:
            where = f"({event_type.__name__}, {phase_type.__name__})"
            raise ExecutorError(f"There is no graph for {where}: no callback has a handler for it.")
        return self._routes[event_type, phase_type].graph

    def explain(self, plan: Plan) -> str:
        """Say in one line whether a plan runs inline or in parallel, on which strands, and why.

        A further line for each deferrable callback says whether it is deferred, to which lane, and why not otherwise.
        """
        if self._site is not None and not self._pool.closed:
            self._deferred.use(self._site)  # so that the lanes are known before the first event too
        deferred = self._deferred.explain(plan)
        return f"{self._explain(plan)}\n{deferred}" if deferred else self._explain(plan)

    def what_if(self) -> WhatIf:
        """Return what this executor can save, estimated from the times of the last fit with a timeline.

        Raises:
            ExecutorError: The executor has no learner, or is closed.
            UsageError: No fit of these callbacks has had a timeline.
        """
        self._check_open()
        if self._site is None:
            raise ExecutorError("This DaskExecutor has no learner yet. Write learner.what_if().")
        return estimate(self._site, self.workers)

    def costs(self, plan: Plan) -> dict[int, float]:
        """Return the seconds that handlers of a plan cost the event, by position, as far as they were measured."""
        route = self._routes.get((plan.event_type, plan.phase_type))
        inline = route.decision.costs if route is not None and route.is_of(plan) and route.decision is not None else ()
        return {**dict(enumerate(inline)), **self._deferred.costs(plan)}

    def report(self) -> Report:
        """Return the counts of each lane: its events, those that wait, and how long training waited for room in it."""
        return self._deferred.report()

    def finish(self, waiting: Mapping[str, Any], site: Site) -> None:
        """Process the events that waited when the checkpoint was taken from which a fit resumes.

        Raises:
            CheckpointError: They cannot be read. Nothing has been processed.
            Exception: A handler failed.
        """
        self._deferred.finish(waiting, site)

    @property
    def pending(self) -> int:
        """How many deferred events wait or are at work."""
        return self.report().pending

    def _explain(self, plan: Plan) -> str:
        # `explain` may be asked of a plan that was never fired, and so has no route.
        route = self._routes.get((plan.event_type, plan.phase_type))
        if route is None or not route.is_of(plan):
            why = why_serial(plan, needs_training_thread(plan), self.workers, self.parallel)
            return f"inline: {why}" if why else f"parallel={self.parallel!r}: not fired yet"
        return route.explain()

    def flush(self) -> None:
        """Wait until every deferred event is processed. Plans that were decided on long ago are measured again.

        Raises:
            Exception: The exception of a deferred callback that failed.
        """
        self._look_again()
        self._deferred.flush()

    def state_dict(self) -> dict[str, Any]:
        """Flush, and return how many events each lane has had, for a checkpoint.

        When training is about to stop, this does not wait for long: the events that are left are in the result.
        """
        self._look_again()
        return self._deferred.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the counts that `state_dict` returned: the lanes continue to number their events from there."""
        self._deferred.resume(state.get("sequences", {}))

    def close(self) -> None:
        """Flush, end all threads, and close the cluster if the executor started it. A closed executor runs nothing.

        Raises:
            ExecutorError: A handler calls this.
        """
        self._pool.close()  # first: it refuses a call of a handler before anything else is closed
        self._deferred.close()
        if self._site is not None:
            # The loop holds the runners, and would still call those of a closed executor.
            for route in self._routes.values():
                self._site.swap(route.plan, _closed)
        self._routes.clear()

    # --- plans

    def _compile_stale(self) -> None:
        """Compile the plans again whose callbacks have moved, or are no longer timed."""
        stale = self._deferred.stale
        while stale and self._site is not None:
            key = stale.pop()
            route = self._routes.get(key)
            if route is not None and route.original is not None:
                self._site.swap(route.original, self.compile(route.original))

    def _make_route(self, plan: Plan, site: Site, deferred: frozenset[int]) -> Route:
        graph, serial = compile_plan(plan), self._serial.compile(plan)
        # Snapshot nodes run there too, since one thread fills a lane.
        on_training_thread = needs_training_thread(plan) | deferred
        why = why_serial(plan, on_training_thread, self.workers, self.parallel)
        if why:
            return Route(plan, graph, serial, why)
        timed = TimedPlan(plan, self._pool, site, serial)
        pack = partial(assign_strands, graph, self.workers, on_training_thread, bounded=self._bounded)
        if self.parallel == "auto":
            key = key_of(plan, on_training_thread, self.workers)
            decision = Decision(timed, pack, partial(self._swap, plan), key=key)
            return Route(plan, graph, decision.first, "", decision=decision)
        strands = pack([1.0] * len(plan), ())  # nothing is measured, so every handler counts the same
        return Route(plan, graph, partial(timed.fire, strands), "parallel='always'", strands)

    def _swap(self, plan: Plan, runner: Runner) -> None:
        route = self._routes.get((plan.event_type, plan.phase_type))
        # A decision may end after the callbacks have changed, and its plan is then no longer run.
        if route is not None and route.plan is plan and self._site is not None:
            self._site.swap(plan, self._wrapped(route, runner))

    def _wrapped(self, route: Route, runner: Runner) -> Runner:
        """Return a runner that also clears shared copies after a firing, and has plans measured and compiled again."""
        inline = runner if route.decision is None else route.decision.serial
        if route.shared is not None:
            runner, inline = (forgetting_copies(each, route.shared) for each in (runner, inline))
        if not route.settled:
            runner = self._measuring(route, runner, inline)
        if not issubclass(route.plan.event_type, EpochBegin):
            return runner

        def begin(event: Event, phase: Phase) -> None:
            """Run the event, after having plans measured again whose decision is old."""
            self._look_again()
            runner(event, phase)

        return begin

    def _measuring(self, route: Route, runner: Runner, inline: Runner) -> Runner:
        """Return a runner of a plan whose callbacks are measured, which has plans compiled again after a decision.

        While events of the plan divide the rounds of a race of lanes, they run inline. In parallel, the handler that
        divides the rounds is called earlier, so that one round would be shorter and the next one longer.
        """
        deferred, made, plan = self._deferred, route.decision, route.plan

        def run(event: Event, phase: Phase) -> None:
            """Run the event."""
            if deferred.divides_race(plan):
                inline(event, phase)
            elif made is None or made.mode not in ("racing", "parallel"):
                runner(event, phase)
            else:
                try:
                    runner(event, phase)
                finally:
                    deferred.begin_races_later(plan)
            if deferred.stale:
                self._compile_stale()

        return run

    def _look_again(self) -> None:
        for route in self._routes.values():
            if route.decision is not None:
                route.decision.look_again()
        self._deferred.look_again()
        self._compile_stale()

    def _check_open(self) -> None:
        if self._pool.closed:
            raise ExecutorError(POOL_CLOSED)

    def __repr__(self) -> str:
        where = "" if self._cluster is None else f"{self._cluster!r}, "
        return f"DaskExecutor({where}workers={self.workers}, parallel={self.parallel!r})"


def _closed(event: Event, phase: Phase) -> None:
    raise ExecutorError(POOL_CLOSED)
