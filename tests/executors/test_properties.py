"""Rules 12 to 18 as one property: random callbacks in a whole fit come to under dask what they come to serially.

Each example is a set of callbacks with random access, resources, ``run_after``, resolutions, durations, exceptions and
cancels, that handle random events, those of the loop among them, and fire some themselves; and a random sequence of
events in batches. Compared are what was raised, with all that is attached to it, who ran at which event, ``cbstate``,
what every handler saw, and the random numbers. And no handler starts before one that it waits for has returned.

The longer run is ``python -m pytest --hypothesis-profile=long tests/executors/test_properties.py``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import event as count
from hypothesis import strategies as st

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    EpochBegin,
    EpochEnd,
    Event,
    FitEnd,
    FlowtrainError,
    Learner,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    Resolution,
    RunFirst,
    SerialExecutor,
    Write,
    on,
)
from flowtrain.callback.phases import StepContext
from flowtrain.graph.executor import Executor
from flowtrain.testing import ShuffledExecutor, tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.examples import examples

pytestmark = pytest.mark.slow

ENTRIES = ("cbstate.a", "cbstate.b", "cbstate.c")
RESOURCES = ("resource.rng", "resource.pyplot", "resource.file")
PARALLEL = ("always", "always", "always", "auto")
ERRORS = (ValueError, KeyError, CancelBatchException, CancelEpochException, CancelFittingException)


class One(Event):
    """An event of a step."""


class Two(One):
    """A more special one: who handles `One` handles it too."""


class Asked(Event):
    """What handlers fire; `depth` bounds how often they do it in answer to one."""

    def __init__(self, asker: str, depth: int) -> None:
        self.asker = asker
        self.depth = depth


HANDLED = (One, Two, Asked, EpochBegin, BatchBegin, BatchEnd, BatchCancelled, EpochEnd, FitEnd)


class Firing(AbstractTrainingPhase):
    """A batch is a list of event types, fired one after the other."""

    def step(self, learner: StepContext, raw: Sequence[type[Event]]) -> None:
        with learner.run_batch(self):
            for event_type in raw:
                learner.fire(event_type(), self)


@dataclass(frozen=True)
class Spec:
    """What a callback declares, and what it does."""

    number: int
    handled: tuple[type[Event], ...]
    access: Mapping[str, Read | Write]
    after: frozenset[int]
    answers: Mapping[int, str]
    raises: type[Exception] | None
    raises_at: int
    fires: int
    pause: float


class Monitor:
    """What happened, in the order in which it did, over all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.learner: Learner | None = None
        self.running: set[str] = set()
        self.ran: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.log: dict[int, tuple[Event, Phase, list[tuple[str, str]]]] = {}
        self.early: list[str] = []
        self.elsewhere: set[str] = set()
        self.waits: dict[tuple[type[Event], type[Phase]], dict[str, set[str]]] = {}

    def start(self, name: str, event: Event, phase: Phase) -> None:
        with self.lock:
            early = self.running & self.before(name, event, phase)
            if early:
                self.early.append(f"{name} at {event!r} started while {sorted(early)} ran")
            self.running.add(name)
            self.ran[repr(event)][name] += 1
            self.log.setdefault(id(event), (event, phase, []))[2].append(("start", name))

    def end(self, name: str, event: Event) -> None:
        with self.lock:
            self.running.discard(name)
            self.log[id(event)][2].append(("end", name))

    def before(self, name: str, event: Event, phase: Phase) -> set[str]:
        """Who must not run when `name` starts: those with an edge to it, directly or over others."""
        assert self.learner is not None
        key = (type(event), type(phase))
        if key not in self.waits:
            plan = self.learner.callbacks.plan(*key)
            names = [planned.node.name for planned in plan.handlers]
            self.waits[key] = {
                name: {names[other] for other in range(position) if plan.ancestors[position] >> other & 1}
                for position, name in enumerate(names)
            }
        return self.waits[key][name]

    def check(self) -> None:
        """The log of each event that is fired once: who waits for whom."""
        assert not self.early, self.early
        assert not self.running
        for event, phase, entries in self.log.values():
            if isinstance(event, (One, Asked)):
                for place, (what, name) in enumerate(entries):
                    later = {other for kind, other in entries[place:] if kind == "end"}
                    assert what == "end" or not later & self.before(name, event, phase), entries


