"""`throttle` and its relatives attach conditions to a callback, which stays the same object."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UpdateEnd,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import SmoothLoss, after, before, once, throttle, when
from flowtrain.graph.executor import Executor
from flowtrain.testing import assert_equivalent, tiny_learner
from tests.support.clock import Clock, Tick
from tests.support.examples import examples


class Note(Callback):
    """Notes the batches and epochs at which its handler runs."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []
        self.epochs: list[tuple[str, int]] = []

    def state_access(self) -> Access:
        return {"cbstate.history": Read()}

    @on(BatchEnd)
    def batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.batches.append((repr(phase), learner.cbstate.history[phase].steps))

    @on(EpochEnd)
    def epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.epochs.append((repr(phase), learner.cbstate.history[phase].epochs))

    def steps(self, phase: type[Phase]) -> list[int]:
        return [step for name, step in self.batches if name == phase.__name__]


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_counts_over_epochs_for_each_phase() -> None:
    note = throttle(Note(), BatchEnd, every=3)
    learner = tiny_learner(note, n_batches=4)
    learner.fit(2)
    assert note.steps(TrainingPhase) == note.steps(ValidationPhase) == [3, 6]
    assert len(note.epochs) == 4  # epochs are another event
    learner.fit(1)
    assert note.steps(TrainingPhase) == [3, 6, 9, 12]


@settings(max_examples=examples(30))
@given(every=st.integers(1, 6), n_batches=st.integers(1, 5), epochs=st.integers(1, 3))
def test_every_lets_the_multiples_pass(every: int, n_batches: int, epochs: int) -> None:
    note = throttle(Note(), BatchEnd, every=every)
    tiny_learner(note, n_batches=n_batches).fit(epochs)
    assert note.steps(TrainingPhase) == [step for step in range(1, epochs * n_batches + 1) if step % every == 0]


def test_seconds_lets_one_event_pass_in_that_time(clock: Clock) -> None:
    note = throttle(Note(), BatchEnd, seconds=2.5, clock=clock)
    learner = tiny_learner(Tick(clock), note, n_batches=9)
    learner.epoch(TrainingPhase)
    assert note.steps(TrainingPhase) == [1, 4, 7]


def test_it_returns_the_callback_itself() -> None:
    """Rule 7: `throttle` wraps nothing, so the name and the order of the callback stay."""
    note = Note()
    assert throttle(note, BatchEnd, every=2) is note
    learner = tiny_learner(note)
    assert learner.get_callback(Note) is note
    assert note.name == "Note"
    assert note.run_after() == ()


def test_conditions_on_two_events_are_both_kept() -> None:
    note = throttle(throttle(Note(), BatchEnd, every=2), EpochEnd, every=3)
    learner = tiny_learner(note, n_batches=3)
    learner.fit(3)
    assert note.steps(TrainingPhase) == [2, 4, 6, 8]
    assert note.epochs == [("TrainingPhase", 3), ("ValidationPhase", 3)]


def test_two_conditions_on_one_event_must_agree_and_both_count() -> None:
    note = throttle(throttle(Note(), BatchEnd, every=2), BatchEnd, every=3)
    learner = tiny_learner(note, n_batches=13)
    learner.epoch(TrainingPhase)
    assert note.steps(TrainingPhase) == [6, 12]


@pytest.mark.parametrize("seconds_first", [False, True])
def test_seconds_waits_from_the_last_time_the_handler_ran(clock: Clock, seconds_first: bool) -> None:
    """An event that another condition refuses does not restart the wait; otherwise the handler might never run."""
    conditions: list[dict[str, Any]] = [{"every": 2}, {"seconds": 4.0, "clock": clock}]
    note = Note()
    for condition in reversed(conditions) if seconds_first else conditions:
        throttle(note, BatchEnd, **condition)
    learner = tiny_learner(Tick(clock), note, n_batches=13)
    learner.epoch(TrainingPhase)
    assert note.steps(TrainingPhase) == [2, 6, 10]


def test_a_base_event_throttles_all_events_under_it_together() -> None:
    note = throttle(Note(), Event, every=2)
    learner = tiny_learner(note, n_batches=4)
    learner.fit(2)
    assert note.steps(TrainingPhase) == [2, 4, 5, 7]  # the fifth event is the first EpochEnd
    assert note.epochs == [("TrainingPhase", 2), ("ValidationPhase", 2)]


def test_counts_are_state() -> None:
    first = throttle(Note(), BatchEnd, every=3)
    learner = tiny_learner(first, n_batches=4)
    learner.epoch(TrainingPhase)
    second = throttle(Note(), BatchEnd, every=3)
    [kept], [fresh] = first.conditions, second.conditions
    assert kept.state_dict() == {"counts": {"TrainingPhase": 4}}
    fresh.load_state_dict(kept.state_dict())
    learner.replace_callback(second)
    learner.epoch(TrainingPhase)
    assert second.steps(TrainingPhase) == [6]


