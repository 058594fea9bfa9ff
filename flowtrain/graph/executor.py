"""Executors: the objects that run plans.

An executor turns each plan into a *runner*, a function of ``(event, phase)`` that calls the handlers of the plan and
returns when all of them that run in place have returned. ``docs/rules.md`` has the promises that every executor keeps;
the first one is that the result is the serial result.

`Executor` is the protocol that an executor implements, `Site` is the interface of the loop to it, and
`flowtrain.graph.serial.SerialExecutor` is the default. `find_executor` looks up a name in a built-in table, then in
the entry-point group ``flowtrain.executors``::

    [project.entry-points."flowtrain.executors"]
    mine = "my_package:MyExecutor"
"""

from __future__ import annotations

import concurrent.futures
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeAlias, runtime_checkable

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import CheckpointRequest
from flowtrain.errors import ExecutorError
from flowtrain.errors.describing import nearest
from flowtrain.graph.clock import Clock
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Failed, Plan
from flowtrain.graph.what_if import WhatIf
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState

__all__ = [
    "EXECUTORS",
    "Deferring",
    "Estimating",
    "Executor",
    "Mailbox",
    "Measuring",
    "Resumable",
    "Runner",
    "Site",
    "find_executor",
    "finish_waiting",
    "savings",
]

Runner: TypeAlias = Callable[[Event, Phase], None]
"""A function that runs all handlers of one plan."""

EXECUTORS: dict[str, tuple[str, str]] = {
    "serial": ("flowtrain.graph.serial:SerialExecutor", ""),
    "dask": ("flowtrain_dask:DaskExecutor", "pip install 'flowtrain[dask]'"),
}
"""The executors that come with flowtrain: the name, the import path, and the command that installs its dependencies.

``"local"`` and the address of a scheduler are arguments of the executor ``"dask"``, and can stand for it: the core does
not import the classes of executors, so a program that has its executor from an option needs no import either.
"""

_GROUP = "flowtrain.executors"


class Mailbox:
    """Calls that any thread, or a signal handler, leaves for the training thread to make between two batches.

    An executor puts in a call that raises the failure of a lane, the writer of checkpoints one that raises its own
    failure, an interrupt one that ends the fit, and the loop one that takes the checkpoints requested within a batch.
    The training thread makes the calls after each batch, after `EpochBegin`, after each epoch, and twice at the end of
    a fit: before and after the last checkpoint is written. An exception of a call ends the fit. Calls that are left
    when the fit has ended are dropped.

    Attributes:
        calls: The calls that were not made yet, first in, first out. The loop tests after each batch whether this list
            is empty, which is all that a batch pays for the mailbox.
        stopping: Whether an interrupt is about to end the fit. A thread that waits, for room in a lane or for a worker,
            then stops waiting.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.stopping = False

    def put(self, call: Callable[[], None]) -> None:
        """Leave a call for the training thread."""
        self.calls.append(call)

    def empty(self) -> None:
        """Make the calls that are in the mailbox; calls that they put in wait for the next time."""
        for _ in range(len(self.calls)):
            self.calls.pop(0)()

    def stop_waiting(self) -> None:
        """Let every thread that waits for room or for a worker stop waiting, since an interrupt ends the fit."""
        self.stopping = True

    def clear(self) -> None:
        """Drop all calls, since the fit is over."""
        self.stopping = False
        self.calls.clear()


class Site(Protocol):
    """The interface of the loop to the executor that is bound to it."""

    @property
    def state(self) -> LearnerState:
        """The state of the learner, which the views show."""
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
        """An object that keeps the logging backends open while anyone holds it: a lane may outlive the learner."""
        ...

    @property
    def fired(self) -> list[tuple[str, Event]]:
        """The events that handlers have fired during the current event, each with the name of the callback."""
        ...

    @property
    def requests(self) -> list[tuple[str, CheckpointRequest]]:
        """The checkpoints that handlers have requested during the current event, each with the name of the callback."""
        ...

    @property
    def clock(self) -> Clock | None:
        """The object that times whatever takes time beside handlers in place; ``None`` without a timeline."""
        ...

    @property
    def mailbox(self) -> Mailbox:
        """The mailbox of the training thread, through which a failure on another thread gets there."""
        ...

    def drain(self, phase: Phase) -> None:
        """Fire the events in `fired`, in their order, then take the checkpoints in `requests`.

        An executor calls this on the training thread at the end of an event.
        """

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
        """Raise the worst failure of an event; return if each failure is a cancel whose scope is not open any more.

        Args:
            plan: The plan that was run.
            event: The event.
            phase: The phase.
            failures: The handlers that failed and what they raised, in serial order.
        """

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Return the runner for an event in a phase, compiled at first use; ``None`` if no callback handles them."""

    def swap(self, plan: Plan, runner: Runner) -> None:
        """Use another runner for a plan from its next event on."""


