"""Lanes are prepared before training: the options of the user, the checks of callbacks, and the parts of a lane.

`check_options` checks the arguments of the executor, and `validate` the callbacks that are to be deferred and the
cluster. `job_of` and `transport_of` make the parts of a lane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from flowtrain.callback.access import Declaration, lags_of
from flowtrain.callback.callback import Callback
from flowtrain.errors import CallbackError, ExecutorError
from flowtrain.errors.arguments import is_a, is_positive
from flowtrain.errors.describing import nearest
from flowtrain.graph.held_backends import LIVE, is_learner, reachable
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import owner_of
from flowtrain.state.by_phase import kind_of_series
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.deferred.policy import Deferral, name_of, why_here
from flowtrain_dask.lanes.limits import Limits, check_droppable
from flowtrain_dask.lanes.transport import OnError, OnLoss, ThreadTransport, Transport
from flowtrain_dask.lanes.work import Job, LaneHandler
from flowtrain_dask.snapshots.copiers import check_copies

__all__ = [
    "Defer",
    "Options",
    "check_choice",
    "check_holds_no_state",
    "check_options",
    "job_of",
    "lane_handlers_of",
    "transport_of",
    "validate",
]

if TYPE_CHECKING:  # distributed takes most of a second to import, and threads do without it
    from flowtrain_dask.cluster.connection import Connection


@dataclass(frozen=True)
class Options:
    """How deferred callbacks are run; see `DaskExecutor`."""

    limits: Limits = field(default_factory=Limits)
    on_error: OnError = "raise"
    on_cluster_loss: OnLoss = "local"
    drain_timeout: float = 30.0


_LONGEST = 604_800
"""The largest `drain_timeout` in seconds, since dask cannot wait for an infinite time."""


Defer: TypeAlias = Literal["auto", "always", "never"]
"""Which deferrable callbacks are deferred; see `flowtrain_dask.executor.DaskExecutor`."""


def check_options(defer: object, resources: Mapping[str, float], options: Options) -> Defer:
    """Check the arguments of an executor that say how callbacks are deferred.

    Returns:
        Which callbacks are deferred: with `resources`, which only some workers have, ``"auto"`` is ``"always"``.

    Raises:
        ExecutorError: An argument has a wrong value; the text says what to write.
    """
    choices: dict[object, Defer] = {"auto": "auto", "always": "always", "never": "never"}
    if isinstance(defer, bool):
        chosen: Defer | None = "always" if defer else "never"
    else:
        chosen = choices.get(defer) if isinstance(defer, str) else None
    if chosen is None:
        raise ExecutorError(
            f"DaskExecutor(defer={defer!r}): defer is 'auto', where cost decides which callbacks are deferred, "
            f"'always' or 'never'.{nearest(str(defer), [*map(str, choices)])} Write DaskExecutor(defer=\"auto\")."
        )
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
    return "always" if chosen == "auto" and resources else chosen


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check an argument that is one of several words.

    Raises:
        ExecutorError: The value is none of the words.
    """
    if value not in choices:
        raise ExecutorError(
            f"{name}={value!r} is none of {', '.join(map(repr, choices))}.{nearest(str(value), choices)}"
        )


def check_holds_no_state(callback: Callback, name: str, state: LearnerState) -> None:
    """Check that no attribute of a deferred callback is the learner, a view or a part of the learner's state.

    Raises:
        CallbackError: An attribute is one of these. The callback would read it on its lane while training changes it.
    """
    parts = (state.model, state.optimizer, state.optimizers, state.data, state.params, state.cbstate)
    live = {id(part) for part in (state, *parts) if part is not None}
    # A callback may have modules and tensors of its own, so those of the learner are recognised one by one.
    if isinstance(state.model, torch.nn.Module):
        live |= {id(part) for part in (*state.model.modules(), *state.model.parameters())}
    for attribute, value in vars(callback).items():
        held = (one for one in reachable(value) if id(one) in live or isinstance(one, LIVE) or is_learner(one))
        if (found := next(held, None)) is not None:
            raise CallbackError(
                f"{name} is deferred and keeps {type(found).__name__} in its attribute {attribute!r}: training goes on "
                f"changing that while the callback reads it. Declare what its handlers read, and read it from their "
                f"`learner`; or set deferrable = False."
            )


def validate(deferral: Deferral, state: LearnerState, options: Options, connection: Connection | None) -> None:
    """Check that callbacks can be deferred, and that a worker can run those that leave this process.

    Raises:
        FlowtrainError: A callback cannot be deferred; the text names it and says what to do.
    """
    for nodes in deferral.lanes:
        for node in nodes:
            check_holds_no_state(node.callback, node.name, state)
            series, answers = _reads_series(node.union, state), bool(lags_of(node.union))
            check_droppable(node.callback, series, options.limits, answers=answers)
            for _, handler in node.handlers:
                try:
                    check_copies(node.access[handler], state)
                except Exception as error:
                    error.add_note(f"{node.name} is deferred: its handlers see copies. See {node.name}.deferrable.")
                    raise
        if connection is not None and not why_here(nodes):
            transport = transport_of(job_of(nodes, deferral, "check"), nodes, options, connection)
            transport.open(options.drain_timeout)  # has a worker do a first task: pickling and versions are tried
            transport.close()


def job_of(nodes: Sequence[Node], deferral: Deferral, run: str, first: int = 0) -> Job:
    """Return the job of a lane of these callbacks."""
    names, backends = tuple(node.name for node in nodes), tuple(node.backends for node in nodes)
    draws = "; ".join(f"{name}: {what}" for name in names if (what := deferral.drawing.get(name)))
    return Job(name_of(nodes), run, names, backends, lane_handlers_of(nodes), first=first, draws=draws)


def lane_handlers_of(nodes: Sequence[Node]) -> tuple[LaneHandler, ...]:
    """Return the handlers of a lane of these callbacks."""
    return tuple(
        LaneHandler(number, node.name, handler, node.access[handler], owner_of(node, handler))
        for number, node in enumerate(nodes)
        for _, handler in node.handlers
    )


def transport_of(job: Job, nodes: Sequence[Node], options: Options, connection: Connection | None) -> Transport:
    """Return the transport of a lane: the cluster's, if there is a cluster and all callbacks can leave this process."""
    callbacks = [node.callback for node in nodes]
    if connection is None or why_here(nodes):
        return ThreadTransport(job, callbacks)
    from flowtrain_dask.cluster.transport import ClusterTransport

    return ClusterTransport(job, callbacks, connection, options.on_cluster_loss)


def _reads_series(declaration: Declaration, state: LearnerState) -> bool:
    entries = vars(state.cbstate)
    paths = [path for path, _ in declaration if path[0] == "cbstate"]
    found = [each for path in paths for each in (entries.values() if len(path) == 1 else [entries.get(path[1])])]
    return any(kind_of_series(each) is not None for each in found)