def test_what_was_left_to_wait_is_state(clock: Clock) -> None:
    """Clocks of two processes differ, so the state holds the time left: 2 of 10 seconds have passed, 8 remain."""
    first = throttle(Note(), BatchEnd, seconds=10.0, clock=clock)
    [condition] = first.conditions
    assert condition.state_dict() == {"left": 0.0}
    tiny_learner(first, n_batches=1).epoch(TrainingPhase)
    clock.now += 2.0
    assert condition.state_dict() == {"left": 8.0}
    elsewhere = Clock()
    elsewhere.now = -50.0
    second = throttle(Note(), BatchEnd, seconds=10.0, clock=elsewhere)
    second.conditions[0].load_state_dict(condition.state_dict())
    tiny_learner(Tick(elsewhere), second, n_batches=18).epoch(TrainingPhase)
    assert second.steps(TrainingPhase) == [8, 18]


def test_once_is_the_first_time_in_each_phase() -> None:
    note = once(Note(), BatchEnd)
    learner = tiny_learner(note, n_batches=4)
    learner.fit(2)
    learner.fit(1)
    assert note.steps(TrainingPhase) == note.steps(ValidationPhase) == [1]
    assert len(note.epochs) == 6  # epochs are another event


@pytest.mark.parametrize("once_first", [False, True])
def test_once_is_over_when_the_handler_has_run(once_first: bool) -> None:
    """`once` does not count an event that another condition refuses: the handler has not run at it."""
    note = Note()
    if once_first:
        after(once(note, BatchEnd), BatchEnd, 5)
    else:
        once(after(note, BatchEnd, 5), BatchEnd)
    tiny_learner(note, n_batches=4).fit(3)
    assert note.steps(TrainingPhase) == [6]


PASSED: list[tuple[Callable[[Note], Note], list[int]]] = [
    (lambda note: after(note, BatchEnd, 5), [6, 7, 8]),
    (lambda note: before(note, BatchEnd, 4), [1, 2, 3]),
    (lambda note: after(before(note, BatchEnd, 7), BatchEnd, 4), [5, 6]),
    (lambda note: throttle(after(note, BatchEnd, 3), BatchEnd, every=2), [4, 6, 8]),
    (lambda note: when(note, BatchEnd, lambda number, phase: number.bit_count() == 1), [1, 2, 4, 8]),
    (lambda note: when(note, BatchEnd, lambda number, phase: isinstance(phase, ValidationPhase)), []),
]


@pytest.mark.parametrize(("attach", "steps"), PASSED)
def test_after_before_and_when(attach: Callable[[Note], Note], steps: list[int]) -> None:
    note = Note()
    assert attach(note) is note
    tiny_learner(note, n_batches=4).fit(2)
    assert note.steps(TrainingPhase) == steps
    assert note.steps(ValidationPhase) == (steps or [1, 2, 3, 4, 5, 6, 7, 8])
    assert len(note.epochs) == 4


def test_a_predicate_is_asked_once_at_each_event() -> None:
    asked: list[tuple[int, str]] = []

    def never(number: int, phase: Phase) -> bool:
        asked.append((number, repr(phase)))
        return False

    tiny_learner(when(Note(), BatchEnd, never), n_batches=2).fit(1)
    assert asked == [(1, "TrainingPhase"), (2, "TrainingPhase"), (1, "ValidationPhase"), (2, "ValidationPhase")]


@pytest.mark.parametrize("answer", [None, 1, "yes"])
def test_a_predicate_that_forgets_to_answer_is_an_error(answer: Any) -> None:
    def forgets(number: int, phase: Phase) -> bool:
        return cast(bool, answer)

    learner = tiny_learner(when(Note(), BatchEnd, forgets))
    with pytest.raises(UsageError) as failed:
        learner.fit(1)
    assert str(failed.value) == (
        f"The predicate forgets of when() returned {answer!r}. The answer decides whether the handler runs, so it must "
        f"be True or False: write bool(...) around it."
    )
    assert any(note.startswith("raised in Note.batch at (BatchEnd, TrainingPhase)") for note in failed.value.__notes__)


ATTACHED: list[Callable[[Note], Note]] = [
    lambda note: once(note, BatchEnd),
    lambda note: after(note, BatchEnd, 6),
    lambda note: before(note, BatchEnd, 7),
    lambda note: when(note, BatchEnd, lambda number, phase: number % 5 == 1),
    lambda note: throttle(note, BatchEnd, every=3),
]


