"""The dask executor: what it runs and where, what it holds, what it says, and what bad input gets."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import pytest
import torch

from flowtrain import (
    Access,
    BackwardBegin,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    Event,
    ExecutorError,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    SerialExecutor,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import LogMetrics
from flowtrain.graph.executor import Executor
from flowtrain.graph.plan import Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.logging import JsonlBackend
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinySite, tiny_batches, tiny_learner
from flowtrain.testing.probes import messages
from flowtrain_dask import DaskExecutor, Parallel
from flowtrain_dask.parallel.task_graph import compile_plan
from flowtrain_dask.route import Route, assign_strands, why_serial
from tests.support.handlers import TIMEOUT, A, B, C, Does, nothing, own_threads


class Draws(Does):
    def state_access(self) -> Access:
        return {"resource.rng": Write()}


PARALLEL: list[Parallel] = ["never", "auto", "always"]


@pytest.fixture
def executor() -> Iterator[DaskExecutor]:
    made = DaskExecutor(workers=2, parallel="always")
    yield made
    made.close()


def runner_of(executor: Executor, site: TinySite, event: Event, *callbacks: Callback) -> Callable[[], None]:
    state = LearnerState()
    state.fired = site.fired
    executor.bind(site)
    run = executor.compile(Callbacks(callbacks, state).plan(type(event), TrainingPhase))
    return lambda: run(event, TrainingPhase())


# --- who runs, and where


def test_what_draws_random_numbers_runs_on_the_training_thread(executor: DaskExecutor) -> None:
    """Rule 6."""
    threads: dict[str, int] = {}
    meet = threading.Barrier(2, timeout=TIMEOUT)

    def note(name: str) -> Callable[[LearnerView], None]:
        def act(learner: LearnerView) -> None:
            threads[name] = threading.get_ident()
            meet.wait()

        return act

    runner_of(executor, TinySite(), BatchEnd(), A(note("A")), Draws(note("Draws")))()
    assert threads["Draws"] == threading.get_ident() != threads["A"]


@pytest.mark.parametrize(("event", "ran"), [(BatchEnd(), []), (FitEnd(), ["B", "C"])])
def test_what_depends_on_a_failure_runs_at_the_end_of_a_fit_only(
    executor: DaskExecutor, event: Event, ran: list[str]
) -> None:
    """Rules 15 and 17; at a batch's end B is on the strand of A, C on the other."""

    def fail(learner: LearnerView) -> None:
        raise ValueError

    noted: list[str] = []
    lock = threading.Lock()

    def note(name: str) -> Callable[[LearnerView], None]:
        def act(learner: LearnerView) -> None:
            with lock:
                noted.append(name)

        return act

    site = TinySite()
    runner_of(executor, site, event, A(fail), B(note("B"), (A,)), C(note("C"), (A,)))()
    assert sorted(noted) == ran
    assert [name for name, _ in site.failures] == ["A"]


@pytest.mark.parametrize(
    "made", [SerialExecutor, *(partial(DaskExecutor, workers=2, parallel=each) for each in PARALLEL)]
)
def test_an_interrupt_keeps_the_errors_before_it(made: Callable[[], Executor]) -> None:
    """Rule 15: an interrupt ends the event, and is raised with the errors of the handlers that failed before it."""
    failed = threading.Event()

    def fail(learner: LearnerView) -> None:
        try:
            raise ValueError("before")
        finally:
            failed.set()

    def interrupt(learner: LearnerView) -> None:
        assert failed.wait(TIMEOUT)
        raise KeyboardInterrupt("late")

    executor = made()
    run = runner_of(executor, TinySite(), BatchEnd(), A(fail), B(interrupt))
    for _ in range(3):  # under "auto" the first events run inline, and the later ones race
        failed.clear()
        with pytest.raises(KeyboardInterrupt, match="late") as caught:
            run()
        assert messages(caught.value) == ["late", "before"]
        assert "also raised: ValueError: before" in caught.value.__notes__
    executor.close()


