"""How a plan is run, and the line that says why."""

from __future__ import annotations

from typing import Literal

import pytest

from flowtrain import Access, BatchEnd, Callback, FitEnd, LearnerView, Phase, Read, TrainingPhase, Write, on
from flowtrain.graph.plan import Plan
from flowtrain.testing import tiny_learner
from flowtrain_dask.executor import Route, spread, why_serial
from flowtrain_dask.parallel.task_graph import compile_plan


class Own(Callback):
    """Writes an entry of its own, or reads the one of another."""

    def __init__(self, name: str, reads: str = "") -> None:
        self.name = name
        self.reads = reads

    def state_access(self) -> Access:
        return {f"cbstate.{self.reads}": Read()} if self.reads else {f"cbstate.{self.name}": Write()}

    def setup(self, learner: LearnerView) -> None:
        if not self.reads:
            setattr(learner.cbstate, self.name, 0)

    @on(BatchEnd, TrainingPhase)
    def act(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None: ...


def plan_of(*callbacks: Callback, strict: bool = False, end: bool = False) -> Plan:
    learner = tiny_learner(*callbacks, default_callbacks=False, strict=strict)
    return learner.callbacks.plan(FitEnd, Phase) if end else learner.callbacks.plan(BatchEnd, TrainingPhase)


def two() -> tuple[Own, Own]:
    return Own("a"), Own("b")


@pytest.mark.parametrize(
    ("plan", "home", "workers", "parallel", "why"),
    [
        (plan_of(Own("a")), (), 2, "always", "one handler"),
        (plan_of(Own("a"), Own("b", reads="a")), (), 2, "always", "one chain"),
        (plan_of(*two(), end=True), (), 2, "always", "every handler runs, even after an interrupt"),
        (plan_of(*two()), (0, 1), 2, "always", "no handler may leave the training thread"),
        (plan_of(*two(), strict=True), (), 2, "always", "strict mode looks at the whole state around each handler"),
        (plan_of(*two()), (), 1, "always", "one worker"),
        (plan_of(*two()), (), 2, "never", "parallel='never'"),
        (plan_of(*two()), (0,), 2, "auto", ""),
    ],
)
def test_why_a_plan_is_run_serially(
    plan: Plan, home: tuple[int, ...], workers: int, parallel: Literal["auto", "always", "never"], why: str
) -> None:
    assert why_serial(plan, frozenset(home), workers, parallel) == why


def test_handlers_at_home_are_on_the_first_strand_and_the_line_names_all() -> None:
    plan = plan_of(Own("a"), Own("b"), Own("c", reads="a"))
    strands = spread(compile_plan(plan), 2, frozenset({1}), [1.0, 1.0, 1.0])
    assert 1 in strands.strands[0]
    route = Route(plan, compile_plan(plan), lambda event, phase: None, "parallel='always'", strands)
    assert route.explain() == "parallel: parallel='always'; strands: b | a, c"
    assert Route(plan, route.graph, route.runner, "one worker").explain() == "inline: one worker"