@pytest.mark.parametrize("attach", ATTACHED)
def test_state_goes_on_where_it_was_taken(attach: Callable[[Note], Note]) -> None:
    """Rule 28: a run that continues from the state after one epoch notes the same as two epochs without a break."""
    whole, first, second = attach(Note()), attach(Note()), attach(Note())
    tiny_learner(whole, n_batches=5).fit(2)
    learner = tiny_learner(first, n_batches=5)
    learner.fit(1)
    file = io.BytesIO()
    torch.save(first.conditions[0].state_dict(), file)
    file.seek(0)
    second.conditions[0].load_state_dict(torch.load(file, weights_only=True))
    learner.replace_callback(second)
    learner.fit(1)
    assert first.batches + second.batches != []
    assert sorted(first.batches + second.batches) == sorted(whole.batches)


def test_a_condition_is_asked_before_a_handler_touches_anything() -> None:
    """Rule 20, also in place: the view is not used if the condition refuses the event."""

    class Refused(Callback):
        @on(BatchEnd)
        def read(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            learner.batch.loss  # noqa: B018  # not declared

    tiny_learner(when(Refused(), BatchEnd, lambda number, phase: False)).fit(1)


def test_a_throttled_handler_still_has_its_place_in_the_order() -> None:
    """Rule 7."""
    note = throttle(Note(), BatchEnd, every=5)
    learner = tiny_learner(note)
    assert learner.callbacks.graph.has_edge("Recorder", "Note")


def test_the_same_under_dask() -> None:
    """Rule 13."""

    def make(executor: Executor) -> Learner:
        note = throttle(after(Note(), BatchEnd, 3), BatchEnd, every=2)
        return tiny_learner(note, once(SmoothLoss(), BatchEnd), n_batches=5, executor=executor)

    assert_equivalent(make, executors=["dask"])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Note, BatchEnd), {"every": 2}, r"takes a callback first, got <class .*Note'>\. Write throttle\("),
        ((Note(), BatchEnd()), {"every": 2}, r"takes an event type second, got BatchEnd\(\)\. Write throttle\("),
        ((Note(), TrainingPhase), {"every": 2}, r"takes an event type second, got <class"),
        ((Note(), BatchEnd), {}, r"throttle\(every=None, seconds=None\) takes one of the two: .* every=10\)\."),
        ((Note(), BatchEnd), {"every": 2, "seconds": 1.0}, r"throttle\(every=2, seconds=1\.0\) takes one of the two"),
        ((Note(), BatchEnd), {"every": 0}, r"throttle\(\): every is a whole number, at least 1, got 0\."),
        ((Note(), BatchEnd), {"every": -2}, r"throttle\(\): every is .* got -2\."),
        ((Note(), BatchEnd), {"every": 2.0}, r"throttle\(\): every is .* got 2\.0\."),
        ((Note(), BatchEnd), {"every": True}, r"throttle\(\): every is .* got True\."),
        ((Note(), BatchEnd), {"seconds": 0}, r"throttle\(seconds=0\): seconds is a number above zero, such as 30\."),
        ((Note(), BatchEnd), {"seconds": float("nan")}, r"throttle\(seconds=nan\)"),
        ((Note(), BatchEnd), {"seconds": "1"}, r"throttle\(seconds='1'\)"),
        (
            (Note(), UpdateEnd),
            {"every": 2},
            r"throttle\(Note\(\), UpdateEnd\): the callback does not handle UpdateEnd; it handles BatchEnd, EpochEnd\.",
        ),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        throttle(*arguments, **options)


@pytest.mark.parametrize(
    ("attach", "arguments", "message"),
    [
        (once, (Note, BatchEnd), r"^once\(\) takes a callback first, got .* Write once\(Printer\(\), BatchEnd\)\."),
        (
            once,
            (Note(), UpdateEnd),
            r"^once\(Note\(\), UpdateEnd\): the callback does not handle UpdateEnd; it handles",
        ),
        (after, (Note(), "BatchEnd", 3), r"^after\(\) takes an event type second, got 'BatchEnd'.*BatchEnd, 100\)\."),
        (after, (Note(), BatchEnd, 0), r"^after\(\): n is a whole number, at least 1, got 0\."),
        (after, (Note(), BatchEnd, 2.0), r"^after\(\): n is a whole number, at least 1, got 2\.0\."),
        (before, (Note(), BatchEnd, 1), r"^before\(\): n is a whole number, at least 2, got 1\."),
        (before, (Note(), BatchEnd, True), r"^before\(\): n is .* got True\."),
        (when, (Note(), BatchEnd, True), r"^when\(\.\.\., True\): the predicate is a function of the event's number"),
        (when, (Note(), UpdateEnd, callable), r"^when\(Note\(\), UpdateEnd\): the callback does not handle UpdateEnd"),
    ],
)
def test_mistakes_of_the_others(attach: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attach(*arguments)
