"""The serial executor: handlers run one after the other, in the order of the plan."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import ExecutorError, raise_worst
from flowtrain.graph.executor import EXECUTORS, Runner, Site
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Failed, Plan
from flowtrain.graph.what_if import WhatIf
from flowtrain.state.learner_state import LearnerState

__all__ = ["SerialExecutor"]

_CLOSED = "This SerialExecutor is closed. Give the learner a new one."


class SerialExecutor:
    """Runs handlers one after the other on the training thread, in the serial order. The default executor."""

    name = "serial"

    def __init__(self) -> None:
        self._site: Site | None = None
        self._plans: WeakSet[Plan] = WeakSet()  # weak, so that plans of callbacks that were removed are freed
        self._closed = False

    def bind(self, site: Site) -> None:
        """Belong to the loop of one learner from now on.

        Raises:
            ExecutorError: The executor belongs to another learner, or is closed.
        """
        if self._closed:
            raise ExecutorError(_CLOSED)
        if self._site is not None and self._site is not site:
            raise ExecutorError("This SerialExecutor belongs to another learner. Give each learner its own.")
        self._site = site

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Accept any callbacks."""

    def compile(self, plan: Plan) -> Runner:
        """Return a loop over the plan's calls.

        Raises:
            ExecutorError: The executor is closed, or belongs to no learner.
        """
        site = self._site
        if self._closed:
            raise ExecutorError(_CLOSED)
        if site is None:
            raise ExecutorError(
                "SerialExecutor.compile() was called before bind(site). Pass the executor to Learner(executor=...), "
                "which binds it, or call bind(site) first."
            )
        self._plans.add(plan)
        calls = plan.calls
        fired, requests = site.fired, site.requests
        # At `FitEnd` every handler runs whatever happened, so there an interrupt waits for the handlers too.
        caught: type[BaseException] = BaseException if plan.always else Exception

        def run(event: Event, phase: Phase) -> None:
            """Call every handler. Without failures this costs the calls and one test."""
            view: Any = None
            failure: BaseException
            try:
                for call, view in calls:
                    call(event, phase, view)
            except caught as raised:
                failure = raised
            else:
                if fired or requests:
                    site.drain(phase)
                return
            # Outside the except block, so that an exception raised now does not get `failure` as its context.
            try:
                site.fail(plan, event, phase, _finish(plan, view, failure, event, phase))
            finally:
                del failure  # see `flowtrain.errors.raise_worst`
            if fired or requests:
                site.drain(phase)

        return run

    def explain(self, plan: Plan) -> str:
        """Return an empty text: the handlers run in the order that is printed."""
        return ""

    def what_if(self) -> WhatIf:
        """Return what ``executor="dask"`` would save, estimated from the times of the last fit with a timeline.

        Raises:
            ExecutorError: The executor has no learner, or dask is not installed.
            UsageError: No fit of these callbacks has had a timeline.
        """
        if self._site is None:
            raise ExecutorError("This SerialExecutor has no learner yet. Write learner.what_if().")
        import_path, install = EXECUTORS["dask"]  # which spreads the handlers over threads
        try:
            estimates = importlib.import_module(f"{import_path.partition(':')[0]}.what_if")
        except ImportError as error:
            raise ExecutorError(
                f"what_if() estimates what executor='dask' would save, which is not installed ({error}): {install}"
            ) from error
        found: WhatIf = estimates.estimate(self._site)
        return found

    def flush(self) -> None:
        """Do nothing, since no handler is ever pending."""

    def close(self) -> None:
        """Run nothing more: the runners of all plans are replaced by one that raises."""
        self._closed = True
        for plan in list(self._plans):  # a test of `_closed` in each runner would cost every event
            if self._site is not None:
                self._site.swap(plan, _refuse)
        self._plans.clear()


def _refuse(event: Event, phase: Phase) -> None:
    raise ExecutorError(_CLOSED)


def _finish(plan: Plan, view: Any, failure: BaseException, event: Event, phase: Phase) -> list[Failed]:
    """Run the handlers behind one that failed, except those that depend on a failed handler; return all failures."""
    # The failed handler is found by its view, which no other handler has; two of them may share a function.
    # An interrupt may come before the first call; then all handlers follow, and the first one is named.
    start = next((position for position, planned in enumerate(plan.handlers) if planned.view is view), -1)
    failures = [(plan.handlers[max(start, 0)], failure)]
    failed = 1 << start if start >= 0 else 0  # positions that failed or were skipped, as bits
    caught: type[BaseException] = BaseException if plan.always else Exception
    for position in range(start + 1, len(plan.handlers)):
        planned = plan.handlers[position]
        left_out = not plan.always and bool(plan.ancestors[position] & failed)
        if left_out:
            failed |= 1 << position
        try:
            if not left_out:
                planned.call(event, phase, planned.view)
            else:  # other ranks may run this handler, and would wait for the values of this one
                planned.exchange_nothing(event, phase)
        except caught as raised:  # collected, so that the remaining handlers still run
            failures.append((planned, raised))
            failed |= 1 << position
        except BaseException as interrupt:  # it ends the event at once, and takes what failed before with it
            raise_worst([*(raised for _, raised in failures), interrupt])
    try:
        return failures
    finally:
        del failure, failures  # see `flowtrain.errors.raise_worst`