@runtime_checkable
class Executor(Protocol):
    """Runs plans. `flowtrain.testing.ExecutorContract` tests each promise in ``docs/rules.md``.

    A runner calls every handler of its plan with ``(event, phase, view)`` and returns when all of them have returned.
    It keeps the order of the plan's edges. When handlers raise, the handlers without a failed ancestor still run, and
    then the runner passes the failures to `Site.fail`. At the end it sorts the entries that this event has added to
    `Site.fired` and `Site.requests` by the serial order of their handlers, and calls `Site.drain` if there are any.
    """

    @property
    def name(self) -> str:
        """The name by which the executor is found, and which reports show."""
        ...

    def bind(self, site: Site) -> None:
        """Belong to one loop from now on.

        Raises:
            ExecutorError: The executor belongs to another loop, or is closed.
        """

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Raise an error to refuse callbacks that a learner is about to use. Called before `bind`, and at each change.

        Args:
            nodes: The callbacks, after their `setup`.
            state: The state of the learner.
        """

    def compile(self, plan: Plan) -> Runner:
        """Return the runner of a plan, which has at least one handler. Called once for each plan."""
        ...

    def explain(self, plan: Plan) -> str:
        """Return how a plan is run, for `Callbacks.explain`: one line, then details in further lines; or nothing."""
        ...

    def flush(self) -> None:
        """Return when everything that the executor was given is done."""

    def close(self) -> None:
        """Flush, and release every resource. A closed executor runs nothing more."""


@runtime_checkable
class Resumable(Protocol):
    """An executor that counts, such as the events of a lane; it may implement this beside `Executor`.

    A checkpoint holds the counts, and in a fit that resumes the executor continues to count from there.

    An executor without it is flushed before a checkpoint is taken, and begins anew in a fit that resumes.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Flush, and return the counts, as tensors and plain values.

        Called on the training thread while no handler runs there. No work is pending when the call returns; but if
        training is about to stop, the executor may return pending work as an entry ``waiting``, and stands still with
        it until it is flushed: callbacks and logging backends have the state before that work.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue to count from the counts that `state_dict` returned, at the first event of the fit that resumes.

        Not called if the executor of the interrupted fit was not `Resumable`.
        """


@runtime_checkable
class Deferring(Protocol):
    """An executor that defers events; it may implement this beside `Executor` and `Resumable`."""

    def finish(self, waiting: Mapping[str, Any], site: Site) -> None:
        """Process the events that waited when a checkpoint was taken, before a fit resumes from it.

        Args:
            waiting: The entry ``waiting`` of a `Resumable.state_dict`.
            site: The loop of the learner. The executor may belong to no loop: it then runs the events in place.
        """

    @property
    def pending(self) -> int:
        """How many events wait or are at work. After an interrupt there may be some, which may still write logs."""
        ...


@runtime_checkable
class Measuring(Protocol):
    """An executor that measures what handlers cost; it may implement this beside `Executor`."""

    def costs(self, plan: Plan) -> Mapping[int, float]:
        """Return the seconds that handlers of a plan cost the event, by position, as far as they were measured."""
        ...


@runtime_checkable
class Estimating(Protocol):
    """An executor that estimates what running handlers in another way would save; it may implement this too."""

    def what_if(self) -> WhatIf:
        """Return the estimate for the callbacks of the learner, from the times of the last fit with a timeline.

        Raises:
            ExecutorError: The executor belongs to no learner, or a package that it needs is not installed.
            UsageError: No fit of these callbacks has had a timeline.
        """
        ...


def savings(executor: Executor) -> WhatIf:
    """Return the estimate of an executor (`Estimating.what_if`).

    Raises:
        ExecutorError: The executor gives no estimate.
        UsageError: No fit of these callbacks has had a timeline.
    """
    if not isinstance(executor, Estimating):
        raise ExecutorError(
            f"what_if() asks the executor for an estimate, and {executor.name!r} ({type(executor).__name__}) gives "
            f'none. Give it a method what_if(self), or make the learner with executor="serial" and fit it with a '
            f"timeline: what_if() then estimates what executor='dask' would save."
        )
    return executor.what_if()


def finish_waiting(executor: Executor, waiting: Mapping[str, Any], site: Site) -> None:
    """Process the events that waited when a checkpoint was taken: in the lanes of an executor, or else in place.

    Raises:
        CheckpointError: They cannot be read. Nothing has been processed.
        ExecutorError: The package whose lanes had the events is not installed.
        Exception: A handler failed.
    """
    if isinstance(executor, Deferring):
        executor.finish(waiting, site)
        return
    import_path, install = EXECUTORS["dask"]
    module, _, attribute = import_path.partition(":")
    try:
        in_place = getattr(importlib.import_module(module), attribute)(defer=False)
    except ImportError as error:
        events = sum(each["count"] for each in waiting.values())
        raise ExecutorError(
            f"The checkpoint has {events:,} events of {', '.join(waiting)} that waited in the executor 'dask', and "
            f"{error.name}, which can read them, is not installed: {install}"
        ) from error
    try:
        in_place.finish(waiting, site)
    finally:
        in_place.close()


def find_executor(executor: object) -> Executor:
    """Return the executor that a user has named or passed.

    Args:
        executor: A name such as ``"serial"``, the address of a dask scheduler, or an object that implements `Executor`.

    Raises:
        ExecutorError: The name is unknown, a package that the executor needs is not installed, or the object is no
            executor.
    """
    if isinstance(executor, str):
        return _by_name(executor)
    if isinstance(executor, concurrent.futures.Executor):
        raise ExecutorError(
            f"{type(executor).__name__} is an executor of concurrent.futures: it runs functions and knows nothing of "
            f"the order between callbacks. Pass one by name instead: {_known()}."
        )
    if isinstance(executor, type):  # a class has the methods of the protocol too
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
    """Make the executor of a name, from the built-in table or from an entry point of an installed package."""
    of_dask = name == "local" or ":" in name  # an address has a colon before the port
    if of_dask or name in EXECUTORS:
        import_path, install = EXECUTORS["dask" if of_dask else name]
        module, _, attribute = import_path.partition(":")
        try:
            made: Executor = getattr(importlib.import_module(module), attribute)(*([name] if of_dask else ()))
        except ImportError as error:
            raise ExecutorError(f"executor={name!r} needs {error.name}, which is not installed: {install}") from error
        return made
    for point in entry_points(group=_GROUP, name=name):  # the first one, if several packages have the name
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
    """Return the names of all executors that are installed, sorted."""
    return sorted({*EXECUTORS, "local", *(point.name for point in entry_points(group=_GROUP))})


def _known() -> str:
    return ", ".join(repr(name) for name in _names())
