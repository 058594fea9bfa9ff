"""Callbacks that watch an executor: which handlers ran, in which order and on which thread, and whether any ran early.

A handler that other handlers depend on waits a moment before it returns, to give a wrong executor the time to make its
mistake: to start another handler too early, or to end the event too early. It waits on a condition, for at most
`Trace.patience` seconds. So a correct executor always passes, even on a slow machine, and takes that time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, Event
from flowtrain.callback.phases import Phase, TrainingPhase
from flowtrain.callback.resolution import Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.graph.executor import Executor, Resumable
from flowtrain.learner import Learner
from flowtrain.state.accelerator import accelerator, has_streams, on_stream
from flowtrain.state.encoding import Packer
from flowtrain.testing.tiny import tiny_learner

__all__ = [
    "KINDS",
    "TORCH_SETTINGS",
    "ContractBase",
    "DeferrableProbe",
    "Does",
    "Draws",
    "Looks",
    "Ping",
    "Probe",
    "Trace",
    "catching",
    "fails_beside",
    "messages",
    "raises",
    "torch_state",
    "waits",
]


class Ping(Event):
    """The event that the contract fires.

    Args:
        text: A text that tells one event from another.
    """

    def __init__(self, text: str = "") -> None:
        self.text = text


class Trace:
    """The record of the handlers of one test.

    Args:
        patience: The seconds for which a handler waits for a mistake of the executor.

    Attributes:
        started: The names of the probes whose handlers have started, in the order of their start.
        ended: The names of the probes whose handlers have returned or raised, in that order.
        wrong: A text for each mistake of the executor.
        threads: The thread of the last run of each handler, by the name of the probe.
        before: The probes that must have ended when a handler starts, by the name of its probe.
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
        """Forget the handlers that have run, but keep `before`."""
        with self._changed:
            self.started, self.ended, self.wrong = [], [], []

    def start(self, name: str) -> None:
        """Note that a handler starts."""
        with self._changed:
            # The check is made at the start, under the lock, so that no end can come between the start and the check.
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

    def complain(self, mistake: str) -> None:
        """Note another mistake of the executor, and wake the handlers that wait for one."""
        with self._changed:
            self.wrong.append(mistake)
            self._changed.notify_all()

    def running(self) -> list[str]:
        """Return the names of the probes whose handlers have started and not ended."""
        with self._changed:
            return sorted((Counter(self.started) - Counter(self.ended)).elements())  # a probe may run several times

    def wait(self, happened: Callable[[], bool]) -> None:
        """Wait until a function of this trace is true, at most for `patience`, as handlers need not run in parallel."""
        with self._changed:
            self._changed.wait_for(happened, self.patience)

    def wait_for_start(self, *names: str) -> None:
        """Wait until the handlers of these probes have started, at most for `patience`."""
        self.wait(lambda: all(name in self.started for name in names))


