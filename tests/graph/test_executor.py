"""The serial executor (rules 15 and 17), how executors are found by name, and the mailbox of the training thread."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    Event,
    Executor,
    ExecutorError,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    SerialExecutor,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.graph.executor import EXECUTORS, Mailbox, Resumable, find_executor
from flowtrain.graph.plan import Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinySite, tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.examples import examples
from tests.support.interrupts import interrupted
from tests.support.untyped import untyped


class Fails(Callback):
    """Notes that it ran, then raises the exception that the test gives, if any."""

    def __init__(self, ran: list[str], error: Exception | None = None, after: Sequence[type[Callback]] = ()) -> None:
        self.ran = ran
        self.error = error
        self.after = tuple(after)

    def run_after(self) -> tuple[type[Callback], ...]:
        return self.after

    @on(BatchEnd)
    def batch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act()

    @on(FitEnd)
    def end(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act()

    def act(self) -> None:
        self.ran.append(self.name)
        if self.error is not None:
            raise self.error


KINDS = [type(f"K{number}", (Fails,), {}) for number in range(8)]


def run(event: Event, *callbacks: Callback) -> TinySite:
    site, executor = TinySite(), SerialExecutor()
    executor.bind(site)
    executor.compile(Callbacks(callbacks, LearnerState()).plan(type(event), TrainingPhase))(event, TrainingPhase())
    return site


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[set[int]], list[int]]:
    """Draw for each callback which others it runs after, in a list that is not in serial order, and which fail."""
    count = draw(st.integers(1, len(KINDS)))
    ranks = draw(st.permutations(range(count)))
    waits = [
        {other for other in draw(st.sets(st.sampled_from(range(count)), max_size=3)) if ranks[other] < ranks[number]}
        for number in range(count)
    ]
    return waits, draw(st.lists(st.sampled_from(range(count)), unique=True))


def failed_above(waits: list[set[int]], failing: list[int]) -> set[int]:
    """Return the callbacks with a failed ancestor, by the definition: a predecessor failed or has one itself."""
    found: set[int] = set()
    while True:
        new = {n for n, before in enumerate(waits) if n not in found and before & (found | set(failing))}
        if not new:
            return found
        found |= new


@settings(max_examples=examples(200))
@given(dags())
def test_exactly_those_without_a_failed_ancestor_run(dag: tuple[list[set[int]], list[int]]) -> None:
    """Rule 15, for any dependencies and any failures."""
    waits, failing = dag
    ran: list[str] = []
    callbacks = [
        KINDS[number](ran, ValueError(str(number)) if number in failing else None, [KINDS[other] for other in before])
        for number, before in enumerate(waits)
    ]
    order = [each.node.position for each in Callbacks(callbacks, LearnerState()).plan(BatchEnd, TrainingPhase).handlers]
    site = run(BatchEnd(), *callbacks)
    lost = failed_above(waits, failing)
    assert ran == [f"K{number}" for number in order if number not in lost]
    reported = [number for number in order if number in failing and number not in lost]
    assert site.failures == [(f"K{number}", callbacks[number].error) for number in reported]
    ran.clear()
    run(FitEnd(), *callbacks)
    assert ran == [f"K{number}" for number in order]  # rule 17: every handler of FitEnd runs


def test_resources_and_no_conflict_are_dependencies_too() -> None:
    """Rule 15 counts every edge of the plan, also those between callbacks that only must not run at the same time."""

    class Draws(Fails):
        def state_access(self) -> Access:
            return {"resource.rng": Write()}

    ran: list[str] = []
    site = run(BatchEnd(), Draws(ran, ValueError()), Fails(ran), Draws(ran))
    assert ran == ["Draws", "Fails"]
    assert [name for name, _ in site.failures] == ["Draws"]


def test_two_steps_with_one_function() -> None:
    """The executor knows which of two steps failed, even if both call the same function."""
    ran: list[str] = []

    class Shares(Fails):
        def __init__(self, ran: list[str], shared: Any) -> None:
            super().__init__(ran)
            self.batch = shared  # type: ignore[method-assign]  # found on the instance, before the method

    def shared(event: Event, phase: Phase, learner: LearnerView) -> None:
        ran.append("shared")
        if len(ran) == 2:
            raise ValueError("second")

    site = run(BatchEnd(), Shares(ran, shared), Shares(ran, shared), Shares(ran, shared))
    assert ran == ["shared"] * 3
    assert [name for name, _ in site.failures] == ["Shares#2"]


def test_what_handlers_fired_is_drained_once_after_the_event() -> None:
    site = TinySite()

    class Fires(Fails):
        def batch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            site.fired.append((self.name, event))

    executor = SerialExecutor()
    executor.bind(site)
    ran: list[str] = []
    runner = executor.compile(Callbacks([Fires(ran), Fires(ran)], LearnerState()).plan(BatchEnd, TrainingPhase))
    runner(BatchEnd(), TrainingPhase())
    runner = executor.compile(Callbacks([Fails(ran)], LearnerState()).plan(BatchEnd, TrainingPhase))
    runner(BatchEnd(), TrainingPhase())
    assert len(site.drained) == 1


def test_an_interrupt_is_no_failure_of_a_handler() -> None:
    ran: list[str] = []

    class Interrupted(Fails):
        def batch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(BatchEnd(), Interrupted(ran), Fails(ran))
    assert ran == []


# --- the exception that a learner raises


def learner(*callbacks: Callback) -> Learner:
    data = [(torch.ones(2, 1), torch.ones(2, 1))]
    return Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, data=data, callbacks=callbacks,
                   default_callbacks=False)  # fmt: skip


ERRORS = (ValueError("a"), KeyError("b"), CancelFittingException("c"), CancelEpochException("d"),
          CancelBatchException("e"))  # fmt: skip


def rank(error: Exception) -> int:
    """The order of rule 15, written out."""
    cancels = (CancelFittingException, CancelEpochException, CancelBatchException)
    return 1 + cancels.index(type(error)) if isinstance(error, cancels) else 0


@settings(max_examples=examples(40))
@given(st.lists(st.sampled_from(ERRORS), min_size=1, max_size=4, unique_by=str))
def test_errors_before_cancels_and_the_others_attached(errors: list[Exception]) -> None:
    """Rule 15: errors before cancels, Fitting before Epoch before Batch, then serial order; the rest in `.others`."""
    fresh = [type(error)(*error.args) for error in errors]
    ran: list[str] = []
    taught = learner(*(KINDS[number](ran, error) for number, error in enumerate(fresh)))
    caught: BaseException | None = None
    with taught.run_batch(TrainingPhase()):
        try:
            taught.fire(BatchEnd(), TrainingPhase())
        except Exception as error:
            caught = error
        for callback in taught.callbacks:
            assert isinstance(callback, Fails)
            callback.error = None  # the cancelled batch fires BatchEnd again
    open_scope = [error for error in fresh if not isinstance(error, CancelEpochException)]
    if not open_scope:
        assert caught is None  # rule 16: a cancel of an epoch that is not open has no effect
        return
    worst = min(open_scope, key=lambda error: (rank(error), open_scope.index(error)))
    assert caught is worst
    others = sorted((error for error in open_scope if error is not worst), key=rank)
    assert list(getattr(worst, "others", ())) == others
    assert worst.__notes__[1:] == [f"also raised: {type(error).__name__}: {error}" for error in others]
    assert ran[: len(fresh)] == [f"K{number}" for number in range(len(fresh))]


def test_every_exception_says_where_it_was_raised() -> None:
    """Rule 15: the note names callback, handler, event, phase, epoch and batch."""
    error = ValueError("broken")
    taught = learner(Fails([], error))
    with pytest.raises(ValueError, match=r"^broken"):
        taught.fit(1)
    assert error.__notes__[0] == "raised in Fails.batch at (BatchEnd, TrainingPhase), epoch 1, batch 1"


def test_fit_end_runs_for_everybody_whatever_failed() -> None:
    """Rule 17: also callbacks that depend on one that failed there; the first error is raised, others are attached."""
    ran: list[str] = []
    first, last = KINDS[0](ran, ValueError("first")), KINDS[1](ran, None, [KINDS[0]])
    with pytest.raises(ValueError, match="first"):
        learner(first, last).fit(1)
    assert ran == ["K0", "K0", "K1"]  # at BatchEnd only K0 runs, at FitEnd both run


def test_fit_end_runs_for_everybody_also_through_an_interrupt() -> None:
    """Rules 15 and 17: an interrupt in the handler after a failed one hides neither the failure nor the last one."""
    ran: list[str] = []

    class Interrupted(Fails):
        def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            raise KeyboardInterrupt

    class FailsAtEnd(Fails):
        def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            raise ValueError("first")

    class Last(Fails):
        """Runs in spite of the interrupt."""

    with pytest.raises(KeyboardInterrupt) as caught:
        learner(FailsAtEnd(ran), Interrupted(ran), Last(ran)).fit(1)
    assert ran[-1] == "Last"
    assert [repr(other) for other in untyped(caught.value).others] == ["ValueError('first')"]


def test_an_interrupt_before_the_first_handler_of_the_end_is_not_hidden() -> None:
    """Rule 17: the handlers of `FitEnd` run, and no other exception takes the place of the interrupt."""
    ran: list[str] = []

    class Last(Callback):
        @on(FitEnd)
        def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            ran.append("end")

    fire = tiny_learner(Last(), default_callbacks=False).loop.dispatch.fire
    fire(FitEnd(), Phase())  # makes the runner
    found = list(interrupted(lambda: fire(FitEnd(), Phase()), "graph/serial.py"))
    assert any(found)
    assert len(ran) > 1


def test_a_callback_that_was_removed_is_let_go() -> None:
    gone = KINDS[0]([])
    taught = learner(gone)
    taught.fit(1)
    taught.remove_callback(type(gone))
    taught.fit(1)
    seen = weakref.ref(gone)
    del gone
    gc.collect()
    assert seen() is None
    taught.close()


def test_a_cancel_ends_what_it_names() -> None:
    stop = CancelFittingException("enough")
    taught = learner(KINDS[0]([], stop), KINDS[1]([]))
    taught.fit(3)
    assert taught.stopped is stop
    assert isinstance(taught.stopped, CancelException)


# --- one executor for one loop


def test_an_executor_belongs_to_one_learner() -> None:
    executor = SerialExecutor()
    executor.bind(TinySite())
    with pytest.raises(ExecutorError) as caught:
        executor.bind(TinySite())
    assert str(caught.value) == "This SerialExecutor belongs to another learner. Give each learner its own."


def test_an_executor_must_be_bound() -> None:
    plan = Callbacks([Fails([])], LearnerState()).plan(BatchEnd, TrainingPhase)
    with pytest.raises(
        ExecutorError, match=r"^SerialExecutor\.compile\(\) was called before bind\(site\)\. Pass the executor to"
    ):
        SerialExecutor().compile(plan)


def test_the_serial_executor_has_nothing_to_say() -> None:
    executor = SerialExecutor()
    plan = Callbacks([], LearnerState()).plan(BatchEnd, TrainingPhase)
    executor.flush()
    executor.close()
    assert (executor.explain(plan), executor.name, isinstance(executor, Executor)) == ("", "serial", True)


# --- finding executors


def test_the_default_is_found_by_its_name() -> None:
    assert type(find_executor("serial")) is SerialExecutor
    assert find_executor("serial") is not find_executor("serial")


def test_arguments_of_the_dask_executor_stand_for_it() -> None:
    """The workers are found when a callback is deferred to them, so no cluster is needed here."""
    for name in ("local", "tcp://192.0.2.1:8786", "192.0.2.1:8786"):
        executor: Any = find_executor(name)
        assert (type(executor), executor.name) == (DaskExecutor, "dask")
        assert repr(executor) == repr(DaskExecutor(name))
    assert repr(find_executor("dask")) == repr(DaskExecutor())


def test_an_executor_is_itself() -> None:
    executor = SerialExecutor()
    assert find_executor(executor) is executor


def test_an_unknown_name() -> None:
    with pytest.raises(ExecutorError) as caught:
        find_executor("seriall")
    message = str(caught.value)
    assert message.startswith("There is no executor 'seriall'. Did you mean 'serial'? Known are: ")
    for name in EXECUTORS:
        assert repr(name) in message


class Almost:
    """An executor without `flush`."""

    name = "almost"

    def bind(self, site: object) -> None: ...
    def compile(self, plan: Plan) -> None: ...
    def explain(self, plan: Plan) -> str:
        return ""

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("given_executor", "message"),
    [
        (SerialExecutor, "executor=SerialExecutor is a class. Pass an instance: SerialExecutor()."),
        (None, "executor=None is no executor: it needs name, bind, check, compile, explain, flush and close. Pass"),
        (Almost(), "is no executor: it needs name, bind, check, compile, explain, flush and close. Pass one by name"),
        (threading.Thread(), "is no executor: it needs "),
    ],
)
def test_what_is_no_executor(given_executor: object, message: str) -> None:
    with pytest.raises(ExecutorError) as caught:
        find_executor(given_executor)
    assert message in str(caught.value)
    assert "'serial'" in str(caught.value) or isinstance(given_executor, type)


def test_an_executor_of_concurrent_futures() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ExecutorError) as caught:
        find_executor(pool)
    assert str(caught.value).startswith(
        "ThreadPoolExecutor is an executor of concurrent.futures: it runs functions and knows nothing of the order "
        "between callbacks. Pass one by name instead: "
    )


def test_what_a_known_executor_needs_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing package and the command that installs it."""
    monkeypatch.setitem(
        EXECUTORS, "cluster", ("a_package_that_is_not_there.inner:Executor", "pip install 'x[cluster]'")
    )
    with pytest.raises(ExecutorError) as caught:
        find_executor("cluster")
    assert str(caught.value) == (
        "executor='cluster' needs a_package_that_is_not_there, which is not installed: pip install 'x[cluster]'"
    )
    assert isinstance(caught.value.__cause__, ImportError)


