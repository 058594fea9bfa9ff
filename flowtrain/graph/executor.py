"""Executors: who runs a plan. The serial one, the seam for others, and how they are found by name.

An executor turns each plan into a *runner*, a function of ``(event, phase)`` that runs the plan's handlers and returns
when all of them have. What every executor promises is in ``docs/rules.md``: the result is the serial result.

Executors are found by name in a built-in table, then in the entry-point group ``flowtrain.executors``::

    [project.entry-points."flowtrain.executors"]
    mine = "my_package:MyExecutor"
"""

from __future__ import annotations

import concurrent.futures
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakSet

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import CheckpointRequest
from flowtrain.errors import ExecutorError, nearest
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan, Step
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState

__all__ = ["EXECUTORS", "Executor", "Mailbox", "Resumable", "Runner", "SerialExecutor", "Site", "find_executor"]

Runner: TypeAlias = Callable[[Event, Phase], None]

EXECUTORS: dict[str, tuple[str, str]] = {
    "serial": ("flowtrain.graph.executor:SerialExecutor", ""),
    "dask": ("flowtrain_dask:DaskExecutor", "pip install 'flowtrain[dask]'"),
}
"""The executors that come with flowtrain: name to where they are and how to install what they need."""

_GROUP = "flowtrain.executors"

_CLOSED = "This SerialExecutor is closed. Give the learner a new one."


class Mailbox:
    """What is to be done on the training thread, between two batches.

    Any thread may put a call into it, and a signal handler too: an executor puts in the failure of a lane, the writer
    of checkpoints its own, an interrupt the end of the fit, and the loop the checkpoints that were asked for within a
    batch. The training thread empties it after each batch, after `EpochBegin`, after each epoch, and twice when a fit
    is closed: before and after the last checkpoint is written. What a call raises ends the fit; what is left when the
    fit has ended is dropped.

    Attributes:
        calls: What was put in and is not done yet, first in, first out. The loop looks after each batch whether it is
            empty.
        stopping: Whether an interrupt is about to end the fit. Who waits for room, or for work far away, stops waiting.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.stopping = False

    def put(self, call: Callable[[], None]) -> None:
        """Have something called on the training thread."""
        self.calls.append(call)

    def empty(self) -> None:
        """Make the calls that are in it; what they put in meanwhile waits for the next time."""
        for _ in range(len(self.calls)):
            self.calls.pop(0)()

    def clear(self) -> None:
        """Drop what is in it: the fit is over."""
        self.stopping = False
        self.calls.clear()


class Site(Protocol):
    """What an executor gets from the loop that it works for."""

    @property
    def state(self) -> LearnerState:
        """What is trained, and what callbacks share."""
        ...

    @property
    def nodes(self) -> Sequence[Node]:
        """The callbacks that are in use, with their names and declarations."""
        ...

    @property
    def run(self) -> Run:
        """The run that the logging backends are opened for."""
        ...

    @property
    def open_sinks(self) -> object:
        """What keeps the logging backends open: held by whatever writes into them when the learner may be gone."""
        ...

    @property
    def fired(self) -> list[tuple[str, Event]]:
        """The events that handlers asked to fire next, each with the name of the callback that asked."""
        ...

    @property
    def requests(self) -> list[tuple[str, CheckpointRequest]]:
        """The checkpoints that handlers of the current event asked for, each with the callback's name; as `fired`."""
        ...

    @property
    def mailbox(self) -> Mailbox:
        """What is to be done on the training thread: a failure on another thread gets there through it."""
        ...

    def drain(self, phase: Phase) -> None:
        """Fire the events in `fired`, in their order, then take the checkpoints in `requests`.

        To be called on the training thread after an event.
        """

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[tuple[Step, BaseException]]) -> None:
        """Raise for the handlers that failed, given in serial order; returns where every failure means nothing now."""

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Return what runs an event in a phase, compiled if it has not been yet; ``None`` where nothing handles it."""

    def swap(self, plan: Plan, runner: Runner) -> None:
        """Use another runner for a plan from its next event on."""


@runtime_checkable
class Executor(Protocol):
    """Runs plans. `flowtrain.testing` has a test for each promise in ``docs/rules.md``.

    A runner calls every handler of its plan with ``(event, phase, view)`` and returns when all have returned. It keeps
    the order of the plan's edges; when handlers raise, those with no failed ancestor still run, then it hands the
    failures to `Site.fail`. At the end it brings what this event has added to `Site.fired` and `Site.requests` into the
    serial order of who asked, and calls `Site.drain` if one of them holds something.
    """

    @property
    def name(self) -> str:
        """The name under which it is found and reported."""
        ...

    def bind(self, site: Site) -> None:
        """Belong to one loop from now on.

        Raises:
            ExecutorError: It belongs to another one, or is closed.
        """

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Raise if it cannot run these callbacks, which a learner is about to use. Called before `bind` and again."""

    def compile(self, plan: Plan) -> Runner:
        """Return what runs a plan that has at least one step. Called once for each plan."""
        ...

    def explain(self, plan: Plan) -> str:
        """Say in one line how a plan is run, and in further lines what else there is to say; empty for nothing."""
        ...

    def flush(self) -> None:
        """Return when everything that was handed out is done."""

    def close(self) -> None:
        """Flush, and give back every resource. A closed executor runs nothing more."""


@runtime_checkable
class Resumable(Protocol):
    """What an executor may have beside `Executor`: a part in checkpoints.

    One without it is flushed before a checkpoint is taken, and begins anew in a fit that resumes.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values.

        Called on the training thread, when no handler runs there. What is pending then must be done by the time that
        this returns, or be in what it returns.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, before the first event of the fit that resumes.

        Not called for a checkpoint of an executor that has no part in it.
        """


