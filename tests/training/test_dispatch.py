"""Dispatch: how an event runs, what handlers fire or request meanwhile, and what failures say (rules 15, 18, 28)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest

from flowtrain import (
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import CustomCallback
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.serial import SerialExecutor
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import ShuffledExecutor, tiny_batches, tiny_learner
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.scopes import Scopes
from flowtrain.training.sinks import Sinks
from flowtrain_dask import DaskExecutor
from tests.support.fired import Raise, Watch, short, watched
from tests.support.sites import MakeSite, SiteContract
from tests.support.untyped import untyped


class Ping(Event):
    """An event fired by the test or by handlers."""


# --- firing


def test_fire_takes_an_event() -> None:
    _, learner = watched()
    with pytest.raises(UsageError, match=r"fire\(\) takes an event and a phase, got .*BatchEnd.* and TrainingPhase"):
        learner.fire(untyped(BatchEnd), TrainingPhase())
    _, learner = watched(CustomCallback(lambda view: view.fire(untyped(Said)), BatchEnd))
    with pytest.raises(UsageError, match=r"fire\(\) takes an event, got .*Said.*. Write learner.fire\(MyEvent\(\)\)"):
        learner.fit(1)


def test_firing_from_outside_lets_a_cancel_of_the_fit_through() -> None:
    watch, learner = watched(Raise(Ping, CancelFittingException("now")))
    with pytest.raises(CancelFittingException, match="now"):
        learner.fire(Ping(), TrainingPhase())
    learner.fire(Ping(), TrainingPhase())
    assert words(watch) == ["Ping", "Ping"]
    _, learner = watched(Raise(Ping, CancelBatchException("no batch")))
    learner.fire(Ping(), TrainingPhase())


# --- runners


def test_a_plan_gets_another_runner_from_its_next_event_on() -> None:
    state, phase, watch, swapped = LearnerState(), TrainingPhase(), Watch(), list[Event]()
    dispatch, callbacks = Dispatch(state, Scopes(), SerialExecutor(), Sinks()), Callbacks([watch], state)
    dispatch.use(callbacks)
    plan = callbacks.plan(BatchBegin, TrainingPhase)

    def runner(event: Event, phase: Phase) -> None:
        swapped.append(event)

    dispatch.swap(plan, runner)
    assert dispatch.runners[phase].batch_begin is not runner, "no event has used this plan yet"
    dispatch.swap(plan, runner)
    assert dispatch.runners[phase].batch_begin is runner
    event = BatchBegin()
    dispatch.fire(event, phase)
    assert (swapped, watch.log) == ([event], [])

    dispatch.use(Callbacks([watch], LearnerState()))
    dispatch.swap(plan, runner)  # this comes too late: the callbacks have changed since
    dispatch.fire(event, phase)
    assert (swapped, watch.log) == ([event], [(event, phase)])


def test_where_no_callback_has_a_handler_nothing_is_called() -> None:
    state = LearnerState()
    dispatch = Dispatch(state, Scopes(), SerialExecutor(), Sinks())
    dispatch.use(Callbacks([CustomCallback(lambda view: None, BatchEnd, TrainingPhase)], state))
    training, validation = dispatch.runners[TrainingPhase()], dispatch.runners[ValidationPhase()]
    assert (training.batch_begin, validation.batch_end) == (None, None)
    assert training.batch_end is not None
    dispatch.fire(BatchBegin(), TrainingPhase())


# --- the queue (rule 18)


@dataclass(frozen=True)
class Said(Event):
    """An event with a word."""

    word: str


class Sayer(Callback):
    """Fires words at one event, and answers some words with others."""

    def __init__(self, event_type: type[Event], *words: str, **answers: str) -> None:
        self.event_type, self.words, self.answers = event_type, words, answers

    @on(Event)
    def say(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if type(event) is self.event_type:
            for word in self.words:
                learner.fire(Said(word))

    @on(Said)
    def answer(self, event: Said, phase: Phase, learner: LearnerView) -> None:
        if event.word in self.answers:
            learner.fire(Said(self.answers[event.word]))


def words(watch: Watch) -> list[str]:
    return [event.word if isinstance(event, Said) else type(event).__name__ for event, _ in watch.log]


def test_fired_events_wait_for_the_end_of_the_current_one() -> None:
    """Rule 18: fired events run in the serial order of the firing handlers, first in, first out, in its phase."""
    watch, learner = watched(
        Sayer(BatchEnd, "a", "b", a="a1", b="b1", a1="a2"), Sayer(BatchEnd, "c", c="c1"), n_batches=1
    )
    learner.fit(1)
    start = words(watch).index("BatchEnd")
    assert words(watch)[start:] == ["BatchEnd", "a", "b", "c", "a1", "b1", "c1", "a2", "EpochEnd", "FitEnd"]
    assert {repr(phase) for event, phase in watch.log if isinstance(event, Said)} == {"TrainingPhase"}


def test_fired_events_are_dropped_if_the_event_raises() -> None:
    """Rule 18: events that were fired during a failed event are dropped."""
    watch, learner = watched(
        Sayer(BatchEnd, "a"), Raise(BatchEnd, CancelEpochException()), Sayer(EpochEnd, "b"), n_batches=1
    )
    learner.fit(1)
    assert words(watch)[-3:] == ["EpochEnd", "b", "FitEnd"]
    assert "a" not in words(watch)


def test_fired_events_are_kept_if_the_cancel_means_nothing() -> None:
    watch, learner = watched(Sayer(EpochEnd, "a"), Raise(EpochEnd, CancelEpochException()), n_batches=1)
    learner.fit(1)
    assert words(watch)[-3:] == ["EpochEnd", "a", "FitEnd"]


BEGIN: dict[str, Callable[[Learner], object]] = {
    "fit": lambda learner: learner.fit(1),
    "epoch": lambda learner: learner.epoch(TrainingPhase),
    "step": lambda learner: learner.step(TrainingPhase, tiny_batches(n_batches=1)[0]),
    "fire": lambda learner: learner.fire(Ping(), TrainingPhase()),
}


@pytest.mark.parametrize(
    ("how", "event"),
    [
        *(("fit", event) for event in [FitBegin, EpochBegin, LossBegin, BatchEnd, EpochEnd, FitEnd]),
        *(("epoch", event) for event in [EpochBegin, LossBegin, BatchEnd, EpochEnd]),
        *(("step", event) for event in [LossBegin, BatchEnd]),
        ("fire", Ping),
    ],
)
@pytest.mark.parametrize("failing", [False, True], ids=["", "after an error"])
def test_fired_events_are_dropped_by_an_interrupt_too(how: str, event: type[Event], failing: bool) -> None:
    errors = [Raise(event, ValueError("first"))] if failing else []
    watch, learner = watched(Sayer(event, "a"), *errors, Raise(event, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        BEGIN[how](learner)
    learner.remove_callback(Sayer)
    learner.fit(1)
    assert "a" not in words(watch)


def test_a_failing_event_drops_only_what_it_fired_itself() -> None:
    class Fail(Callback):
        def __init__(self, word: str) -> None:
            self.word = word

        @on(Said)
        def fail(self, event: Said, phase: Phase, learner: LearnerView) -> None:
            if event.word == self.word:
                raise CancelEpochException(self.word)

    watch, learner = watched(Sayer(BatchBegin, "a", "b", a="a1", b="b1"), Fail("a"), n_batches=2)
    learner.fit(1)
    assert words(watch)[2:] == ["BatchBegin", "a", "b", "b1", "BatchCancelled", "EpochEnd", "FitEnd"]


def test_events_that_fire_each_other_without_end_are_refused() -> None:
    watch, learner = watched(Sayer(BatchEnd, "ping", ping="pong", pong="ping"), n_batches=1)
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    message = str(caught.value)
    assert message.startswith("Handlers fired more than 10000 events in a row; the last was Said(word='p")
    assert message.endswith("fire it again, directly or through other events: let one fire under a condition.")
    assert words(watch)[-2:] == ["EpochCancelled", "FitEnd"]


# --- failures (rule 15)


@pytest.mark.parametrize(
    ("event", "nth", "note"),
    [
        (FitBegin, 1, "raised in Raise.maybe at (FitBegin, Phase)"),
        (EpochBegin, 3, "raised in Raise.maybe at (EpochBegin, TrainingPhase), epoch 2"),
        (BackwardEnd, 4, "raised in Raise.maybe at (BackwardEnd, TrainingPhase), epoch 2, batch 2"),
        (BatchBegin, 3, "raised in Raise.maybe at (BatchBegin, ValidationPhase), epoch 1, batch 1"),
        (FitEnd, 1, "raised in Raise.maybe at (FitEnd, Phase)"),
    ],
)
def test_every_exception_says_where_it_was_raised(event: type[Event], nth: int, note: str) -> None:
    """Rule 15: the note on an exception gives callback, handler, event, phase, epoch and batch."""
    data = (tiny_batches(n_batches=2), tiny_batches(n_batches=2))
    _, learner = watched(Raise(event, ValueError("x"), nth), data=data)
    with pytest.raises(ValueError, match="x") as raised:
        learner.fit(2)
    assert raised.value.__notes__ == [note]


def test_the_note_of_a_direct_step_has_no_epoch() -> None:
    _, learner = watched(Raise(LossBegin, ValueError("x")))
    untyped(learner.get_callback(Raise)).name = "Mine"
    learner.set_callbacks(learner.callbacks)
    with pytest.raises(ValueError, match="x") as raised:
        learner.step(ValidationPhase, tiny_batches(n_batches=1)[0])
    assert raised.value.__notes__ == ["raised in Mine.maybe at (LossBegin, ValidationPhase)"]


def test_handlers_run_unless_they_depend_on_a_failed_one() -> None:
    """Rule 15: exactly the handlers with no failed ancestor run."""
    ran: list[str] = []

    class Base(Callback):
        fails: bool = False
        after: tuple[type[Callback], ...] = ()

        def run_after(self) -> tuple[type[Callback], ...]:
            return self.after

        @on(BatchEnd)
        def act(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            ran.append(type(self).__name__)
            if self.fails:
                raise ValueError(type(self).__name__)

    class A(Base):
        fails = True

    class B(Base):
        after = (A,)

    class C(Base):
        after = (B,)

    class D(Base): ...

    class E(Base):
        after = (D,)
        fails = True

    _, learner = watched(A(), B(), C(), D(), E())
    with pytest.raises(ValueError, match="A") as raised:
        learner.fit(1)
    assert ran == ["A", "D", "E"]
    assert [str(other) for other in untyped(raised.value).others] == ["E"]


@pytest.mark.parametrize(
    ("exceptions", "wins"),
    [
        ([CancelBatchException(), CancelEpochException(), CancelFittingException(), ValueError("e")], 3),
        ([CancelBatchException(), CancelFittingException(), CancelEpochException()], 1),
        ([CancelBatchException(), CancelEpochException()], 1),
        ([ValueError("one"), ValueError("two")], 0),
        ([CancelBatchException("one"), CancelBatchException("two")], 0),
    ],
)
def test_which_of_several_exceptions_counts(exceptions: list[Exception], wins: int) -> None:
    """Rule 15: errors, then the cancel of the fit, the epoch, the batch; then serial order."""
    watch, learner = watched(*(Raise(LossBegin, exception) for exception in exceptions))
    with suppress(ValueError):
        learner.fit(1)
    ends_fit = isinstance(exceptions[wins], (ValueError, CancelFittingException))
    assert learner.stopped is (exceptions[wins] if ends_fit else None)
    expected = {
        "ValueError": "F( E( B( Bx Ex F)",
        "CancelFittingException": "F( E( B( Bx Ex F)",
        "CancelEpochException": "F( E( B( Bx E) F)",
        "CancelBatchException": "F( E( B( Bx B( B) E) F)",
    }
    assert short(watch.names) == expected[type(exceptions[wins]).__name__]
    others = getattr(exceptions[wins], "others", None)
    assert others is not None
    assert {id(other) for other in others} == {id(e) for e in exceptions} - {id(exceptions[wins])}


# --- requests for checkpoints (rules 18 and 28)


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "serial": SerialExecutor,
    "shuffled": ShuffledExecutor,
    "dask": lambda: DaskExecutor(workers=3, parallel="always"),
}


class Mine(Event):
    """A user's event."""

    def __init__(self, number: int) -> None:
        self.number = number