PACKAGE = """
from flowtrain import SerialExecutor

class LoudExecutor(SerialExecutor):
    name = "loud"
    plans = []

    def compile(self, plan):
        self.plans.append((plan.event_type.__name__, len(plan)))
        return super().compile(plan)

class Nothing:
    pass
"""
ENTRY_POINTS = """
[flowtrain.executors]
loud = loud_executors:LoudExecutor
nothing = loud_executors:Nothing
broken = loud_executors.not_there:Executor
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Return a package of another author, installed in a folder on `sys.path`."""
    (tmp_path / "loud_executors.py").write_text(PACKAGE)
    info = tmp_path / "loud_executors-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-executors\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("loud_executors", None)


@pytest.mark.usefixtures("package")
def test_an_executor_of_an_installed_package() -> None:
    """The entry-point group ``flowtrain.executors`` gives the executor a name, which a learner accepts."""
    found: Any = find_executor("loud")
    assert (type(found).__name__, found.name) == ("LoudExecutor", "loud")
    ran: list[str] = []
    data = [(torch.ones(2, 1), torch.ones(2, 1))]
    taught = Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, data=data, callbacks=[Fails(ran)],
                     default_callbacks=False, executor="loud")  # fmt: skip
    taught.fit(1)
    assert taught.executor.name == "loud"
    assert ("BatchEnd", 1) in found.plans
    assert ran == ["Fails", "Fails"]


