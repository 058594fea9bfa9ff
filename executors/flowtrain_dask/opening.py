"""How a lane is opened: the options, its job, where it runs, and what is checked before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowtrain.access import Declaration
from flowtrain.containers import holds_series
from flowtrain.graph import Node
from flowtrain.plan import owner_of
from flowtrain.series import Series
from flowtrain.state import LearnerState
from flowtrain_dask.deferral import Deferral, check_holds_no_state, stays_here
from flowtrain_dask.lanes.lane import OnError
from flowtrain_dask.lanes.limits import Limits, check_droppable
from flowtrain_dask.lanes.threads import ThreadTransport
from flowtrain_dask.lanes.transport import OnLoss, Transport
from flowtrain_dask.lanes.work import Duty, Job
from flowtrain_dask.snapshots.copies import check

if TYPE_CHECKING:  # distributed takes most of a second to import, and threads do without it
    from flowtrain_dask.cluster.connect import Connection

__all__ = ["Options", "duties_of", "job_of", "name_of", "transport_of", "validate", "why_here"]


@dataclass(frozen=True)
class Options:
    """How deferred callbacks are run; see `DaskExecutor`."""

    limits: Limits = field(default_factory=Limits)
    on_error: OnError = "raise"
    on_cluster_loss: OnLoss = "local"
    drain_timeout: float = 30.0


def validate(deferral: Deferral, state: LearnerState, options: Options, connection: Connection | None) -> None:
    """Check that callbacks can be deferred, and that a worker takes those that go to another process.

    Raises:
        FlowtrainError: They cannot; the text says which, and what to do.
    """
    for nodes in deferral.lanes:
        for node in nodes:
            check_holds_no_state(node.callback, node.name, state)
            check_droppable(node.callback, _reads_series(node.union, state), options.limits)
            for _, handler in node.handlers:
                try:
                    check(node.access[handler], state)
                except Exception as error:
                    error.add_note(f"{node.name} is deferred: its handlers see copies. See {node.name}.deferrable.")
                    raise
        if connection is not None and not why_here(nodes):
            transport = transport_of(job_of(nodes, deferral, "check"), nodes, options, connection)
            transport.open(options.drain_timeout)
            transport.close()


def job_of(nodes: Sequence[Node], deferral: Deferral, run: str, first: int = 0) -> Job:
    """Return what a lane of these callbacks is there for."""
    names, backends = tuple(node.name for node in nodes), tuple(node.backends for node in nodes)
    draws = "; ".join(f"{name}: {what}" for name in names if (what := deferral.drawing.get(name)))
    return Job(name_of(nodes), run, names, backends, duties_of(nodes), first=first, draws=draws)


def duties_of(nodes: Sequence[Node]) -> tuple[Duty, ...]:
    """Return the handlers of these callbacks, as a lane runs them."""
    return tuple(
        Duty(number, node.name, handler, node.access[handler], owner_of(node, handler))
        for number, node in enumerate(nodes)
        for _, handler in node.handlers
    )


def transport_of(job: Job, nodes: Sequence[Node], options: Options, connection: Connection | None) -> Transport:
    """Return what runs a lane's batches: this process where it must, otherwise the cluster."""
    callbacks = [node.callback for node in nodes]
    if connection is None or why_here(nodes):
        return ThreadTransport(job, callbacks)
    from flowtrain_dask.cluster.transport import ClusterTransport

    return ClusterTransport(job, callbacks, connection, options.on_cluster_loss)


def name_of(nodes: Sequence[Node]) -> str:
    """Return the name of a lane of these callbacks."""
    return "+".join(node.name for node in nodes)


def why_here(nodes: Sequence[Node]) -> str:
    """Return why the callbacks of a lane cannot leave this process; empty if they can."""
    return next((f"{node.name}: {why}" for node in nodes if (why := stays_here(node))), "")


def _reads_series(declaration: Declaration, state: LearnerState) -> bool:
    entries = vars(state.cbstate)
    for path, _ in declaration:
        if path[0] != "cbstate":
            continue
        found = list(entries.values()) if len(path) == 1 else [entries.get(path[1])]
        if any(isinstance(one, Series) or holds_series(one) or _made_of_series(one) for one in found):
            return True
    return False


def _made_of_series(value: object) -> bool:
    make = getattr(value, "make", None)
    return callable(make) and isinstance(make(), Series)

