"""Callbacks that watch an executor: which handlers ran, when and on which thread, and whether one ran too early.

A handler that others must wait for waits itself, for a mistake of the executor: another handler that starts too early,
or an event that returns too early. It waits on a condition, for at most `Trace.patience` seconds. So a correct executor
always passes, however slow the machine is, and costs that time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, Event
from flowtrain.callback.phases import Phase, TrainingPhase
from flowtrain.callback.resolution import Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing.tiny import tiny_learner

__all__ = [
    "KINDS",
    "TORCH_SETTINGS",
    "ContractBase",
    "Does",
    "Draws",
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
    """The event that the contract fires; `text` tells one from another."""

    def __init__(self, text: str = "") -> None:
        self.text = text


class Trace:
    """The record of what the handlers of one test did.

    Args:
        patience: How many seconds a handler waits for a mistake.

    Attributes:
        started: The names of the probes whose handlers have started, in that order.
        ended: The names of those that have returned or raised, in that order.
        wrong: What happened too early, in words.
        threads: The thread of each handler's last run, by the probe's name.
        before: The probes that must have ended when a handler starts, by its name.
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

    def complain(self, mistake: str) -> None:
        """Note something else that happened too early."""
        with self._changed:
            self.wrong.append(mistake)
            self._changed.notify_all()

    def running(self) -> list[str]:
        """Return the names of the probes whose handlers have started and not ended."""
        with self._changed:
            return sorted((Counter(self.started) - Counter(self.ended)).elements())

    def wait(self, happened: Callable[[], bool]) -> None:
        """Wait until a function of this trace is true, at most for the patience: no executor must run in parallel."""
        with self._changed:
            self._changed.wait_for(happened, self.patience)

    def wait_for_start(self, *names: str) -> None:
        """Wait until the handlers of these probes have started."""
        self.wait(lambda: all(name in self.started for name in names))


class Probe(Callback):
    """A callback that does what a test says, at every event.

    Args:
        trace: Where it notes what it does.
        does: Called by the handler with the probe, the event and the view.
        access: What it declares.
        after: The types that it runs after.
        answers: What it answers to every conflict.

    Attributes:
        phase: The phase that its handler was called with the last time.
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

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Note the phase and the start, act, note the end."""
        self.phase = phase
        self.trace.start(self.name)
        try:
            if self.does is not None:
                self.does(self, event, learner)
        finally:
            self.trace.end(self.name)


Does: TypeAlias = Callable[[Probe, Event, LearnerView], None]

KINDS: Sequence[type[Probe]] = tuple(type(f"Probe{letter}", (Probe,), {}) for letter in "ABCDEFG")
"""Types of probes, because ``run_after`` names types."""


class ContractBase:
    """Making an executor and a learner, and firing an event in rounds, for `flowtrain.testing.ExecutorContract`."""

    patience: float = 0.02
    """Seconds that a handler waits for a mistake of the executor. More of it finds more on a busy machine."""

    rounds: int = 3
    """How many times each test fires its event; an executor may run the first ones in another way."""

    def make_executor(self) -> Executor:
        """Return a new executor, bound to nothing. The one thing that a subclass must define."""
        raise NotImplementedError(f"{type(self).__name__} must define make_executor(): return a new executor.")

    @contextmanager
    def learner(self, *callbacks: Callback, executor: Executor | None = None) -> Generator[Learner]:
        """Give a tiny learner with these callbacks and no others, on a new executor, and close it."""
        chosen = self.make_executor() if executor is None else executor
        with tiny_learner(*callbacks, executor=chosen, n_batches=2, default_callbacks=False) as learner:
            yield learner

    def each_round(self) -> Iterator[str]:
        """Yield what to call each round in a message."""
        return (f"in round {number + 1}" for number in range(self.rounds))

    def ping(
        self,
        learner: Learner,
        trace: Trace,
        where: str,
        error: type[BaseException] | None = None,
        event: Ping | None = None,
    ) -> BaseException | None:
        """Fire a `Ping` on a cleared trace; check that no handler started too early or still runs.

        Args:
            learner: The learner.
            trace: The trace of its probes.
            where: What to call the round in a message.
            error: The type of the exception that must be raised, and is returned; ``None`` for none.
            event: The event to fire.
        """
        trace.clear()
        raised: list[BaseException] = []
        with nullcontext(raised) if error is None else catching(error) as raised:
            learner.fire(event or Ping(), TrainingPhase())
        wrong, running = list(trace.wrong), trace.running()
        trace.complain("the event ended")  # a handler that still waits need not wait any longer
        assert not wrong, f"{where}: {'; '.join(wrong)}"
        assert not running, f"{where} the event ended while {running} had not returned"
        return raised[0] if raised else None


def waits(probe: Probe, event: Event, learner: LearnerView) -> None:
    """Give what must not happen the time to happen."""
    probe.trace.wait(lambda: bool(probe.trace.wrong))


def raises(make: Callable[[], BaseException], at: type[Event] = Event, number: int = 1) -> Does:
    """Return a handler that raises from the n-th event of a type on."""
    met: list[Event] = []

    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Count the events, and raise."""
        if isinstance(event, at):
            met.append(event)
            if len(met) >= number:
                raise make()

    return fail


@contextmanager
def catching(kind: type[BaseException]) -> Generator[list[BaseException]]:
    """Expect an exception of a type and give it, in a list, when it has come."""
    found: list[BaseException] = []
    try:
        yield found
    except kind as error:
        found.append(error)
    assert found, f"no {kind.__name__} was raised"


def messages(error: BaseException | None) -> list[str]:
    """Return what an exception says, and those attached to it; one of these may have others of its own."""
    if error is None:
        return []
    found = [str(error)]
    for other in getattr(error, "others", ()):
        found += messages(other)
    return found


class Draws(Callback):
    """Draws random numbers into an attribute, and keeps or adds to the total of all losses if it declares that."""

    def __init__(self, access: Mapping[str, Any]) -> None:
        self.access = access
        self.drawn: list[float] = []
        self.seen: list[float] = []

    def state_access(self) -> Mapping[str, Any]:
        """Declare the entry, what it is made of, and the random numbers."""
        return {"batch.loss": Read(), "resource.rng": Write(), **self.access}

    def setup(self, learner: LearnerView) -> None:
        """Begin at zero."""
        if self.access.get("cbstate.total") == Write():
            learner.cbstate.total = 0.0

    @on(BatchEnd)
    def draw(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Draw, and read or write the total."""
        self.drawn.append(torch.rand(()).item())
        if self.access.get("cbstate.total") == Write():
            learner.cbstate.total += float(learner.batch.loss) + self.drawn[-1]
        elif self.access:
            self.seen.append(learner.cbstate.total)


def fails_beside(error: type[BaseException]) -> Does:
    """Return a handler that raises when ProbeB and ProbeC have started too."""

    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Wait for the others, and raise."""
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
        lambda: torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext(),
    ),
    (
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
        lambda: _setting(torch.get_num_threads, torch.set_num_threads, 1),
    ),
    (torch.inference_mode, torch.enable_grad),
)
"""Contexts to enter together, which set what torch and Python keep for each thread."""


def torch_state() -> dict[str, object]:
    """Return what torch and Python keep for this thread."""
    made = torch.zeros(())
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
        "CUDA stream": torch.cuda.current_stream() if torch.cuda.is_available() else None,
    }