class Asks(Callback):
    """Runs functions of the test at the end of the epoch and at the user's events."""

    def __init__(self, name: str, do: Callable[[Event, LearnerView], None]) -> None:
        self.name = name
        self.do = do

    @on(EpochEnd, TrainingPhase, access={})
    def end(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.do(event, learner)

    @on(Mine, access={})
    def mine(self, event: Mine, phase: Phase, learner: LearnerView) -> None:
        self.do(event, learner)


def taken(*callbacks: Callback, executor: str = "serial", fails: type[Exception] | None = None) -> list[str]:
    """Run an epoch; return the file names of the checkpoints that were written."""
    found: list[str] = []
    learner = tiny_learner(*callbacks, executor=EXECUTORS[executor](), n_batches=1, default_callbacks=False)
    learner.loop.dispatch.carry_out_requests(lambda requests: found.extend(request.path for request in requests))
    with learner:
        if fails is None:
            learner.fit(1)
        else:
            with pytest.raises(fails):
                learner.fit(1)
        assert learner.state.requests == learner.state.fired == []
    return found


@pytest.mark.parametrize("executor", EXECUTORS)
def test_checkpoints_are_written_in_the_serial_order_of_their_requests(executor: str) -> None:
    """B makes its request earlier in time if it can; requests of fired events come after those of the event itself."""
    asked = threading.Event()

    def late(event: Event, learner: LearnerView) -> None:
        if isinstance(event, Mine):
            learner.request_checkpoint(f"A of {event.number}")
            if event.number == 1:
                learner.fire(Mine(3))
            return
        if executor == "dask":
            assert asked.wait(60)
        learner.request_checkpoint("A 1")
        learner.fire(Mine(1))
        learner.request_checkpoint("A 2")

    def early(event: Event, learner: LearnerView) -> None:
        if isinstance(event, EpochEnd):
            learner.request_checkpoint("B 1")
            learner.fire(Mine(2))
            asked.set()

    wanted = ["A 1", "A 2", "B 1", "A of 1", "A of 2", "A of 3"]
    assert taken(Asks("A", late), Asks("B", early), executor=executor) == wanted


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_drops_the_requests_and_a_cancel_does_not(executor: str) -> None:
    def asks(event: Event, learner: LearnerView) -> None:
        learner.request_checkpoint("one")
        if isinstance(event, EpochEnd):
            learner.fire(Mine(1))

    def raises(failure: Exception, at: type[Event]) -> Callable[[Event, LearnerView], None]:
        def do(event: Event, learner: LearnerView) -> None:
            if isinstance(event, at):
                raise failure

        return do

    for at in (EpochEnd, Mine):  # checkpoints come after the event and those that it fired
        failing = Asks("B", raises(ValueError("no"), at))
        assert taken(Asks("A", asks), failing, executor=executor, fails=ValueError) == []
        cancelling = Asks("B", raises(CancelEpochException("enough"), at))
        assert taken(Asks("A", asks), cancelling, executor=executor) == ["one"]


def test_a_setup_cannot_ask_for_one() -> None:
    class Early(Callback):
        def setup(self, learner: LearnerView) -> None:
            learner.request_checkpoint("a.ckpt")

    learner = tiny_learner()
    with pytest.raises(CallbackError) as caught:
        learner.add_callback(Early())
    assert (
        str(caught.value) == "Early.setup asks for a checkpoint, and no learner is built yet. Ask for it at FitBegin."
    )
    assert learner.state.requests == []


class Late(Callback):
    """A deferred callback that makes a request which only the training thread can grant."""

    deferrable = True
    stochastic = False

    @on(BatchEnd, access={})
    def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.request_checkpoint("a.ckpt")


def test_a_deferred_handler_cannot_ask_for_one() -> None:
    with pytest.raises(UsageError, match=r"Late calls learner\.request_checkpoint\(.*a\.ckpt.*\), but it is defer"):
        tiny_learner(Late(), executor=DaskExecutor(), n_batches=1).fit(1)


# --- the site of an executor


class TestDispatch(SiteContract):
    """The dispatch of a loop keeps what executors rely on."""

    @pytest.fixture
    def make(self) -> MakeSite:
        def make(state: LearnerState, callbacks: Callbacks, executor: SerialExecutor) -> Dispatch:
            dispatch = Dispatch(state, Scopes(), executor, Sinks())
            dispatch.use(callbacks)
            return dispatch

        return make
