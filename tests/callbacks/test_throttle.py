"""throttle: conditions on a callback that stays what it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UpdateEnd,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import throttle
from flowtrain.testing import tiny_learner


class Note(Callback):
    """Note the batches and epochs at which it runs."""

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


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock.monotonic)
    return clock


class Tick(Callback):
    """Move the clock by one second at each batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @on(BatchBegin)
    def tick(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        self.clock.now += 1.0


def test_every_counts_over_epochs_for_each_phase() -> None:
    note = throttle(Note(), BatchEnd, every=3)
    learner = tiny_learner(note, n_batches=4)
    learner.fit(2)
    assert note.steps(TrainingPhase) == note.steps(ValidationPhase) == [3, 6]
    assert len(note.epochs) == 4  # another event
    learner.fit(1)
    assert note.steps(TrainingPhase) == [3, 6, 9, 12]


@settings(max_examples=30, deadline=None)
@given(every=st.integers(1, 6), n_batches=st.integers(1, 5), epochs=st.integers(1, 3))
def test_every_lets_the_multiples_pass(every: int, n_batches: int, epochs: int) -> None:
    note = throttle(Note(), BatchEnd, every=every)
    tiny_learner(note, n_batches=n_batches).fit(epochs)
    assert note.steps(TrainingPhase) == [step for step in range(1, epochs * n_batches + 1) if step % every == 0]


def test_seconds_lets_one_event_pass_in_that_time(clock: Clock) -> None:
    note = throttle(Note(), BatchEnd, seconds=2.5)
    learner = tiny_learner(Tick(clock), note, n_batches=9)
    learner.epoch(TrainingPhase)
    assert note.steps(TrainingPhase) == [1, 4, 7]


def test_it_returns_the_callback_itself() -> None:
    """Rule 7: nothing is wrapped."""
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
    """An event that another condition holds back does not begin the wait; it could hold back all of them."""
    conditions: list[dict[str, Any]] = [{"every": 2}, {"seconds": 4.0}]
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


def test_a_throttled_handler_still_has_its_place_in_the_order() -> None:
    """Rule 7."""
    note = throttle(Note(), BatchEnd, every=5)
    learner = tiny_learner(note)
    assert learner.callbacks.graph.has_edge("Recorder", "Note")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Note, BatchEnd), {"every": 2}, r"takes a callback first, got <class .*Note'>\. Write throttle\("),
        ((Note(), BatchEnd()), {"every": 2}, r"takes an event type second, got BatchEnd\(\)\. Write throttle\("),
        ((Note(), TrainingPhase), {"every": 2}, r"takes an event type second, got <class"),
        ((Note(), BatchEnd), {}, r"takes either every= or seconds=: throttle\(Printer\(\), BatchEnd, every=10\)\."),
        ((Note(), BatchEnd), {"every": 2, "seconds": 1.0}, r"takes either every= or seconds="),
        ((Note(), BatchEnd), {"every": 0}, r"throttle\(every=0\): every is a whole number, at least 1\."),
        ((Note(), BatchEnd), {"every": -2}, r"throttle\(every=-2\)"),
        ((Note(), BatchEnd), {"every": 2.0}, r"throttle\(every=2\.0\)"),
        ((Note(), BatchEnd), {"every": True}, r"throttle\(every=True\)"),
        ((Note(), BatchEnd), {"seconds": 0}, r"throttle\(seconds=0\): seconds must be positive\."),
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