class SerialExecutor:
    """Run handlers one after the other on the training thread, in the serial order. The default."""

    name = "serial"

    def __init__(self) -> None:
        self._site: Site | None = None
        self._plans: WeakSet[Plan] = WeakSet()  # those in use; of callbacks that are gone nothing is kept
        self._closed = False

    def bind(self, site: Site) -> None:
        """Belong to one loop."""
        if self._closed:
            raise ExecutorError(_CLOSED)
        if self._site is not None and self._site is not site:
            raise ExecutorError("This SerialExecutor belongs to another learner. Give each learner its own.")
        self._site = site

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Accept any callbacks."""

    def compile(self, plan: Plan) -> Runner:
        """Return a loop over the plan's calls."""
        site = self._site
        if self._closed:
            raise ExecutorError(_CLOSED)
        if site is None:
            raise ExecutorError("SerialExecutor.compile() before bind(); Learner(executor=...) binds it.")
        self._plans.add(plan)
        calls = plan.calls
        fired, requests = site.fired, site.requests
        # Where every handler runs whatever failed, that includes an interrupt.
        caught: type[BaseException] = BaseException if plan.always else Exception

        def run(event: Event, phase: Phase) -> None:
            """Call every handler; a plan without failures costs the calls and one test."""
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
            # Outside of the except block, so that what is raised now keeps its own context.
            try:
                site.fail(plan, event, phase, _finish(plan, view, failure, event, phase))
            finally:
                del failure  # see `flowtrain.errors.raise_worst`
            if fired or requests:
                site.drain(phase)

        return run

    def explain(self, plan: Plan) -> str:
        """Nothing to say: the order printed is the order run."""
        return ""

    def flush(self) -> None:
        """Nothing is ever pending."""

    def close(self) -> None:
        """Run nothing more. There is nothing to give back."""
        self._closed = True
        for plan in list(self._plans):
            if self._site is not None:
                self._site.swap(plan, _refuse)
        self._plans.clear()


def _refuse(event: Event, phase: Phase) -> None:
    raise ExecutorError(_CLOSED)


def _finish(
    plan: Plan, view: Any, failure: BaseException, event: Event, phase: Phase
) -> list[tuple[Step, BaseException]]:
    """After the failure of one call, run the later ones that do not depend on a failed or skipped one."""
    # By the view, which each step has for itself; two steps may share a function.
    start = next(position for position, step in enumerate(plan.steps) if step.view is view)
    failures = [(plan.steps[start], failure)]
    lost = 1 << start
    caught: type[BaseException] = BaseException if plan.always else Exception
    for position in range(start + 1, len(plan.steps)):
        step = plan.steps[position]
        if plan.ancestors[position] & lost and not plan.always:
            lost |= 1 << position
            continue
        try:
            step.call(event, phase, step.view)
        except caught as another:  # whatever a handler raises is collected, then raised
            failures.append((step, another))
            lost |= 1 << position
    try:
        return failures
    finally:
        del failure, failures  # see `flowtrain.errors.raise_worst`


def find_executor(executor: object) -> Executor:
    """Return the executor for a name, or an executor that is given as one.

    Args:
        executor: A name (``"serial"``), or an object that implements `Executor`.

    Raises:
        ExecutorError: The name is unknown, what it needs is not installed, or the object is no executor.
    """
    if isinstance(executor, str):
        return _by_name(executor)
    if isinstance(executor, concurrent.futures.Executor):
        raise ExecutorError(
            f"{type(executor).__name__} is an executor of concurrent.futures: it runs functions and knows nothing of "
            f"the order between callbacks. Pass one by name instead: {_known()}."
        )
    if isinstance(executor, type):
        raise ExecutorError(f"executor={executor.__name__} is a class. Pass an instance: {executor.__name__}().")
    if not isinstance(executor, Executor):
        needed = "name, bind, check, compile, explain, flush and close"
        raise ExecutorError(
            f"executor={executor!r} is no executor: it needs {needed}. Pass one by name instead: {_known()}."
        )
    has = [name for name in ("state_dict", "load_state_dict") if hasattr(executor, name)]
    if len(has) == 1:
        raise ExecutorError(
            f"executor={executor!r} has {has[0]} alone, so nothing of it could be resumed. An executor has both "
            f"state_dict() and load_state_dict(state), or neither."
        )
    return executor


def _by_name(name: str) -> Executor:
    if name in EXECUTORS:
        where, install = EXECUTORS[name]
        module, _, attribute = where.partition(":")
        try:
            made: Executor = getattr(importlib.import_module(module), attribute)()
        except ImportError as error:
            raise ExecutorError(f"executor={name!r} needs {error.name}, which is not installed: {install}") from error
        return made
    found = entry_points(group=_GROUP, name=name)
    for point in found:
        try:
            made = point.load()()
        except ImportError as error:
            owner = point.dist.name if point.dist is not None else point.value
            raise ExecutorError(
                f"executor={name!r} is {point.value} of {owner}, and it cannot be imported: {error}. "
                f"Install what {owner} needs."
            ) from error
        return find_executor(made)
    raise ExecutorError(f"There is no executor {name!r}.{nearest(name, _names())} Known are: {_known()}.")


def _names() -> list[str]:
    return sorted({*EXECUTORS, *(point.name for point in entry_points(group=_GROUP))})


def _known() -> str:
    return ", ".join(repr(name) for name in _names())