class Random(Callback):
    """Reads and writes what it declares, so that every change of an order shows, and then does what its spec says."""

    def __init__(self, spec: Spec, monitor: Monitor) -> None:
        self.spec = spec
        self.monitor = monitor
        self.calls = 0
        self.seen: list[Any] = []

    def state_access(self) -> Access:
        return self.spec.access

    def run_after(self) -> tuple[type[Callback], ...]:
        return tuple(KINDS[number] for number in self.spec.after)

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        assert isinstance(other, Random)
        answer = self.spec.answers.get(other.spec.number, "")
        if answer == "first":
            return RunFirst(self)
        return NoConflict() if answer == "either" else None

    def setup(self, learner: LearnerView) -> None:
        for path, kind in self.spec.access.items():
            if isinstance(kind, Write) and path in ENTRIES:
                setattr(learner.cbstate, path[-1], (self.spec.number,))

    def do(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.monitor.start(self.name, event, phase)
        try:
            self.act(event, learner)
        finally:
            self.monitor.end(self.name, event)

    def act(self, event: Event, learner: LearnerView) -> None:
        self.calls += 1
        self.seen.append((type(event).__name__, getattr(event, "asker", None)))
        if self.spec.pause:
            time.sleep(self.spec.pause)  # makes the strands interleave in other ways; nothing depends on it
        for path, kind in self.spec.access.items():
            if path == "resource.rng":
                self.seen.append(torch.rand(()).item())
                if threading.current_thread() is not threading.main_thread():
                    self.monitor.elsewhere.add(self.name)
            elif path in ENTRIES:
                value = getattr(learner.cbstate, path[-1])
                self.seen.append(value)
                if isinstance(kind, Write):
                    setattr(learner.cbstate, path[-1], (*value[-3:], self.spec.number))
        depth = event.depth if isinstance(event, Asked) else 0
        for number in range(self.spec.fires if depth < 2 else 0):
            learner.fire(Asked(f"{self.spec.number}.{number}", depth + 1))
        if self.calls == self.spec.raises_at and self.spec.raises is not None:
            raise self.spec.raises(f"{self.spec.number} at {event!r}")


KINDS: list[type[Random]] = [type(f"K{number}", (Random,), {}) for number in range(6)]


@cache
def kind_with(number: int, handled: tuple[type[Event], ...]) -> type[Random]:
    """The type of callback `number` that handles these events, each with a handler of its own."""
    made = type(f"K{number}On{''.join(each.__name__ for each in handled)}", (KINDS[number],), {})
    for event_type in handled:

        def handle(self: Random, event: Event, phase: Phase, learner: LearnerView) -> None:
            self.do(event, phase, learner)

        handle.__name__ = handle.__qualname__ = f"on_{event_type.__name__}"
        on(event_type, Phase, made)(handle)
    return made


@st.composite
def specs(draw: st.DrawFn) -> list[Spec]:
    number_of = draw(st.integers(2, len(KINDS)))
    raising = draw(st.sampled_from([0, 1, 2]))
    resolving = draw(st.sampled_from(["all"] * 7 + ["some"]))
    found: list[Spec] = []
    for number in range(number_of):
        access: dict[str, Read | Write] = draw(
            st.dictionaries(st.sampled_from(ENTRIES), st.sampled_from([Read(), Write()]), max_size=2)
        )
        resource = draw(st.sampled_from([None, None, *RESOURCES]))
        if resource is not None:
            access[resource] = Write()
        earlier = st.integers(0, number - 1) if number else st.nothing()
        answers = dict.fromkeys(range(number_of), "either")
        if resolving == "some":
            answers = draw(st.dictionaries(earlier, st.sampled_from(["first", "either"]), max_size=3)) if number else {}
        elif number and draw(st.booleans()):
            answers[draw(earlier)] = "first"
        found.append(
            Spec(
                number,
                tuple(draw(st.lists(st.sampled_from(HANDLED), min_size=1, max_size=4, unique=True))),
                access,
                frozenset(draw(st.sets(earlier, max_size=2)) if number else ()),
                answers,
                draw(st.sampled_from(ERRORS)) if raising and draw(st.integers(0, 2)) < raising else None,
                draw(st.integers(1, 3)),
                draw(st.sampled_from([0, 0, 0, 1, 2])),
                draw(st.sampled_from([0.0, 0.0, 0.0, 1e-6, 1e-4])),
            )
        )
    written = {path for spec in found for path, kind in spec.access.items() if isinstance(kind, Write)}
    return [
        replace(spec, access={path: spec.access[path] for path in spec.access if path in written}) for spec in found
    ]


batches = st.lists(st.lists(st.sampled_from([One, Two]), max_size=3), min_size=1, max_size=3)


def described(error: BaseException | None) -> tuple[Any, ...]:
    if error is None:
        return ()
    others = getattr(error, "others", ())
    return type(error), str(error), tuple(getattr(error, "__notes__", ())), tuple(described(other) for other in others)


def run(found: Sequence[Spec], events: Sequence[Any], executor: Executor) -> dict[str, Any] | None:
    """Fit, and return everything of it that rule 13 names; ``None`` if the callbacks are refused."""
    monitor = Monitor()
    callbacks = [kind_with(spec.number, spec.handled)(spec, monitor) for spec in found]
    torch.manual_seed(0)
    try:
        learner = tiny_learner(*callbacks, data={Firing(): events}, default_callbacks=False, executor=executor)
    except FlowtrainError:
        return None
    monitor.learner = learner
    raised: BaseException | None = None
    with learner:
        try:
            learner.fit(2)
        except Exception as error:  # compared
            raised = error
    monitor.check()
    assert not monitor.elsewhere
    return {
        "raised": described(raised),
        "stopped": described(learner.stopped),
        "ran": dict(monitor.ran),
        "cbstate": {name: getattr(learner.cbstate, name) for name in learner.cbstate},
        "callbacks": [(callback.calls, callback.seen) for callback in callbacks],
        "random": torch.rand(()).item(),
    }


def compare(found: list[Spec], events: list[list[type[Event]]], random: Any, make: Any) -> None:
    random.shuffle(found)
    serial = run(found, events, SerialExecutor())
    assume(serial is not None)
    assert serial is not None
    other = run(found, events, make())
    assert other is not None
    for what, value in serial.items():
        assert other[what] == value, what
    count(f"raised: {(serial['raised'] or serial['stopped'] or ('nothing',))[0]}")
    count(f"others: {len((serial['raised'] or serial['stopped'] or ((),))[-1])}")


patient = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@patient
@given(specs(), batches, st.randoms(use_true_random=False), st.integers(2, 5), st.sampled_from(PARALLEL))
def test_dask_comes_to_what_serial_comes_to(
    found: list[Spec], events: list[list[type[Event]]], random: Any, workers: int, parallel: Any
) -> None:
    """Rules 12 to 18, for dask."""
    compare(found, events, random, partial(DaskExecutor, workers=workers, parallel=parallel))


@settings(patient, max_examples=examples(100))
@given(specs(), batches, st.randoms(use_true_random=False), st.integers(0, 1000))
def test_every_legal_order_comes_to_what_serial_comes_to(
    found: list[Spec], events: list[list[type[Event]]], random: Any, seed: int
) -> None:
    """Rule 13 follows from the edges alone: what is declared decides, and not how an executor goes about it."""
    compare(found, events, random, partial(ShuffledExecutor, seed))
