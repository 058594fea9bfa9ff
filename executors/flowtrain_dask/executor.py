"""The executor: one for a learner, with a task graph, strands and a decision for each plan.

``compile`` gives a plan the runner that costs least. A plan of which no two handlers may run at the same time gets the
serial executor's own. For the others `Race` decides, or `parallel` does. A runner that is no longer right is replaced
in the loop (`flowtrain.execution.Site.swap`), so what has been decided is not asked again at every event.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flowtrain.errors import ExecutorError
from flowtrain.events import EpochBegin, Event
from flowtrain.execution import Runner, SerialExecutor, Site
from flowtrain.graph import Node
from flowtrain.phases import Phase
from flowtrain.plan import Plan
from flowtrain.state import LearnerState
from flowtrain_dask.compile import EventGraph, compile_plan
from flowtrain_dask.firing import CLOSED, Crew
from flowtrain_dask.race import Race
from flowtrain_dask.strands import Strands, at_home, is_chain, pack
from flowtrain_dask.ways import Ways

__all__ = ["DaskExecutor", "Parallel"]

Parallel = Literal["auto", "always", "never"]

_CHOICES = ("auto", "always", "never")


@dataclass
class _Entry:
    """What is known of one plan: its graph, its runner, and why it is run like that."""

    plan: Plan
    graph: EventGraph
    runner: Runner
    reason: str
    strands: Strands | None = None
    race: Race | None = None


class DaskExecutor:
    """Runs the independent handlers of an event at the same time, on a dask task graph; the result is the serial one.

    It starts threads when an event first runs in parallel. They end with `close`, or with the learner.

    Args:
        cluster: Reserved for callbacks that are moved off the training thread; leave it out.
        workers: How many handlers can run at the same time, the training thread's included; the number of cores that
            this process may use if not given.
        parallel: ``"auto"`` runs an event in parallel where timing shows that this is faster, ``"always"`` wherever
            two handlers are independent, ``"never"`` nowhere.

    Raises:
        ExecutorError: A value means nothing.
    """

    name = "dask"

    def __init__(self, cluster: None = None, *, workers: int | None = None, parallel: Parallel = "auto") -> None:
        if cluster is not None:
            raise ExecutorError(
                f"DaskExecutor(cluster={cluster!r}): only the threads of this process can be used so far. "
                f"Write DaskExecutor()."
            )
        if parallel not in _CHOICES:
            raise ExecutorError(f"parallel={parallel!r} is none of {', '.join(map(repr, _CHOICES))}.")
        self.parallel = parallel
        self._crew = Crew(_cores() if workers is None else _check_workers(workers))
        self._serial = SerialExecutor()
        self._site: Site | None = None
        self._entries: dict[tuple[type[Event], type[Phase]], _Entry] = {}

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
        """Raise if it cannot run these callbacks."""

    def compile(self, plan: Plan) -> Runner:
        """Return what runs a plan; what it returns may be replaced when firings have been timed."""
        self._check_open()
        if self._site is None:
            raise ExecutorError("DaskExecutor.compile() before bind(); Learner(executor=...) binds it.")
        entry = self._make(plan, self._site)
        self._entries[plan.event_type, plan.phase_type] = entry
        return self._hooked(plan, entry.runner)

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
        entry = self._entries.get((plan.event_type, plan.phase_type))
        if entry is None or entry.plan is not plan:
            why = self._why_serial(plan)
            return f"inline: {why}" if why else f"parallel={self.parallel!r}: not fired yet"
        if entry.race is None:
            return _shown("inline" if entry.strands is None else "parallel", entry.reason, plan, entry.strands)
        race = entry.race
        return _shown(race.mode, race.reason, plan, race.strands if race.mode == "parallel" else None)

    def flush(self) -> None:
        """Nothing is pending between two events; plans that were found to be cheap are timed again."""
        self._rearm()

    def close(self) -> None:
        """End the threads. A closed executor runs nothing more.

        Raises:
            ExecutorError: It was called in a handler.
        """
        self._crew.close()
        if self._site is not None:
            for entry in self._entries.values():
                self._site.swap(entry.plan, _closed)
        self._entries.clear()

    # --- plans

    def _make(self, plan: Plan, site: Site) -> _Entry:
        graph, serial = compile_plan(plan), self._serial.compile(plan)
        why = self._why_serial(plan)
        if why:
            return _Entry(plan, graph, serial, why)
        ways = Ways(plan, self._crew, site)
        spread = partial(_spread, graph, self.workers, at_home(plan))
        if self.parallel == "auto":
            race = Race(plan, ways, spread, serial, self._swap)
            return _Entry(plan, graph, race.runner, "", race=race)
        strands = spread([1.0] * len(plan))

        def always(event: Event, phase: Phase) -> None:
            if ways.busy:
                serial(event, phase)
            else:
                _, failures = ways.parallel(strands, event, phase)
                ways.settle(failures, event, phase)

        return _Entry(plan, graph, always, "parallel='always'", strands)

    def _why_serial(self, plan: Plan) -> str:
        """Return why a plan can only, or must, be run by the serial executor's runner; empty if it need not."""
        if len(plan) == 1:
            return "one handler"
        if is_chain(plan):
            return "one chain"
        if plan.always:
            return "every handler runs, even after an interrupt"
        if len(at_home(plan)) == len(plan):
            return "every handler draws random numbers"
        if plan.watched:
            return "strict mode looks at the whole state around each handler"
        if self.workers == 1:
            return "one worker"
        return "parallel='never'" if self.parallel == "never" else ""

    def _swap(self, plan: Plan, runner: Runner) -> None:
        entry = self._entries.get((plan.event_type, plan.phase_type))
        if entry is not None and entry.plan is plan and self._site is not None:
            self._site.swap(plan, self._hooked(plan, runner))

    def _hooked(self, plan: Plan, runner: Runner) -> Runner:
        """Return the runner; at the beginning of an epoch with a look at the plans that are not counted."""
        if not issubclass(plan.event_type, EpochBegin):
            return runner

        def begin(event: Event, phase: Phase) -> None:
            self._rearm()
            runner(event, phase)

        return begin

    def _rearm(self) -> None:
        for entry in self._entries.values():
            if entry.race is not None:
                entry.race.rearm()

    def _check_open(self) -> None:
        if self._crew.closed:
            raise ExecutorError(CLOSED)

    def __repr__(self) -> str:
        return f"DaskExecutor(workers={self.workers}, parallel={self.parallel!r})"


def _spread(graph: EventGraph, workers: int, home: frozenset[int], costs: Sequence[float]) -> Strands:
    return pack(graph.before, costs, workers, home)


def _closed(event: Event, phase: Phase) -> None:
    raise ExecutorError(CLOSED)


def _shown(mode: str, reason: str, plan: Plan, strands: Strands | None) -> str:
    text = f"{mode}: {reason}"
    if strands is not None:
        names = [", ".join(plan.steps[position].node.name for position in strand) for strand in strands.strands]
        text += f"; strands: {' | '.join(names)}"
    return text


def _check_workers(workers: object) -> int:
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ExecutorError(
            f"workers={workers!r}: an executor needs at least one worker, which is the training thread. "
            f"Leave it out to use every core."
        )
    return workers


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
