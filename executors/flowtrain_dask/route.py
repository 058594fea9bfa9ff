"""How one plan is run, and why: what the executor keeps of it, and the words in which it explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from flowtrain.execution import Runner
from flowtrain.plan import Plan
from flowtrain_dask.parallel.compile import EventGraph
from flowtrain_dask.parallel.race import Race
from flowtrain_dask.parallel.strands import Strands, is_chain, pack
from flowtrain_dask.snapshots.taker import Shared

__all__ = ["Parallel", "Route", "spread", "why_serial"]

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
    race: Race | None = None
    original: Plan | None = None
    shared: Shared | None = None

    def explain(self) -> str:
        """Say in one line whether the plan runs inline or in parallel, on which strands, and why."""
        if self.race is None:
            return _shown("inline" if self.strands is None else "parallel", self.reason, self.plan, self.strands)
        race = self.race
        return _shown(race.mode, race.reason, self.plan, race.strands if race.mode == "parallel" else None)


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
