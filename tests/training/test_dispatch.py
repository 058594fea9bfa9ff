"""Dispatch: how an event runs, which events its handlers fire meanwhile, and what their failures say (rules 15, 18)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from flowtrain import (
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
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
from flowtrain.graph.executor import SerialExecutor
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import tiny_batches
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.scopes import Scopes
from flowtrain.training.sinks import Sinks
from tests.support.fired import Raise, Watch, watched
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
    learner.get_callback(Raise).name = "Mine"  # type: ignore[union-attr]  # it is there
    learner.set_callbacks(learner.callbacks)
    with pytest.raises(ValueError, match="x") as raised:
        learner.step(ValidationPhase, tiny_batches(n_batches=1)[0])
    assert raised.value.__notes__ == ["raised in Mine.maybe at (LossBegin, ValidationPhase)"]