# --- what a handler sees, rule 14


def test_handlers_of_validation_see_no_grad() -> None:
    grads: list[bool] = []

    class Looks(Callback):
        @on(BatchEnd)
        def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            grads.append(torch.is_grad_enabled())

    learner = tiny_learner(Looks(), Looks(), n_batches=2, executor=DaskExecutor(parallel="always", workers=2))
    with learner:
        learner.epoch(ValidationPhase)
        assert grads == [False] * 4
        grads.clear()
        learner.epoch(TrainingPhase)
        assert grads == [True] * 4


def test_a_handler_that_fires_through_the_learner_does_not_deadlock(executor: DaskExecutor) -> None:
    """While strands run, an event runs inline where it is fired: the pool has no thread left for it."""
    inner, site = list[str](), TinySite()
    nested = runner_of(executor, site, BatchBegin(), A(lambda _: inner.append("A")), B(lambda _: inner.append("B")))
    runner_of(executor, site, BatchEnd(), A(lambda _: nested()), B(nothing))()
    assert inner == ["A", "B"]


# --- threads come and go


def test_no_thread_before_it_is_needed_and_none_after_close() -> None:
    assert own_threads() == []
    learner = tiny_learner(A(nothing), B(nothing), executor=DaskExecutor(parallel="always", workers=3))
    assert own_threads() == []
    learner.fit(1)
    threads = own_threads()
    assert len(threads) in (1, 2)
    learner.close()
    assert not any(thread.is_alive() for thread in threads)


def test_a_dropped_learner_leaves_no_thread() -> None:
    learner = tiny_learner(A(nothing), B(nothing), executor=DaskExecutor(parallel="always", workers=2))
    learner.fit(1)
    threads = own_threads()
    assert len(threads) == 1
    del learner
    gc.collect()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("parallel", ["auto", "always", "never"])
def test_a_closed_executor_runs_nothing(parallel: Any) -> None:
    executor, site, ran = DaskExecutor(parallel=parallel, workers=2), TinySite(), list[str]()
    runner_of(executor, site, BatchEnd(), A(lambda _: ran.append("A")), B(nothing))
    executor.close()
    closed = "This DaskExecutor is closed: its threads have ended. Give the learner a new one."
    [last] = site.swapped
    with pytest.raises(ExecutorError, match=closed):
        last(BatchEnd(), TrainingPhase())
    with pytest.raises(ExecutorError, match=closed):
        tiny_learner(executor=executor)
    with pytest.raises(ExecutorError, match=closed):
        executor.graph(BatchEnd, TrainingPhase)
    assert ran == []
    executor.close()  # once more does nothing


def test_close_in_a_handler_is_an_error(executor: DaskExecutor) -> None:
    site = TinySite()
    runner_of(executor, site, BatchEnd(), A(lambda _: executor.close()), B(nothing))()
    [(_, error)] = site.failures
    assert str(error) == ("close() was called in a handler, whose own thread it would end. Call it after fit().")


# --- what it takes


