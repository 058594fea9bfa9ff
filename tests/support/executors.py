"""A correct executor on threads; tests subclass it to break one promise of an executor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeAlias

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError
from flowtrain.graph.executor import Runner, Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan, PlannedHandler
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.parallel.torch_state import TorchState

__all__ = ["Call", "Failures", "Threads"]

Failures: TypeAlias = list[tuple[PlannedHandler, BaseException]]
Call: TypeAlias = Callable[[PlannedHandler, Event, Phase], BaseException | None]


class Threads:
    """Runs every handler as soon as its predecessors are done, each on a thread; keeps every promise of an executor."""

    name = "threads"

    def __init__(self) -> None:
        self.site: Site | None = None
        self.pool = ThreadPoolExecutor(8, "test-threads")
        self.plans: list[Plan] = []
        self.closed = False

    def bind(self, site: Site) -> None:
        if self.closed or (self.site is not None and self.site is not site):
            raise ExecutorError("closed, or another learner's")
        self.site = site

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None: ...

    def compile(self, plan: Plan) -> Runner:
        if self.closed or self.site is None:
            raise ExecutorError("closed, or no learner's")
        site = self.site
        self.plans.append(plan)

        def run(event: Event, phase: Phase) -> None:
            start = len(site.fired)
            failures = self.run(plan, event, phase)
            self.ended(plan, site, start)
            if failures:
                self.fail(site, plan, event, phase, failures)
            if site.fired:
                site.drain(phase)

        return run

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        """Run all handlers that are ready at the same time, round after round; return the failures in serial order."""
        failures: dict[int, BaseException] = {}
        left, done, lost = list(range(len(plan))), 0, 0
        while left:
            ready = [position for position in left if self.may_start(plan, position, done)]
            running: list[tuple[int, Future[BaseException | None]]] = []
            for position in ready:
                left.remove(position)
                if plan.ancestors[position] & lost and not plan.always:
                    lost |= 1 << position
                else:
                    running.append((position, self.start(plan.handlers[position], event, phase)))
            for position, future in running:
                failure = future.result()
                if failure is not None:
                    lost |= 1 << position
                    failures[position] = failure
            done |= sum(1 << position for position in ready)
            interrupts = [each for each in failures.values() if not isinstance(each, Exception)]
            if interrupts and not plan.always:
                raise interrupts[0]
        return [(plan.handlers[position], failure) for position, failure in sorted(failures.items())]

    def may_start(self, plan: Plan, position: int, done: int) -> bool:
        return plan.ancestors[position] & ~done == 0

    def start(self, planned: PlannedHandler, event: Event, phase: Phase) -> Future[BaseException | None]:
        """Run a handler that draws random numbers on this thread, others on a thread that gets this thread's state."""
        if any(path[:2] == ("resource", "rng") for path, _ in planned.node.access[planned.handler]):
            found: Future[BaseException | None] = Future()
            found.set_result(self.call(planned, event, phase))
            return found
        return self.pool.submit(self.surrounded(self.call), planned, event, phase)

    def surrounded(self, call: Call) -> Call:
        """Return a call that runs with the torch state and the context variables of the thread that makes it."""
        state, context = TorchState.capture(), copy_context()

        def run(planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
            found: list[BaseException | None] = []
            context.run(state.call, lambda: found.append(call(planned, event, phase)))
            return found[0]

        return run

    def call(self, planned: PlannedHandler, event: Event, phase: Phase) -> BaseException | None:
        try:
            planned.call(event, phase, planned.view)
        except BaseException as failure:  # `fail` raises it later
            return failure
        return None

    def ended(self, plan: Plan, site: Site, start: int) -> None:
        """Sort the events that the handlers fired into the serial order of the handlers."""
        rank = {planned.node.name: position for position, planned in enumerate(plan.handlers)}
        site.fired[start:] = sorted(site.fired[start:], key=lambda one: rank[one[0]])

    def fail(self, site: Site, plan: Plan, event: Event, phase: Phase, failures: Failures) -> None:
        site.fail(plan, event, phase, failures)

    def explain(self, plan: Plan) -> str:
        return "a thread for each handler"

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        self.pool.shutdown()
        for plan in self.plans:
            if self.site is not None:
                self.site.swap(plan, self.refuse)

    def refuse(self, event: Event, phase: Phase) -> None:
        raise ExecutorError("closed")
