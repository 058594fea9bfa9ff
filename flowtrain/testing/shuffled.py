"""An executor for tests: every order that the edges allow, one after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan, Step
from flowtrain.state.learner_state import LearnerState

__all__ = ["ShuffledExecutor"]

_CLOSED = "This ShuffledExecutor is closed. Give the learner a new one."


class ShuffledExecutor:
    """Runs each event in an order that its edges allow, and that need not be the serial one, on the training thread.

    Callbacks that declare all they touch come to the same in every such order. So what a callback forgot to declare
    shows as a difference, every time and without threads.

    Args:
        seed: Of the orders. With 0 the order is no random one: whoever may wait, waits.
    """

    name = "shuffled"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self._site: Site | None = None
        self._plans: dict[tuple[type[Event], type[Phase]], Plan] = {}
        self._closed = False

    def bind(self, site: Site) -> None:
        """Belong to one loop.

        Raises:
            ExecutorError: It belongs to another one, or is closed.
        """
        if self._closed:
            raise ExecutorError(_CLOSED)
        if self._site is not None and self._site is not site:
            raise ExecutorError("This ShuffledExecutor belongs to another learner. Give each learner its own.")
        self._site = site

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Accept any callbacks."""

    def compile(self, plan: Plan) -> Runner:
        """Return what runs a plan, each time in another order."""
        site = self._site
        if self._closed or site is None:
            why = _CLOSED if self._closed else "ShuffledExecutor.compile() before bind(); Learner(executor=...) binds."
            raise ExecutorError(why)
        self._plans[plan.event_type, plan.phase_type] = plan
        rank = {step.node.name: position for position, step in enumerate(plan.steps)}

        def run(event: Event, phase: Phase) -> None:
            """Call the handlers, then do what the serial executor does."""
            start = len(site.fired)
            failures = self._run(plan, event, phase)
            site.fired[start:] = sorted(site.fired[start:], key=lambda one: rank.get(one[0], -1))
            if failures:
                site.fail(plan, event, phase, failures)
            if site.fired:
                site.drain(phase)

        return run

    def _run(self, plan: Plan, event: Event, phase: Phase) -> Sequence[tuple[Step, BaseException]]:
        """Call every handler with no failed ancestor; return the failures in serial order."""
        caught: type[BaseException] = BaseException if plan.always else Exception
        failures: dict[int, BaseException] = {}
        left, done, lost = list(range(len(plan))), 0, 0
        while left:
            ready = [position for position in left if plan.ancestors[position] & ~done == 0]
            position = self._random.choice(ready) if self.seed else ready[-1]
            left.remove(position)
            done |= 1 << position
            if plan.ancestors[position] & lost and not plan.always:
                lost |= 1 << position
                continue
            step = plan.steps[position]
            try:
                step.call(event, phase, step.view)
            except caught as failure:
                failures[position] = failure
                lost |= 1 << position
        return [(plan.steps[position], failure) for position, failure in sorted(failures.items())]

    def explain(self, plan: Plan) -> str:
        """Say how the order is chosen."""
        return f"in any order that the edges allow, seed {self.seed}"

    def flush(self) -> None:
        """Nothing is ever pending."""

    def close(self) -> None:
        """Run nothing more."""
        self._closed = True
        for plan in self._plans.values():
            if self._site is not None:
                self._site.swap(plan, _refuse)
        self._plans.clear()

    def __repr__(self) -> str:
        return f"ShuffledExecutor(seed={self.seed})"


def _refuse(event: Event, phase: Phase) -> None:
    raise ExecutorError(_CLOSED)
