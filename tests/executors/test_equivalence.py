"""Rules 13, 15 and 18 as properties: whatever is declared, raised and fired, dask comes to what serial comes to.

``python -m pytest --hypothesis-profile=long tests/executors/test_equivalence.py`` is the longer run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dask.threaded
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    Event,
    FlowtrainError,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    Resolution,
    SerialExecutor,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinySite, tiny_batches, tiny_learner
from flowtrain_dask import DaskExecutor
from flowtrain_dask.parallel.firing import Firing
from flowtrain_dask.parallel.task_graph import compile_plan
from tests.support.examples import examples

ENTRIES = ("cbstate.a", "cbstate.b", "cbstate.c")
RESOURCES = ("resource.rng", "resource.pyplot", "resource.file")
ERRORS = (None, ValueError, KeyError, CancelBatchException, CancelEpochException, CancelFittingException)


class Asked(Event):
    """What handlers fire; `depth` bounds how often they do it in answer to one."""

    def __init__(self, asker: str, depth: int) -> None:
        self.asker = asker
        self.depth = depth


@dataclass
class Spec:
    """What a callback declares, and what it does."""

    access: Mapping[str, Read | Write]
    after: frozenset[int]
    answers: bool
    raises: type[Exception] | None
    raises_at: int
    fires: int
    pause: float


class Random(Callback):
    """Reads and writes what it declares, so that every change of an order shows, and then does what `spec` says."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.calls = 0
        self.seen: list[Any] = []
        self.threads: set[int] = set()

    def state_access(self) -> Access:
        return self.spec.access

    def run_after(self) -> tuple[type[Callback], ...]:
        return tuple(KINDS[number] for number in self.spec.after)

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return NoConflict() if self.spec.answers else None

    def setup(self, learner: LearnerView) -> None:
        for path, kind in self.spec.access.items():
            if isinstance(kind, Write) and path in ENTRIES:
                setattr(learner.cbstate, path[-1], (type(self).__name__,))

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.calls += 1
        self.threads.add(threading.get_ident())
        self.seen.append(type(event).__name__)
        for path, kind in self.spec.access.items():
            if path == "resource.rng":
                self.seen.append(torch.rand(()).item())
            elif path in ENTRIES:
                value = getattr(learner.cbstate, path[-1])
                self.seen.append(value)
                if isinstance(kind, Write):
                    setattr(learner.cbstate, path[-1], (*value[-3:], type(self).__name__))
        if self.spec.pause:
            time.sleep(self.spec.pause)  # makes the strands interleave in other ways; nothing depends on it
        depth = event.depth if isinstance(event, Asked) else 0
        if depth < 2 and isinstance(event, (BatchBegin, Asked)):
            for number in range(self.spec.fires):
                learner.fire(Asked(f"{type(self).__name__}.{number}", depth + 1))
        if isinstance(event, Asked):
            self.seen.append((event.asker, event.depth))
        if self.spec.raises is not None and self.calls == self.spec.raises_at:
            raise self.spec.raises(type(self).__name__)


KINDS = [type(f"K{number}", (Random,), {}) for number in range(6)]


@st.composite
def specs(draw: st.DrawFn) -> list[Spec]:
    count = draw(st.integers(2, len(KINDS)))
    kinds: st.SearchStrategy[Read | Write] = st.sampled_from([Read(), Write(), Write()])
    raising = draw(st.booleans())
    found: list[Spec] = []
    for number in range(count):
        entries = draw(st.dictionaries(st.sampled_from(ENTRIES), kinds, max_size=2))
        resources = draw(st.sets(st.sampled_from(RESOURCES), max_size=1))
        found.append(
            Spec(
                access={**entries, **{path: Write() for path in sorted(resources)}},
                after=frozenset(draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else ()),
                answers=draw(st.sampled_from([True, True, True, False])),
                raises=draw(st.sampled_from(ERRORS)) if raising else None,
                raises_at=draw(st.integers(1, 12)),
                fires=draw(st.sampled_from([0, 0, 0, 1, 2])),
                pause=draw(st.sampled_from([0.0, 0.0, 1e-5, 3e-4])),
            )
        )
    return found


@dataclass
class Outcome:
    """Everything of a run that rule 13 names."""

    raised: tuple[Any, ...]
    stopped: tuple[Any, ...]
    state: dict[str, Any]
    callbacks: list[tuple[int, list[Any]]]
    coeff: float
    random: float
    threads: list[set[int]] = field(compare=False)


def described(error: BaseException | None) -> tuple[Any, ...]:
    if error is None:
        return ()
    others = getattr(error, "others", ())
    return type(error), str(error), tuple(getattr(error, "__notes__", ())), tuple(described(other) for other in others)


