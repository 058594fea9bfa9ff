"""Deferring: what an executor does about deferrable callbacks, from its arguments to the end of the lanes.

Callbacks are decided on and checked before a learner uses them (`Deferring.check`), which is also when a cluster is
connected to. `Deferring.use` makes the lanes for them when the first plan is compiled.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flowtrain.errors import ExecutorError, is_a, is_positive, nearest
from flowtrain.execution import Site
from flowtrain.graph import Node
from flowtrain.plan import Plan
from flowtrain.state import LearnerState
from flowtrain_dask.deferral import Deferral, decide
from flowtrain_dask.deferred import Deferred
from flowtrain_dask.lanes.leaving import Held
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import LaneReport, Report
from flowtrain_dask.opening import Options, validate

__all__ = ["Deferring", "check_choice"]

_LONGEST = 604_800
"""Seconds of `drain_timeout`; dask cannot wait for an infinite time."""


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
        _check(defer, resources, options)
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


def _check(defer: object, resources: Mapping[str, float], options: Options) -> None:
    if not is_a(defer, bool):
        raise ExecutorError(f"DaskExecutor(defer={defer!r}): defer is True or False. Write DaskExecutor(defer=False).")
    if not is_a(options.limits, Limits):
        raise ExecutorError(
            f"DaskExecutor(limits={options.limits!r}) is no Limits. Write DaskExecutor(limits=Limits(pending=1000)), "
            f"with `from flowtrain_dask import Limits`."
        )
    for name, amount in resources.items():
        if not is_a(name, str) or not is_positive(amount):
            raise ExecutorError(
                f"DaskExecutor(resources={dict(resources)!r}): resources are positive numbers by name. Write "
                f'DaskExecutor(address, resources={{"flowtrain": 1}}), and start the worker with '
                f"`dask worker ADDRESS --resources flowtrain=1`."
            )
    if not is_positive(options.drain_timeout) or options.drain_timeout > _LONGEST:
        raise ExecutorError(
            f"DaskExecutor(drain_timeout={options.drain_timeout!r}): it is a positive number of seconds, such as 30.0, "
            f"and at most {_LONGEST:,}, a week."
        )
    check_choice("on_error", options.on_error, ("raise", "warn"))
    check_choice("on_cluster_loss", options.on_cluster_loss, ("local", "raise"))


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check an argument that is one of several words.

    Raises:
        ExecutorError: It is none of them.
    """
    if value not in choices:
        raise ExecutorError(
            f"{name}={value!r} is none of {', '.join(map(repr, choices))}.{nearest(str(value), choices)}"
        )
