"""assert_equivalent: every allowed way to run a learner has the same result.

The serial run is the reference. Other executors must have its result bit for bit (rule 13 of ``docs/rules.md``), and so
must random legal orders of the handlers (`flowtrain.testing.ShuffledExecutor`). These orders find undeclared access:
two handlers without an edge between them run in both orders, in this thread, and under a seed.

One kind of undeclared access has the same result in every order: two handlers that each add to one number. They lose an
addition only when they run at the same time. ``Learner(strict=True)`` finds such writes.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.diagnostics.scratch_learner import same_rng
from flowtrain.errors import ExecutorError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.graph.executor import Executor, Runner, Site, find_executor
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Failed, Plan
from flowtrain.graph.serial import SerialExecutor
from flowtrain.learner import Learner
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing.values import Leaf, learner_leaves, outcome_leaves, rng_leaves, show_difference

__all__ = ["ShuffledExecutor", "assert_equivalent"]

_MakeExecutor: TypeAlias = Callable[[], Executor]
_Result: TypeAlias = dict[str, Leaf]

_CLOSED = "This ShuffledExecutor is closed. Give the learner a new one."


def assert_equivalent(
    make_learner: Callable[[Executor], Learner],
    *,
    executors: Iterable[str | _MakeExecutor] = (),
    epochs: int = 2,
    run: Callable[[Learner], object] | None = None,
    interleavings: int = 8,
    seed: int = 0,
    ignore: Sequence[str] = (),
) -> None:
    """Assert that a learner has the serial result under other executors, and in other legal orders.

    The result consists of parameters, buffers, the state of optimizers, the last batch, ``cbstate``, the attributes of
    callbacks and all objects in them (such as the records that a backend keeps), the random number generators, and the
    exception that was raised. Results are compared bit for bit, after `Learner.flush`.

    Args:
        make_learner: A function of an executor that makes a learner with it, and a new model, new data and new
            callbacks. The random number generators have the same state at each call.
        executors: Names, or functions and types that make an executor: ``["dask", partial(DaskExecutor, workers=4)]``.
        epochs: The number of epochs to fit.
        run: A function of the learner to call instead of a fit, such as two fits with a change of callbacks in between.
        interleavings: The number of random legal orders to run.
        seed: The seed of the random number generators.
        ignore: Paths, as the message shows them. These and all paths below them are not compared, since they depend on
            a clock, for example.

    Raises:
        AssertionError: A result differs. The message names the first path that differs, both values, and the executor.
        UsageError: `make_learner` does not use the executor, or returns an object that it has returned before.
        Exception: The exception that the serial run has raised, after all other runs have raised the same.

    >>> from flowtrain.testing import tiny_learner
    >>> assert_equivalent(lambda executor: tiny_learner(executor=executor), executors=["serial"])
    """
    used: list[Any] = []

    def fit(learner: Learner) -> None:
        """Fit for the number of epochs."""
        learner.fit(epochs)

    if is_a(executors, str):
        raise UsageError(f"assert_equivalent(executors={executors!r}): write executors=[{executors!r}].")
    do = fit if run is None else run
    serial, error = _run(make_learner, SerialExecutor(), do, seed, used)
    ways = [*(_maker(each) for each in executors), *(_shuffled(number) for number in range(interleavings))]
    for make in ways:
        executor = make()
        result, _ = _run(make_learner, executor, do, seed, used)
        differing = [path for path in _paths(serial, result) if serial.get(path) != result.get(path)]
        differing = [path for path in differing if not _below(path, ignore)]
        assert not differing, _message(executor, differing, serial, result)
    if error is not None:
        raise error


def _run(
    make_learner: Callable[[Executor], Learner],
    executor: Executor,
    do: Callable[[Learner], object],
    seed: int,
    used: list[Any],
) -> tuple[_Result, Exception | None]:
    """Make a learner and run it; return the result, and the exception that was raised."""
    raised: Exception | None = None
    with _random_from(seed), warnings.catch_warnings():
        # Every run writes to the files of the run before it, if the learner keeps files.
        warnings.filterwarnings("ignore", ".* of another run", UserWarning)
        learner = make_learner(executor)
        _check(learner, executor, used)
        with learner:
            try:
                do(learner)
                learner.flush()
            except Exception as error:  # a part of the result, which `assert_equivalent` raises at its end
                raised = error
            found = dict(learner_leaves(learner))
        found.update(outcome_leaves("raised by fit", raised))
        found.update(outcome_leaves("learner.stopped", learner.stopped))
        found.update(rng_leaves())
    return found, raised


def _check(learner: Learner, executor: Executor, used: list[Any]) -> None:
    """Check the result of ``make_learner``, and add its objects to `used`.

    Raises:
        UsageError: It is no learner, has another executor, or has an object that is in `used`.
    """
    if not is_a(learner, Learner):
        raise UsageError(f"make_learner(executor) returns a Learner, got {learner!r}.")
    if learner.executor is not executor:
        raise UsageError(
            f"make_learner(executor) made a learner that runs on {learner.executor!r}. "
            f"Pass on what it is called with: Learner(..., executor=executor)."
        )
    made = [learner, learner.state.model]  # callbacks are not checked here: a learner refuses those of another one
    for each in made:
        if any(each is other for other in used):
            raise UsageError(
                f"make_learner() has used this {type(each).__name__} before, and it remembers the run before. "
                f"Make the model, the data and every callback inside of make_learner."
            )
    used += made  # the list keeps the objects alive, so that a new object never has the `id` of an earlier one


@contextmanager
def _random_from(seed: int) -> Generator[None]:
    """Seed the random number generators for the context, and restore them after it."""
    numpy: Any = sys.modules.get("numpy")
    with same_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        yield


def _maker(executor: str | _MakeExecutor) -> _MakeExecutor:
    """Return a function that makes an executor.

    Raises:
        UsageError: `executor` is an executor itself, which only one learner could use.
    """
    if isinstance(executor, str):
        return lambda: find_executor(executor)
    if isinstance(executor, Executor) and not isinstance(executor, type):
        raise UsageError(
            f"executors=[{executor!r}]: an executor belongs to one learner. Pass what makes one: its name, its type, "
            f"or functools.partial({type(executor).__name__}, ...)."
        )
    return executor


def _shuffled(seed: int) -> _MakeExecutor:
    return lambda: ShuffledExecutor(seed)


def _paths(one: _Result, other: _Result) -> list[str]:
    """Return the paths of two results without doubles, in their order."""
    return list(dict.fromkeys([*one, *other]))


def _below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith((f"{root}.", f"{root}[")) for root in roots)


def _message(executor: Executor, differing: list[str], serial: _Result, result: _Result) -> str:
    first = differing[0]
    wanted, found = show_difference(serial.get(first), result.get(first))
    more = f"\n{len(differing) - 1} more paths differ, the next is {differing[1]}." if differing[1:] else ""
    if isinstance(executor, ShuffledExecutor):
        why = (
            "The order that was run keeps every edge of the plan. So two callbacks touch this, or something that it "
            "is made of, and one of them does not declare it. Learner(strict=True) names who writes without saying so."
        )
    else:
        why = (
            "If random legal orders (interleavings=...) have the serial result, the executor breaks a rule: "
            "flowtrain.testing.ExecutorContract says which."
        )
    return f"{first} differs from the serial run:\n  serial: {wanted}\n  {executor!r}: {found}{more}\n{why}"


class ShuffledExecutor:
    """Runs the handlers of each event in a random order that the edges allow, on the training thread.

    If callbacks declare all their access, every such order has the same result. An undeclared access shows as a
    different result, without threads, and with the same seed every time.

    Args:
        seed: The seed of the orders. With 0 the order is not random: of the handlers that may run, the last one in
            serial order runs first.
    """

    name = "shuffled"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self._site: Site | None = None
        self._plans: dict[tuple[type[Event], type[Phase]], Plan] = {}
        self._closed = False

    def bind(self, site: Site) -> None:
        """Belong to the learner of this site from now on.

        Raises:
            ExecutorError: The executor belongs to another learner, or is closed.
        """
        if self._closed:
            raise ExecutorError(_CLOSED)
        if self._site is not None and self._site is not site:
            raise ExecutorError("This ShuffledExecutor belongs to another learner. Give each learner its own.")
        self._site = site

    def check(self, nodes: Sequence[Node], state: LearnerState) -> None:
        """Accept any callbacks."""

    def compile(self, plan: Plan) -> Runner:
        """Return the runner of a plan, which chooses another order at each event.

        Raises:
            ExecutorError: The executor is closed, or does not belong to a learner yet.
        """
        site = self._site
        if self._closed or site is None:
            why = _CLOSED if self._closed else "ShuffledExecutor.compile() before bind(); Learner(executor=...) binds."
            raise ExecutorError(why)
        self._plans[plan.event_type, plan.phase_type] = plan
        rank = {planned.node.name: position for position, planned in enumerate(plan.handlers)}

        def run(event: Event, phase: Phase) -> None:
            """Call the handlers, then sort the fired events and requests in serial order and pass them on."""
            start = len(site.fired)  # the events before this index were fired by handlers of an earlier event
            failures = self._run(plan, event, phase)
            site.fired[start:] = sorted(site.fired[start:], key=lambda one: rank.get(one[0], -1))
            site.requests.sort(key=lambda one: rank.get(one[0], -1))
            if failures:
                site.fail(plan, event, phase, failures)
            if site.fired or site.requests:
                site.drain(phase)

        return run

    def _run(self, plan: Plan, event: Event, phase: Phase) -> Sequence[Failed]:
        """Call every handler that depends on no failed one; return the failures in serial order."""
        # At `FitEnd` every handler runs, even after an interrupt; elsewhere an interrupt ends the event at once.
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
            planned = plan.handlers[position]
            try:
                planned.call(event, phase, planned.view)
            except caught as failure:
                failures[position] = failure
                lost |= 1 << position
        return [(plan.handlers[position], failure) for position, failure in sorted(failures.items())]

    def explain(self, plan: Plan) -> str:
        """Return a line that says how the order is chosen."""
        return f"in any order that the edges allow, seed {self.seed}"

    def flush(self) -> None:
        """Return at once, because this executor defers no handler."""

    def close(self) -> None:
        """Let every further event raise `ExecutorError`."""
        self._closed = True
        for plan in self._plans.values():
            if self._site is not None:
                self._site.swap(plan, _refuse)
        self._plans.clear()

    def __repr__(self) -> str:
        return f"ShuffledExecutor(seed={self.seed})"


def _refuse(event: Event, phase: Phase) -> None:
    raise ExecutorError(_CLOSED)