def run(found: Sequence[Spec], executor: Executor, order: Sequence[int]) -> Outcome | None:
    callbacks = [KINDS[number](found[number]) for number in order]
    torch.manual_seed(0)
    data = (tiny_batches(n_batches=2), tiny_batches(n_batches=1))
    try:
        learner = tiny_learner(*callbacks, data=data, default_callbacks=False, executor=executor)
    except FlowtrainError:
        return None
    raised: BaseException | None = None
    with learner:
        try:
            learner.fit(2)
        except Exception as error:  # compared
            raised = error
        return Outcome(
            described(raised),
            described(learner.stopped),
            {name: getattr(learner.cbstate, name) for name in learner.cbstate},
            [(callback.calls, callback.seen) for callback in callbacks],
            learner.model.coeff.item(),
            torch.rand(()).item(),
            [callback.threads for callback in callbacks],
        )


@settings(max_examples=examples(60))
@given(specs(), st.randoms(use_true_random=False), st.integers(2, 4), st.sampled_from(["always", "always", "auto"]))
def test_dask_does_what_serial_does(found: list[Spec], random: Any, workers: int, parallel: Any) -> None:
    order = list(range(len(found)))
    random.shuffle(order)
    serial = run(found, SerialExecutor(), order)
    assume(serial is not None)
    dask = run(found, DaskExecutor(workers=workers, parallel=parallel), order)
    assert dask == serial
    assert dask is not None
    here = threading.get_ident()
    for number, threads in zip(order, dask.threads, strict=True):
        assert "resource.rng" not in found[number].access or threads <= {here}


# --- one event, with the order of everything that happens in it


class Logs(Callback):
    def __init__(self, access: Access, after: Sequence[type[Callback]], act: Callable[[str], None]) -> None:
        self.access = access
        self.after = tuple(after)
        self.act = act

    def state_access(self) -> Access:
        return self.access

    def run_after(self) -> tuple[type[Callback], ...]:
        return self.after

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return NoConflict()

    @on(BatchEnd)
    def act_now(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act(self.name)


LOGGERS = [type(f"L{number}", (Logs,), {}) for number in range(10)]


@settings(max_examples=examples(240))
@given(st.data())
def test_no_handler_starts_before_those_that_it_waits_for_have_returned(data: st.DataObject) -> None:
    """On strands, and as tasks of the graph that dask runs by itself; with failures, resources and `NoConflict`."""
    count = data.draw(st.integers(2, len(LOGGERS)))
    failing = data.draw(st.sets(st.integers(0, count - 1), max_size=3))
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.0, 1e-5, 2e-4]), min_size=count, max_size=count))
    log: list[tuple[str, str]] = []
    lock = threading.Lock()

    def act_as(number: int) -> Callable[[str], None]:
        def act(name: str) -> None:
            with lock:
                log.append(("start", name))
            if pauses[number]:
                time.sleep(pauses[number])  # makes the strands interleave in other ways; nothing depends on it
            with lock:
                log.append(("end", name))
            if number in failing:
                raise ValueError(name)

        return act

    callbacks = []
    for number in range(count):
        paths = data.draw(st.sets(st.sampled_from(["batch.x", "batch.y", *RESOURCES]), max_size=1))
        after = data.draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set[int]()
        callbacks.append(
            LOGGERS[number]({path: Write() for path in paths}, [LOGGERS[each] for each in after], act_as(number))
        )
    plan = Callbacks(callbacks, LearnerState()).plan(BatchEnd, TrainingPhase)
    names = [step.node.name for step in plan.steps]

    def fire(executor: Executor) -> list[tuple[str, str]]:
        site = TinySite()
        executor.bind(site)
        executor.compile(plan)(BatchEnd(), TrainingPhase())
        executor.close()
        return [(name, str(failure)) for name, failure in site.failures]

    def fire_graph(workers: int) -> list[tuple[str, str]]:
        graph, firing = compile_plan(plan), Firing(plan, (0,) * count, 0, BatchEnd(), TrainingPhase())
        graph.cell.firing = firing
        dask.threaded.get(graph, list(graph), num_workers=workers)
        return [(step.node.name, str(failure)) for step, failure in firing.finish()]

    wanted, ran = fire(SerialExecutor()), {name for _, name in log}
    workers = data.draw(st.integers(2, 5))
    firings: list[Callable[[], list[tuple[str, str]]]] = [
        lambda: fire(DaskExecutor(workers=workers, parallel="always")),
        lambda: fire_graph(workers),
    ]
    for failures in firings:
        log.clear()
        assert failures() == wanted
        assert {name for _, name in log} == ran
        assert len(log) == 2 * len(ran)
        for position, name in enumerate(names):
            if name in ran:
                start = log.index(("start", name))
                for before in range(position):
                    if plan.ancestors[position] >> before & 1:
                        assert log.index(("end", names[before])) < start
