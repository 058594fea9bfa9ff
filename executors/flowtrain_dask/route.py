"""How one plan of a learner is run, and why: a `Route`, and the reasons for which the serial executor runs a plan."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowtrain.graph.executor import Runner
from flowtrain.graph.plan import Plan
from flowtrain_dask.parallel.decision import Decision
from flowtrain_dask.parallel.strands import Strands, is_chain, pack
from flowtrain_dask.parallel.task_graph import EventGraph
from flowtrain_dask.snapshots.taker import CopiesOfFiring

__all__ = ["Parallel", "Route", "assign_strands", "key_of", "why_serial"]

Parallel: TypeAlias = Literal["auto", "always", "never"]
"""When independent handlers run at the same time; see `DaskExecutor`."""


@dataclass
class Route:
    """How one plan is run, and why.

    Attributes:
        plan: The plan that runs, with a snapshot node for each deferred handler.
        graph: Its task graph.
        runner: Its first runner.
        reason: Why it has this runner; empty while a decision says it.
        strands: Its strands, if it always runs in parallel.
        decision: The decision between inline and parallel, if there is one.
        original: The plan of the learner, without snapshot nodes.
        shared: The copies that its snapshot nodes share in one firing, if any two share one.
        settled: Whether no callback is measured to decide where it runs.
    """

    plan: Plan
    graph: EventGraph
    runner: Runner
    reason: str
    strands: Strands | None = None
    decision: Decision | None = None
    original: Plan | None = None
    shared: CopiesOfFiring | None = None
    settled: bool = True

    def is_of(self, plan: Plan) -> bool:
        """Return whether this is the route of a plan, or of one that differs only in whether its calls are timed."""
        handlers = () if self.original is None else self.original.handlers
        return [(each.node, each.handler) for each in handlers] == [(each.node, each.handler) for each in plan.handlers]

    def explain(self) -> str:
        """Say in one line whether the plan runs inline or in parallel, on which strands, and why."""
        made = self.decision
        if made is None:
            return _shown("inline" if self.strands is None else "parallel", self.reason, self.plan, self.strands)
        return _shown(made.mode, made.reason, self.plan, made.strands if made.mode == "parallel" else None)


def why_serial(plan: Plan, on_training_thread: frozenset[int], workers: int, parallel: Parallel) -> str:
    """Return why the serial executor must run a plan; empty if strands could run it.

    Args:
        plan: The plan.
        on_training_thread: The positions of the handlers that only the training thread may run.
        workers: How many handlers can run at the same time.
        parallel: The argument of the user.
    """
    if len(plan) == 1:
        return "one handler"
    if is_chain(plan):
        return "one chain"
    if any(planned.exchange is not None for planned in plan.handlers):
        return "the ranks exchange values, all in the same order"
    if plan.always:
        return "every handler runs, even after an interrupt"
    if len(on_training_thread) == len(plan):
        return "no handler may leave the training thread"
    if plan.watched:
        return "strict mode looks at the whole state around each handler"
    if workers == 1:
        return "one worker"
    return "parallel='never'" if parallel == "never" else ""


def assign_strands(
    graph: EventGraph,
    workers: int,
    on_training_thread: frozenset[int],
    costs: Sequence[float],
    waiting: Collection[int] = (),
    *,
    bounded: bool = False,
) -> Strands:
    """Spread the handlers of a graph over strands by the seconds that each takes.

    Args:
        graph: The graph.
        workers: How many strands there may be for handlers that compute.
        on_training_thread: The positions that the training thread must run, which are on the first strand.
        costs: The seconds that each handler takes.
        waiting: The positions of the handlers that wait most of this time.
        bounded: Whether there may be no more strands for these.
    """
    return pack(graph.before, costs, workers, on_training_thread, () if bounded else waiting)


def key_of(plan: Plan, on_training_thread: frozenset[int], workers: int) -> Hashable:
    """Return a key that is equal for the plans of all learners with the same handlers in the same order."""
    # Names and not types: the key outlives the learner.
    kinds = [plan.event_type, plan.phase_type, *(type(each.callback) for each in plan.handlers)]
    names = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return names, tuple(each.handler.attribute for each in plan.handlers), plan.ancestors, on_training_thread, workers


def _shown(mode: str, reason: str, plan: Plan, strands: Strands | None) -> str:
    text = f"{mode}: {reason}"
    if strands is not None:
        names = [", ".join(plan.handlers[position].node.name for position in strand) for strand in strands.strands]
        text += f"; strands: {' | '.join(names)}"
    return text