class Probe(Callback):
    """A callback whose handler calls a function of a test at every event.

    Args:
        trace: The trace in which the handler notes its start and end.
        does: The function; the handler calls it with the probe, the event and the view.
        access: The access that the callback declares.
        after: The types of callbacks that it runs after.
        answers: The resolution that it gives for every conflict.

    Attributes:
        phase: The phase of the last call of the handler.
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
        """Declare the access that the test gives."""
        return self.access

    def run_after(self) -> tuple[type[Callback], ...]:
        """Return the types that the test gives."""
        return self.after

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Return the resolution that the test gives."""
        return self.answers

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Note the phase and the start, call the function of the test, note the end."""
        self.phase = phase
        self.trace.start(self.name)
        try:
            if self.does is not None:
                self.does(self, event, learner)
        finally:
            self.trace.end(self.name)


Does: TypeAlias = Callable[[Probe, Event, LearnerView], None]

KINDS: Sequence[type[Probe]] = tuple(type(f"Probe{letter}", (Probe,), {}) for letter in "ABCDEFG")
"""Seven types of probes: a test needs several types, because ``run_after`` and conflicts are between types."""


class DeferrableProbe(Probe):
    """A probe that an executor may run later and elsewhere."""

    deferrable = True
    stochastic = False


class ContractBase:
    """The helpers of `flowtrain.testing.ExecutorContract`: they make a learner, and fire an event in several rounds."""

    patience: float = 0.02
    """Seconds that a handler waits for a mistake of the executor. More time finds more mistakes on a busy machine."""

    rounds: int = 3
    """How many times each test fires its event, because an executor may run the first events in another way."""

    def make_executor(self) -> Executor:
        """Return a new executor that belongs to no learner. A subclass must define this method."""
        raise NotImplementedError(f"{type(self).__name__} must define make_executor(): return a new executor.")

    @contextmanager
    def learner(self, *callbacks: Callback, executor: Executor | None = None) -> Generator[Learner]:
        """Give a context with a tiny learner that has only these callbacks, and a new executor by default."""
        chosen = self.make_executor() if executor is None else executor
        with tiny_learner(*callbacks, executor=chosen, n_batches=2, default_callbacks=False) as learner:
            yield learner

    def each_round(self) -> Iterator[str]:
        """Yield the name of each round for messages: ``"in round 1"``."""
        return (f"in round {number + 1}" for number in range(self.rounds))

    def ping(
        self,
        learner: Learner,
        trace: Trace,
        where: str,
        error: type[BaseException] | None = None,
        event: Ping | None = None,
    ) -> BaseException | None:
        """Clear the trace, fire an event, and check that no handler started too early or still runs.

        Args:
            learner: The learner.
            trace: The trace of its probes.
            where: The name of the round, for messages.
            error: The type of the exception that must be raised, or ``None``.
            event: The event to fire; a `Ping` without text by default.

        Returns:
            The exception that was raised, or ``None``.
        """
        trace.clear()
        raised: list[BaseException] = []
        # Without an expected error every exception passes through, and so fails the test that fires the event.
        with nullcontext(raised) if error is None else catching(error) as raised:
            learner.fire(event or Ping(), TrainingPhase())
        wrong, running = list(trace.wrong), trace.running()
        trace.complain("the event ended")  # wakes a handler that still waits, so that its thread can end
        assert not wrong, f"{where}: {'; '.join(wrong)}"
        assert not running, f"{where} the event ended while {running} had not returned"
        return raised[0] if raised else None

    def events(self, kind: type[Exception], at: type[Event], executor: Executor) -> list[str]:
        """Fit with three callbacks, one of which raises at an event; return the events of another one."""
        trace, events = Trace(self.patience), list[str]()

        def note(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Keep the name of the event."""
            events.append(type(event).__name__)

        probes = [KINDS[0](trace, note), KINDS[1](trace, raises(lambda: kind("here"), at)), KINDS[2](trace)]
        with self.learner(*probes, executor=executor) as learner, suppress(ValueError):  # `fit` raises this kind only
            learner.fit(1)
        return events

    def counts(self, events: int, saved: Mapping[str, Any] | None = None) -> Mapping[str, Any] | None:
        """Fire events at a deferrable callback; return the `state_dict` of the executor, which must be flushed then.

        Args:
            events: The number of events.
            saved: The state that the executor loads before the first event, or ``None``.

        Returns:
            The state, in tensors and plain values; ``None`` if the executor is not `Resumable`.
        """
        trace, executor = Trace(self.patience), self.make_executor()
        with self.learner(DeferrableProbe(trace, waits), executor=executor) as learner:
            if not isinstance(executor, Resumable):
                return None
            if saved is not None:
                executor.load_state_dict(saved)
            for _ in range(events):
                learner.fire(Ping(), TrainingPhase())
            # The state is copied as a checkpoint does it, which refuses all but tensors and plain values.
            state: Mapping[str, Any] = Packer().copy(executor.state_dict(), f"the executor {learner.executor.name!r}")
            done = len(trace.ended)
            assert done == events, f"state_dict() returned when {done} of {events} events were done"
            return state


def waits(probe: Probe, event: Event, learner: LearnerView) -> None:
    """Wait until the executor makes a mistake, at most for the patience of the trace."""
    probe.trace.wait(lambda: bool(probe.trace.wrong))


