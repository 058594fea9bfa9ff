"""The estimate behind ``learner.executor.what_if()``: what this executor would save, from measured times of handlers.

The times are those of a fit with a timeline (`flowtrain.graph.clock.Measured`) under any executor, since the serial one
asks this module too. Handlers are spread over threads as the dask executor spreads them
(`flowtrain_dask.parallel.strands`). The cost of a lane for training is measured by taking snapshots of the present
state, unless the fit has deferred the handler and measured it. A gain is not worth it if the executor would not try it
either: below `flowtrain_dask.parallel.decision.LEAST_GAIN`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from flowtrain.callback.handler import Handler
from flowtrain.errors import UsageError
from flowtrain.graph.clock import HAND_OVER, HANDLER, IN_LANE, Measured
from flowtrain.graph.drawing import draw_plan
from flowtrain.graph.executor import Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.what_if import DeferredSavings, ParallelSavings, WhatIf, shown
from flowtrain_dask.deferred.policy import Deferral, decide
from flowtrain_dask.parallel.decision import LEAST_GAIN
from flowtrain_dask.parallel.strands import needs_training_thread, pack
from flowtrain_dask.parallel.threads import cores
from flowtrain_dask.route import why_serial
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.taker import Taker

__all__ = ["estimate"]

_SNAPSHOTS = 5
"""How many snapshots are timed. The first ones fill the pool, so the median is of one that uses its memory again."""

_MEMORY = 1 << 30
"""Bytes that the pool of these snapshots may keep."""


def estimate(site: Site, workers: int | None = None) -> WhatIf:
    """Return what running handlers in parallel, and deferring them, would save.

    Args:
        site: The loop of the learner.
        workers: How many handlers can run at the same time; by default the number of cores.

    Raises:
        UsageError: No fit of these callbacks has had a timeline.
    """
    callbacks: Callbacks = site.state.callbacks
    measured, workers = callbacks.measured, cores() if workers is None else workers
    plans = [plan for plan in (callbacks.plan(*key) for key in callbacks.known) if measured.count(plan)]
    if not plans:
        events = ", ".join(dict.fromkeys(event.__name__ for event, _ in callbacks.known)) or "any event"
        raise UsageError(
            f"what_if() has no times of the handlers at {events}. Measure them first, in a fit with a timeline: "
            f'learner.fit(steps=100, timeline="timeline.json").'
        )
    parallel = [_parallel(plan, measured, workers) for plan in plans if len(plan) > 1]
    deferral = decide(site.nodes, site.state, threads=True)
    deferred = [each for plan in plans for each in _deferred(plan, measured, deferral, site)]
    return WhatIf(workers, tuple(parallel), tuple(deferred))


def _parallel(plan: Plan, measured: Measured, workers: int) -> ParallelSavings:
    """Return the estimate for the handlers of one event."""
    found = measured.of(plan)
    costs = [found.get(position, 0.0) for position in range(len(plan))]
    labels = [planned.label for planned in plan.handlers]
    before: list[list[int]] = [[] for _ in labels]
    for edge in plan.edges:
        before[edge.after].append(edge.before)
    # A handler that hands over does so on the training thread.
    hand_over = {at for at in range(len(plan)) if measured.median(plan, at, HAND_OVER) is not None}
    on_training_thread = needs_training_thread(plan) | hand_over
    why_not = why_serial(plan, on_training_thread, workers, "auto")
    critical = draw_plan(plan, times=found).critical
    strands = pack(before, costs, 1 if why_not else workers, on_training_thread)
    if not why_not and strands.saves < LEAST_GAIN:
        why_not = f"running them together saves {shown(strands.saves)}, and a gain begins at {shown(LEAST_GAIN)}"
    return ParallelSavings(
        plan.event_type.__name__,
        plan.phase_type.__name__,
        measured.count(plan),
        sum(costs),
        sum(costs[position] for position in critical),
        tuple(labels[position] for position in critical),
        tuple(tuple(labels[position] for position in each) for each in strands.strands if each),
        strands.span,
        why_not,
    )


def _deferred(plan: Plan, measured: Measured, deferral: Deferral, site: Site) -> Iterator[DeferredSavings]:
    """Yield the estimate for each handler of a deferrable callback in a plan."""
    lanes = {node for nodes in deferral.lanes for node in nodes}
    for position, planned in enumerate(plan.handlers):
        node = planned.node
        in_place = measured.median(plan, position, HANDLER, IN_LANE)
        if not node.callback.deferrable or in_place is None:
            continue
        why_not, handing_over = "", None
        if node not in lanes:
            why_not = deferral.why_kept(node) or "it runs in place"
        else:
            found = measured.median(plan, position, HAND_OVER)
            handing_over = _snapshot(node, planned.handler, site) if found is None else found
            if in_place - handing_over < LEAST_GAIN:
                why_not = f"a lane gains nothing below {shown(LEAST_GAIN)}"
        names = plan.event_type.__name__, plan.phase_type.__name__
        yield DeferredSavings(planned.label, *names, in_place, handing_over, why_not)


def _snapshot(node: Node, handler: Handler, site: Site) -> float:
    """Return the seconds that a snapshot of the present state takes for a handler."""
    taker = Taker(node.access[handler], site.state, Pool(_MEMORY), tail=False)
    times: list[float] = []
    for _ in range(_SNAPSHOTS):
        begin = time.perf_counter()
        taker.take()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