def test_an_executor_belongs_to_one_learner(executor: DaskExecutor) -> None:
    tiny_learner(executor=executor)
    with pytest.raises(ExecutorError, match=r"belongs to another learner\. Give each learner its own\."):
        tiny_learner(executor=executor)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_workers_is_a_number_of_at_least_one(workers: Any) -> None:
    with pytest.raises(
        ExecutorError,
        match=rf"workers, of which the training thread is one, is a whole number, at least 1, got {workers!r}\.",
    ):
        DaskExecutor(workers=workers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parallel": "yes"}, r"parallel='yes' is none of 'auto', 'always', 'never'\."),
        ({"on_error": "rise"}, r"on_error='rise' is none of 'raise', 'warn'\. Did you mean 'raise'\?"),
        ({"on_cluster_loss": "here"}, r"on_cluster_loss='here' is none of 'local', 'raise'\."),
        ({"defer": "yes"}, r"DaskExecutor\(defer='yes'\): defer is 'auto', where cost .* 'always' or 'never'\."),
        ({"drain_timeout": 0}, r"DaskExecutor\(drain_timeout=0\): it is a positive number of seconds, such as 30.0"),
        ({"drain_timeout": float("inf")}, r"DaskExecutor\(drain_timeout=inf\): .* at most 604,800, a week"),
        ({"limits": 5}, r"DaskExecutor\(limits=5\) is no Limits\. Write DaskExecutor\(limits=Limits\(pending=1000\)\)"),
        ({"resources": {"gpu": 0}}, r"resources are positive numbers by name\..*dask worker ADDRESS --resources flow"),
    ],
)
def test_a_wrong_argument_names_the_right_ones(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        DaskExecutor(**arguments)


def test_it_is_an_executor_with_a_name() -> None:
    assert isinstance(DaskExecutor(), Executor)
    assert DaskExecutor.name == "dask"
    assert repr(DaskExecutor(workers=3)) == "DaskExecutor(workers=3, parallel='auto')"


def test_compile_needs_a_learner() -> None:
    plan = Callbacks([A(nothing)], LearnerState()).plan(BatchEnd, TrainingPhase)
    with pytest.raises(ExecutorError, match=r"DaskExecutor.compile\(\) was called before bind\(site\)\."):
        DaskExecutor().compile(plan)
    with pytest.raises(ExecutorError, match="has no learner yet"):
        DaskExecutor().graph(BatchEnd, TrainingPhase)


# --- what it says


def executor_of(learner: Learner) -> DaskExecutor:
    assert isinstance(learner.executor, DaskExecutor)
    return learner.executor


def test_the_graph_of_an_event_is_there_before_it_is_fired_and_follows_the_callbacks() -> None:
    learner = tiny_learner(A(nothing), default_callbacks=False, executor=DaskExecutor())
    executor = executor_of(learner)
    graph = executor.graph(BatchEnd, TrainingPhase)
    assert list(graph) == ["A.batch"]
    assert executor.graph(BatchEnd, TrainingPhase) is graph
    learner.add_callback(B(nothing, (A,)))
    assert {key: set(task.dependencies) for key, task in executor.graph(BatchEnd, TrainingPhase).items()} == {
        "A.batch": set(),
        "B.batch": {"A.batch"},
    }
    learner.set_callbacks([])
    with pytest.raises(ExecutorError, match=r"no graph for \(BatchEnd, TrainingPhase\): no callback has a handler"):
        executor.graph(BatchEnd, TrainingPhase)


@pytest.mark.parametrize(
    ("callbacks", "arguments", "said"),
    [
        ([A(nothing)], {}, "inline: one handler"),
        ([A(nothing), B(nothing, (A,))], {}, "inline: one chain"),
        ([A(nothing), B(nothing)], {"workers": 1}, "inline: one worker"),
        ([A(nothing), B(nothing)], {"parallel": "never"}, "inline: parallel='never'"),
        ([A(nothing), B(nothing)], {"workers": 2}, "parallel='auto': not fired yet"),
    ],
)
def test_it_says_why_before_anything_has_run(callbacks: list[Callback], arguments: dict[str, Any], said: str) -> None:
    learner = tiny_learner(*callbacks, default_callbacks=False, executor=DaskExecutor(**arguments))
    assert f"BatchEnd, TrainingPhase  [{said}]" in learner.callbacks.explain().splitlines()


def test_it_says_on_which_strands_what_runs() -> None:
    executor = DaskExecutor(parallel="always", workers=2)
    learner = tiny_learner(A(nothing), B(nothing), C(nothing, (A,)), default_callbacks=False, executor=executor)
    with learner:
        learner.fit(1)
        plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
        assert executor.explain(plan) == "parallel: parallel='always'; strands: A, C | B"


class Meets(Callback):
    """Waits for the other callback of its kind, where that runs at the same time; otherwise it sleeps."""

    meeting: ClassVar[threading.Barrier | None] = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.met = 0

    @on(BatchEnd, TrainingPhase)
    def meet(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        if Meets.meeting is None:
            time.sleep(0.005)
        else:
            Meets.meeting.wait(TIMEOUT)
            self.met += 1


def test_the_first_event_of_a_short_fit_is_parallel_where_the_process_has_measured_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a fit of one batch of another learner two handlers wait for each other, which inline would be for ever."""
    with tiny_learner(Meets("a"), Meets("b"), n_batches=60, executor=DaskExecutor(workers=2)) as learner:
        learner.fit(1)
        assert "parallel: in a race it took" in learner.callbacks.explain()
    monkeypatch.setattr(Meets, "meeting", threading.Barrier(2))
    meets = Meets("a"), Meets("b")
    with tiny_learner(*meets, n_batches=1, executor=DaskExecutor(workers=2)) as learner:
        learner.fit(1)
    assert [each.met for each in meets] == [1, 1]


def test_strict_mode_runs_inline_because_it_watches_the_whole_state() -> None:
    """In parallel it would find the writes of one handler behind another."""

    class Writes(Callback):
        def __init__(self, entry: str) -> None:
            self.entry = entry

        def state_access(self) -> Access:
            return {f"cbstate.{self.entry}": Write(), "batch.loss": Read()}

        def setup(self, learner: LearnerView) -> None:
            setattr(learner.cbstate, self.entry, 0.0)

        @on(BatchEnd, TrainingPhase)
        def add(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            value = getattr(learner.cbstate, self.entry)
            setattr(learner.cbstate, self.entry, value + float(learner.batch.loss))

    executor = DaskExecutor(parallel="always", workers=2)
    learner = tiny_learner(Writes("one"), Writes("two"), strict=True, executor=executor)
    with learner:
        learner.fit(1)
        assert learner.cbstate.one == learner.cbstate.two > 0
        plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
        assert executor.explain(plan) == "inline: strict mode looks at the whole state around each handler"


def test_changed_callbacks_get_plans_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decided for the old plan is not put in place of the new one."""
    for name in ("_LEAST_HOLD", "HOLD_FACTOR"):  # plans are timed again at every `flush`
        monkeypatch.setattr(f"flowtrain_dask.parallel.decision.{name}", 0.0)
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[[LearnerView], None]:
        def act(learner: LearnerView) -> None:
            counts[name] = counts.get(name, 0) + 1

        return act

    learner = tiny_learner(A(count("A")), B(count("B")), n_batches=3, executor=DaskExecutor(workers=2))
    with learner:
        learner.fit(1)
        learner.epoch(TrainingPhase)
        learner.add_callback(C(count("C")))
        learner.flush()
        learner.fit(1)
    # A fit has 3 batches of training, 3 of validation, and one end; a batch begins and ends.
    assert counts == {"A": 32, "B": 32, "C": 13}


def test_a_serial_and_a_dask_learner_come_to_the_same_bits() -> None:
    """Rule 13 for the default callbacks."""

    def run(executor: Executor) -> tuple[bytes, list[tuple[Any, ...]]]:
        with tiny_learner(executor=executor, data=(tiny_batches(), tiny_batches(n_batches=3))) as learner:
            learner.fit(3)
            series = learner.cbstate.metrics_step[TrainingPhase]["Loss"]
            return learner.model.coeff.detach().numpy().tobytes(), list(series)

    serial = run(SerialExecutor())
    for parallel in ("auto", "always", "never"):
        assert run(DaskExecutor(parallel=parallel, workers=2)) == serial


@pytest.mark.parametrize("parallel", ["auto", "always"])
def test_a_cancelled_batch_is_freed_at_once(parallel: Parallel) -> None:
    """No list in a frame of the exception may hold the exception: the batch, graph and all, would live on."""
    losses: list[weakref.ref[torch.Tensor]] = []

    class Cancels(Callback):
        def state_access(self) -> Access:
            return {"batch.loss": Read()}

        @on(BackwardBegin)
        def cancel(self, event: BackwardBegin, phase: Phase, learner: LearnerView) -> None:
            losses.append(weakref.ref(learner.batch.loss))
            raise CancelBatchException

    gc.disable()
    try:
        with tiny_learner(Cancels(), executor=DaskExecutor(workers=2, parallel=parallel), n_batches=4) as learner:
            learner.fit(1)
            assert [loss() for loss in losses] == [None] * 4
    finally:
        gc.enable()


def test_without_distributed_a_cluster_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads do without it."""
    monkeypatch.delitem(sys.modules, "flowtrain_dask.cluster.connect", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not installed
    backend = JsonlBackend("nowhere.jsonl")
    with pytest.raises(ExecutorError, match=r"DaskExecutor\('local'\) needs distributed, .*'flowtrain\[dask\]'"):
        tiny_learner(LogMetrics(backend), executor=DaskExecutor("local"))
    tiny_learner(LogMetrics(backend), executor=DaskExecutor()).close()


# --- how a plan is run, and the line that says why


class Own(Callback):
    """Writes an entry of its own, or reads the one of another."""

    def __init__(self, name: str, reads: str = "") -> None:
        self.name = name
        self.reads = reads

    def state_access(self) -> Access:
        return {f"cbstate.{self.reads}": Read()} if self.reads else {f"cbstate.{self.name}": Write()}

    def setup(self, learner: LearnerView) -> None:
        if not self.reads:
            setattr(learner.cbstate, self.name, 0)

    @on(BatchEnd, TrainingPhase)
    def act(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None: ...


def planned(*callbacks: Callback, strict: bool = False, end: bool = False) -> Plan:
    learner = tiny_learner(*callbacks, default_callbacks=False, strict=strict)
    return learner.callbacks.plan(FitEnd, Phase) if end else learner.callbacks.plan(BatchEnd, TrainingPhase)


def two() -> tuple[Own, Own]:
    return Own("a"), Own("b")


@pytest.mark.parametrize(
    ("plan", "home", "workers", "parallel", "why"),
    [
        (planned(Own("a")), (), 2, "always", "one handler"),
        (planned(Own("a"), Own("b", reads="a")), (), 2, "always", "one chain"),
        (planned(*two(), end=True), (), 2, "always", "every handler runs, even after an interrupt"),
        (planned(*two()), (0, 1), 2, "always", "no handler may leave the training thread"),
        (planned(*two(), strict=True), (), 2, "always", "strict mode looks at the whole state around each handler"),
        (planned(*two()), (), 1, "always", "one worker"),
        (planned(*two()), (), 2, "never", "parallel='never'"),
        (planned(*two()), (0,), 2, "auto", ""),
    ],
)
def test_why_a_plan_is_run_serially(
    plan: Plan, home: tuple[int, ...], workers: int, parallel: Literal["auto", "always", "never"], why: str
) -> None:
    assert why_serial(plan, frozenset(home), workers, parallel) == why


def test_handlers_at_home_are_on_the_first_strand_and_the_line_names_all() -> None:
    plan = planned(Own("a"), Own("b"), Own("c", reads="a"))
    strands = assign_strands(compile_plan(plan), 2, frozenset({1}), [1.0, 1.0, 1.0])
    assert 1 in strands.strands[0]
    route = Route(plan, compile_plan(plan), lambda event, phase: None, "parallel='always'", strands)
    assert route.explain() == "parallel: parallel='always'; strands: b | a, c"
    assert Route(plan, route.graph, route.runner, "one worker").explain() == "inline: one worker"