@pytest.mark.usefixtures("package")
def test_installed_names_are_known() -> None:
    with pytest.raises(ExecutorError, match=r"^There is no executor 'lod'\. Did you mean 'loud'\? Known are: .*'loud'"):
        find_executor("lod")


@pytest.mark.usefixtures("package")
def test_an_entry_point_that_names_no_executor() -> None:
    with pytest.raises(
        ExecutorError, match=r"loud_executors\.Nothing object at .*> is no executor: it needs name, bind"
    ):
        find_executor("nothing")


@pytest.mark.usefixtures("package")
def test_an_entry_point_that_cannot_be_imported() -> None:
    with pytest.raises(ExecutorError) as caught:
        find_executor("broken")
    assert str(caught.value) == (
        "executor='broken' is loud_executors.not_there:Executor of loud-executors, and it cannot be imported: No "
        "module named 'loud_executors.not_there'; 'loud_executors' is not a package. Install what loud-executors needs."
    )


# --- the mailbox


def test_calls_are_made_in_order_and_what_they_put_in_waits() -> None:
    mailbox, made = Mailbox(), list[str]()

    def first() -> None:
        made.append("first")
        mailbox.put(lambda: made.append("third"))

    mailbox.put(first)
    thread = threading.Thread(target=mailbox.put, args=(lambda: made.append("second"),))
    thread.start()
    thread.join()
    mailbox.empty()
    assert made == ["first", "second"]
    assert len(mailbox.calls) == 1
    mailbox.empty()
    assert made == ["first", "second", "third"]


def test_what_a_call_raises_leaves_the_others_for_the_next_time() -> None:
    mailbox, made = Mailbox(), list[str]()
    calls = mailbox.calls

    def fails() -> None:
        raise ValueError("no")

    mailbox.put(fails)
    mailbox.put(lambda: made.append("second"))
    with pytest.raises(ValueError, match="no"):
        mailbox.empty()
    mailbox.empty()
    assert made == ["second"]
    mailbox.put(fails)
    mailbox.stopping = True
    mailbox.clear()
    assert not mailbox.stopping
    assert mailbox.calls is calls == [], "the loop keeps a reference to this list"


# --- an executor's part of a checkpoint


def test_an_executor_has_a_part_in_checkpoints_or_none() -> None:
    assert isinstance(DaskExecutor(), Resumable)
    assert not isinstance(SerialExecutor(), Resumable)

    class Half(SerialExecutor):
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(
        ExecutorError, match=r"has state_dict alone, so nothing of it could be resumed\. An executor has"
    ):
        find_executor(Half())
