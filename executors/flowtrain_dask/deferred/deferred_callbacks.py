"""The deferred callbacks of one executor: decided on, checked, connected to a cluster, flushed, put into checkpoints.

An executor has one `DeferredCallbacks`. It decides and checks which callbacks are deferred before a learner uses them
(`DeferredCallbacks.check`), connects to the cluster, and makes `Placements` and a `LaneSet` when the first plan is
compiled (`DeferredCallbacks.use`). When the callbacks change, it makes new ones.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flowtrain.errors import ExecutorError, raise_worst
from flowtrain.graph.executor import Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan, PlanKey
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.deferred.plans import Placements
from flowtrain_dask.deferred.policy import Deferral, decide
from flowtrain_dask.deferred.preparing import Defer, Options, check_options, validate
from flowtrain_dask.deferred.shutdown import Teardown
from flowtrain_dask.deferred.waiting import finish, saved
from flowtrain_dask.lanes.lane_set import LaneSet
from flowtrain_dask.lanes.report import LaneReport, Outage, Report, uncounted

__all__ = ["DeferredCallbacks"]

_logger = logging.getLogger("flowtrain")

_SHORT = 1.0
"""Seconds for which lanes are flushed before the checkpoint of an interrupt. The events that are left are in it, so it
need not wait for them: a batch system kills the process 30 seconds after the signal."""


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
        self._placements: Placements | None = None
        self._sequences: dict[str, int] = {}
        self._past: tuple[LaneReport, ...] = ()
        self._logged: list[str] = []
        self._outages: Sequence[Outage] = ()  # of the connection, also after it is closed
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
            self._teardown.connection = connection = connect(
                self._cluster, self._options.drain_timeout, resources=self._resources or None
            )
            self._outages = [] if connection is None else connection.outages
        validate(deferral, state, self._options, self._teardown.connection)
        self.flush()
        self._decided = tuple(nodes), deferral

    def use(self, site: Site) -> Placements:
        """Return the placements of the callbacks that the loop has now."""
        nodes = tuple(site.nodes)
        if self._placements is None or nodes != self._nodes:
            past, sequences = self._past, self.sequences
            if self._teardown.lanes is not None:
                past += tuple(replace(lane, where="ended") for lane in self._teardown.lanes.report())
                self._teardown.lanes.close()
            if self._placements is not None:
                self._placements.release()
            # If a change of callbacks was checked and then refused, the last decision is about other callbacks.
            deferral = self._decided[1] if self._decided[0] == nodes else self._decide(nodes, site.state)
            lanes = LaneSet(site, self._options.limits, self._options.on_error)
            stale = self.stale if self.defer == "auto" else None
            connection = self._teardown.connection
            made = Placements(deferral, site, self._options, connection, sequences, lanes, stale)
            # Together, so that an interrupt does not leave closed lanes for callbacks that are taken as decided on.
            self._past, self._sequences, self._nodes = past, sequences, nodes
            self._placements, self._teardown.lanes = made, lanes
        return self._placements

    def _decide(self, nodes: Sequence[Node], state: LearnerState) -> Deferral:
        return decide(nodes, state, threads=self._cluster is None) if self.defer != "never" else Deferral()

    def explain(self, plan: Plan) -> str:
        """Say in lines which handlers of a plan are deferred, and why others are not; empty if none is deferrable."""
        return "" if self._placements is None else self._placements.explain(plan)

    @property
    def sequences(self) -> dict[str, int]:
        """The number of events that each lane has had, by its name."""
        return self._sequences | ({} if self._placements is None else self._placements.sequences)

    def resume(self, sequences: Mapping[str, int]) -> None:
        """Let the lanes number their events from here on. This is called before their first event."""
        self._sequences = dict(sequences)
        if self._placements is not None:
            self._placements.resume(self._sequences)

    def state_dict(self) -> dict[str, Any]:
        """Flush; return the number of events of each lane and, if training is about to stop, those that still wait.

        Lanes with such events stand still, until they are flushed or get another event.
        """
        self.flush(_SHORT)
        lanes = () if self._teardown.lanes is None else self._teardown.lanes.lanes
        waiting = saved(lanes, self._options.drain_timeout)
        self._log_troubles(counts=False)
        sequences = self.sequences
        counts = {name: sequences[name] - each["count"] for name, each in waiting.items()}
        return {"sequences": {**sequences, **counts}, "waiting": waiting}

    def finish(self, waiting: Mapping[str, Any], site: Site) -> None:
        """Have the events that waited in a checkpoint processed, in lanes and in place; see `waiting.finish`."""
        finish(waiting, site, self.sequences, self.use(site).put_back)
        self.flush()

    @property
    def dashboard_link(self) -> str | None:
        """The address of dask's dashboard; ``None`` without a cluster."""
        connection = self._teardown.connection
        return None if connection is None or connection.lost else str(connection.client.dashboard_link)

    def report(self) -> Report:
        """Return the counts of all lanes; those from before a change of callbacks come first."""
        lanes = () if self._teardown.lanes is None else self._teardown.lanes.report()
        places = () if self._placements is None else self._placements.report()
        return Report(self._past + lanes, places, tuple(map(replace, self._outages)))

    def costs(self, plan: Plan) -> dict[int, float]:
        """Return the measured seconds that handlers of deferrable callbacks cost the event of a plan, by position."""
        return {} if self._placements is None else self._placements.costs(plan)

    def divides_race(self, plan: Plan) -> bool:
        """Return whether the events of a plan divide the rounds of a race of lanes, or will do so."""
        return self._placements is not None and self._placements.divides_race(plan)

    def begin_races_later(self, plan: Plan) -> None:
        """Let no round of a race of lanes begin with the last event of a plan."""
        if self._placements is not None:
            self._placements.begin_races_later(plan)

    def look_again(self) -> None:
        """Have callbacks measured again whose place was decided on long ago."""
        if self._placements is not None:
            self._placements.look_again()

    def flush(self, patience: float | None = None) -> None:
        """Wait until all events are done; then raise the failures, and log problems that a user should know of.

        Args:
            patience: For how many seconds at most, if training is about to stop; by default `Options.drain_timeout`,
                after which the events that are left are logged.
        """
        lanes, limit = self._teardown.lanes, self._options.drain_timeout
        if lanes is None:
            return
        failures: list[BaseException] = []
        while True:
            lanes.wait(limit if patience is None else min(patience, limit))
            found = lanes.failures()
            failures += found
            if not found:
                break
            # Again, because `FitEnd` runs after a failure was raised, and may fail as well.
        if patience is None:
            lanes.log_pending(limit)
        self._log_troubles(counts=patience is None)
        if failures:
            raise_worst(failures)

    def close(self) -> None:
        """Flush, end the lanes, and close the connection; failures are raised at the end.

        If the last flush gave up after an interrupt, this does not wait for the remaining events again.
        """
        try:
            if self._teardown.lanes is not None and not self._teardown.lanes.gave_up:
                self.flush()
        finally:
            self._teardown.close()
            if self._placements is not None:
                self._placements.release()

    def _log_troubles(self, *, counts: bool) -> None:
        """Log the problems of the lanes if there is a new one, or with `counts` if there is more of a known one."""
        troubles = [] if self._teardown.lanes is None else Report(self._teardown.lanes.report()).troubles()
        if troubles != self._logged and (counts or uncounted(troubles) != uncounted(self._logged)):
            if troubles:
                _logger.warning("flowtrain: %s", "; ".join(troubles))
            self._logged = troubles
