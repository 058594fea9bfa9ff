"""Callbacks that watch an executor: who ran, when, on which thread, and whether anybody ran too early.

A handler of a `Probe` that must be waited for waits itself, for what must not happen: another handler that starts too
early, or an event that returns too early. It waits on a condition, for at most `Trace.patience` seconds. So a correct
executor always passes, however slow the machine is, and costs that time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from flowtrain.callback.access import Access
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase, TrainingPhase
from flowtrain.callback.resolution import Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing.tiny import tiny_learner

__all__ = [
    "EVERYWHERE",
    "KINDS",
    "ContractBase",
    "Does",
    "Everywhere",
    "Make",
    "Ping",
    "Pinged",
    "Probe",
    "Trace",
    "catching",
    "raises",
    "raises_at",
    "waits",
    "with_others",
]

Does: TypeAlias = Callable[["Probe", Event, LearnerView], None]
Make: TypeAlias = Callable[[], BaseException]


class Ping(Event):
    """What the tests fire; `text` tells one from another."""

    def __init__(self, text: str = "") -> None:
        self.text = text


class Trace:
    """What the handlers of one test did.

    Args:
        patience: Seconds to wait for what must not happen.

    Attributes:
        started: The names of the probes whose handlers have started, in that order.
        ended: The names of those that have returned or raised, in that order.
        wrong: What happened too early, in words.
        threads: The thread of each handler's last run, by name.
        before: Who must have ended when a handler starts, by its name.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.started: list[str] = []
        self.ended: list[str] = []
        self.wrong: list[str] = []
        self.threads: dict[str, int] = {}
        self.before: Mapping[str, Collection[str]] = {}
        self._changed = threading.Condition()

    def clear(self) -> None:
        """Forget what was done; keep who must run before whom."""
        with self._changed:
            self.started, self.ended, self.wrong = [], [], []

    def start(self, name: str) -> None:
        """Note that a handler starts."""
        with self._changed:
            early = [other for other in self.before.get(name, ()) if other not in self.ended]
            if early:
                self.wrong.append(f"{name} started before {', '.join(early)} returned")
            self.started.append(name)
            self.threads[name] = threading.get_ident()
            self._changed.notify_all()

    def end(self, name: str) -> None:
        """Note that a handler returns or raises."""
        with self._changed:
            self.ended.append(name)
            self._changed.notify_all()

    def complain(self, what: str) -> None:
        """Note something else that happened too early."""
        with self._changed:
            self.wrong.append(what)
            self._changed.notify_all()

    def wait_for_wrong(self) -> None:
        """Give what must not happen the time to happen."""
        self._wait(lambda: bool(self.wrong))

    def wait_for_start(self, *names: str) -> None:
        """Wait until these have started too; an executor that runs one after the other does not do that."""
        self._wait(lambda: all(name in self.started for name in names))

    def wait_for_end(self, name: str) -> None:
        """Wait until another has ended; an executor that runs one after the other does not do that."""
        self._wait(lambda: name in self.ended)

    def _wait(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(happened, self.patience)

    def running(self) -> list[str]:
        """Return whose handlers have started and not ended."""
        with self._changed:
            return sorted((Counter(self.started) - Counter(self.ended)).elements())


class Probe(Callback):
    """A callback whose handler does what a test says; subclasses say at which events.

    Args:
        trace: Where it notes what it does.
        does: Called by the handler, with the probe, the event and the view.
        access: What it declares.
        after: The types that it runs after.
        answers: What it answers to every conflict.

    Attributes:
        phase: The phase that its handler was called with, the last time.
    """

    phase: Phase | None = None

    def __init__(
        self,
        trace: Trace,
        does: Does | None = None,
        *,
        access: Access | None = None,
        after: Sequence[type[Callback]] = (),
        answers: Resolution | None = None,
    ) -> None:
        self.trace = trace
        self.does = does
        self.access = {} if access is None else access
        self.after = tuple(after)
        self.answers = answers

    def state_access(self) -> Access:
        """Declare what the test says."""
        return self.access

    def run_after(self) -> tuple[type[Callback], ...]:
        """Run after whom the test says."""
        return self.after

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Answer what the test says."""
        return self.answers

    def do(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Note the phase and the start, act, note the end."""
        self.phase = phase
        self.trace.start(self.name)
        try:
            if self.does is not None:
                self.does(self, event, learner)
        finally:
            self.trace.end(self.name)


class Pinged(Probe):
    """A probe that handles `Ping`."""

    @on(Ping)
    def act(self, event: Ping, phase: Phase, learner: LearnerView) -> None:
        """Do what the test says."""
        self.do(event, phase, learner)


class Everywhere(Probe):
    """A probe that handles every event."""

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Do what the test says."""
        self.do(event, phase, learner)


KINDS: Sequence[type[Pinged]] = tuple(type(f"Probe{letter}", (Pinged,), {}) for letter in "ABCDEFGH")
"""Types of probes, because ``run_after`` names types."""


EVERYWHERE: Sequence[type[Everywhere]] = tuple(type(f"Every{letter}", (Everywhere,), {}) for letter in "ABCD")
"""Types of probes that handle every event."""


class ContractBase:
    """What the tests of an executor share. Subclass `flowtrain.testing.ExecutorContract`, which has them."""

    patience: float = 0.02
    """Seconds that a handler waits for what must not happen. More of it finds more on a busy machine."""

    rounds: int = 3
    """How many times each test fires its event; an executor may run the first ones in another way."""

    def make_executor(self) -> Executor:
        """Return a new executor, bound to nothing. The one thing that a subclass must define."""
        raise NotImplementedError(f"{type(self).__name__} must define make_executor(): return a new executor.")

    def trace(self) -> Trace:
        """Return a trace with this contract's patience."""
        return Trace(self.patience)

    @contextmanager
    def learner(self, *callbacks: Callback, executor: Executor | None = None, **kwargs: Any) -> Generator[Learner]:
        """Give a tiny learner with these callbacks and no others, on a new executor, and close it."""
        chosen = {"n_batches": 2, "default_callbacks": False, **kwargs}
        with tiny_learner(*callbacks, executor=executor or self.make_executor(), **chosen) as learner:
            yield learner

    def fire_in_rounds(self, learner: Learner, trace: Trace) -> Iterator[int]:
        """Fire `Ping`, and yield the number of the round when it has returned; check that nothing ran too early."""
        for number in range(self.rounds):
            trace.clear()
            learner.fire(Ping(), TrainingPhase())
            running = trace.running()
            assert not trace.wrong, f"in round {number + 1}: {'; '.join(trace.wrong)}"
            assert not running, f"in round {number + 1} the event ended while {running} had not returned"
            yield number


@contextmanager
def catching(kind: type[BaseException]) -> Generator[list[BaseException]]:
    """Expect an exception of a type and give it, in a list, when it has come."""
    found: list[BaseException] = []
    try:
        yield found
    except kind as error:
        found.append(error)
    assert found, f"no {kind.__name__} was raised"


def waits(probe: Probe, event: Event, learner: LearnerView) -> None:
    probe.trace.wait_for_wrong()


def raises(error: Exception) -> Does:
    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Raise an error like it."""
        raise type(error)(*error.args)

    return fail


def raises_at(at: type[Event], make: Make, batch: int = 1) -> Does:
    """Return a handler that raises once: at the n-th event of a type."""
    met: list[Event] = []

    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Count, and raise."""
        if isinstance(event, at):
            met.append(event)
            if len(met) == batch:
                raise make()

    return fail


def with_others(error: BaseException) -> list[BaseException]:
    """Return an exception and those attached to it; one of these may have others of its own."""
    found = [error]
    for other in getattr(error, "others", ()):
        found += with_others(other)
    return found