def raises(make: Callable[[], BaseException], at: type[Event] = Event, number: int = 1) -> Does:
    """Return a function for `Probe` that raises at the n-th event of a type and at all later ones.

    Args:
        make: Makes the exception.
        at: The type of the events.
        number: The number n, from 1.
    """
    seen: list[Event] = []

    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Count the events, and raise."""
        if isinstance(event, at):
            seen.append(event)
            if len(seen) >= number:
                failure = make()
                raise failure

    return fail


@contextmanager
def catching(kind: type[BaseException]) -> Generator[list[BaseException]]:
    """Give a context that must raise an exception of a type, and a list that has the exception after the context."""
    found: list[BaseException] = []
    try:
        yield found
    except kind as error:
        found.append(error)
    assert found, f"no {kind.__name__} was raised"


def messages(error: BaseException | None) -> list[str]:
    """Return the texts of an exception and of the exceptions that are attached to it."""
    return [] if error is None else [str(each) for each in (error, *getattr(error, "others", ()))]


class Draws(Callback):
    """Draws random numbers into an attribute, and reads or writes ``cbstate.total`` if it declares that.

    Args:
        access: The access to ``cbstate.total``, or an empty mapping.
    """

    def __init__(self, access: Mapping[str, Any]) -> None:
        self.access = access
        self.drawn: list[float] = []
        self.seen: list[float] = []

    def state_access(self) -> Mapping[str, Any]:
        """Declare a read of the loss, the random numbers, and the access that the test gives."""
        return {"batch.loss": Read(), "resource.rng": Write(), **self.access}

    def setup(self, learner: LearnerView) -> None:
        """Set the total to zero if this callback writes it."""
        if self.access.get("cbstate.total") == Write():
            learner.cbstate.total = 0.0

    @on(BatchEnd)
    def draw(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Draw a number, and read or write the total."""
        self.drawn.append(torch.rand(()).item())
        if self.access.get("cbstate.total") == Write():
            learner.cbstate.total += float(learner.batch.loss) + self.drawn[-1]
        elif self.access:
            self.seen.append(learner.cbstate.total)


def fails_beside(error: type[BaseException]) -> Does:
    """Return a function for `Probe` that raises after ProbeB and ProbeC have started."""

    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Wait for the other handlers, and raise."""
        probe.trace.wait_for_start("ProbeB", "ProbeC")
        raise error("at once")

    return fail


_MARK: ContextVar[str] = ContextVar("flowtrain.testing.mark", default="unset")


@contextmanager
def _setting(get: Callable[[], Any], put: Callable[[Any], object], value: object) -> Generator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


TORCH_SETTINGS: Sequence[Sequence[Callable[[], AbstractContextManager[object]]]] = (
    (),
    (
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: _setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        lambda: _setting(torch.get_num_threads, torch.set_num_threads, torch.get_num_threads() + 1),
        lambda: _setting(_MARK.get, _MARK.set, "set"),
        lambda: nullcontext() if (stream := _side_stream()) is None else on_stream(stream),
    ),
    (
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
        lambda: _setting(torch.get_num_threads, torch.set_num_threads, 1),
    ),
    (torch.inference_mode, torch.enable_grad),
)
"""Groups of contexts, each of which is entered as a whole; they set the settings that are separate for each thread."""


def torch_state() -> dict[str, object]:
    """Return the settings of torch and Python that are separate for each thread, as this thread has them."""
    made = torch.zeros(())  # its device and dtype are the default ones of this thread
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype of autocast": torch.get_autocast_dtype("cpu"),
        "cache of autocast": torch.is_autocast_cache_enabled(),
        "default device": made.device,
        "default dtype": made.dtype,
        "threads within an operation": torch.get_num_threads(),
        "context variable": _MARK.get(),
        "stream": None if accelerator() is None else torch.accelerator.current_stream(),
    }


class Looks(Callback):
    """A deferrable callback that notes the settings of torch and Python at each `Ping`."""

    deferrable = True
    stochastic = False

    def __init__(self) -> None:
        self._seen: list[dict[str, object]] = []

    @on(Ping, TrainingPhase, access={})
    def look(self, event: Ping, phase: Phase, learner: LearnerView) -> None:
        """Note the settings."""
        self._seen.append(torch_state())

    def as_in_place(self, wanted: dict[str, object]) -> dict[str, object]:
        """Return the settings of the last event, with the gradient mode and the stream of a handler in place."""
        seen = self._seen.pop()
        assert not seen["grad mode"], "a deferrable handler recorded gradients"
        return seen | {what: wanted[what] for what in ("grad mode", "stream")}


def _side_stream() -> torch.Stream | None:
    """Return a new stream of the accelerator, if there is one that has streams."""
    found = accelerator()
    return torch.Stream(found) if found is not None and has_streams(found) else None
