"""Deferrable callbacks in the graph: what they may declare, and the arrivals of their late writes (rule 44)."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain import (
    Access,
    AccessError,
    Callback,
    CallbackError,
    EpochEnd,
    Event,
    FitEnd,
    LearnerView,
    Phase,
    Read,
    RunFirst,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    WriteConflictError,
    on,
    resolve,
)
from flowtrain.testing import tiny_learner


class Scores(Callback):
    """Writes a score with a lag."""

    deferrable = True
    stochastic = False

    def __init__(self, access: Access | None = None) -> None:
        self.access = access or {"cbstate.score": Write(lag=2), "cbstate.history": Read()}

    def state_access(self) -> Access:
        return self.access

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.score = 0

    @on(EpochEnd, TrainingPhase)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.score = learner.cbstate.history[phase].epochs


class Reads(Callback):
    """Keeps the score, and the event that it belongs to."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def state_access(self) -> Access:
        return {"cbstate.score": Read()}

    @on(EpochEnd, TrainingPhase)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.seen.append((learner.cbstate.score, learner.arrival("cbstate.score")))


class Also(Reads):
    """Writes the score too, at once."""

    def state_access(self) -> Access:
        return {"cbstate.score": Write()}


def test_the_arrival_is_the_first_part_of_the_event_and_readers_depend_on_it() -> None:
    reads = Reads()
    learner = tiny_learner(reads, Scores(), n_batches=2)
    learner.fit(4)
    assert reads.seen == [(0, None), (0, None), (1, (1, 2)), (2, (2, 4))]
    assert learner.cbstate.score == 4  # before FitEnd, what has not arrived arrives
    [block] = [each for each in learner.callbacks.explain().split("\n\n") if each.startswith("EpochEnd, Training")]
    lines = [line.strip() for line in block.splitlines()]
    assert lines[1].startswith("1. Scores.arrival")
    assert lines[2] == "cbstate.score arrives, written 2 EpochEnds before"
    assert any("after Scores.arrival: Scores.arrival writes cbstate.score, Reads reads it" in line for line in lines)
    assert "cbstate.score arrives 2 EpochEnds later" in lines
    assert learner.callbacks.graph.has_edge("Scores.arrival", "Reads")
    assert not learner.callbacks.graph.has_edge("Scores", "Reads")


def test_a_second_writer_at_the_event_of_the_arrival_is_a_conflict() -> None:
    with pytest.raises(WriteConflictError, match=r"Scores.arrival.*both write at \(EpochEnd, TrainingPhase\)"):
        tiny_learner(Also(), Scores())

    class Resolved(Also):
        """Is ordered after the arrival."""

    resolve(Scores, Resolved, RunFirst(Scores))
    learner = tiny_learner(resolved := Resolved(), Scores(), n_batches=2)
    learner.fit(3)
    assert [score for score, _ in resolved.seen] == [0, 0, 1]


def test_run_after_the_writer_is_after_its_arrival_too() -> None:
    class Later(Also):
        def run_after(self) -> tuple[type[Callback], ...]:
            return (Scores,)

    learner = tiny_learner(later := Later(), Scores(), n_batches=2)
    learner.fit(3)
    assert [score for score, _ in later.seen] == [0, 0, 1]


@pytest.mark.parametrize("lag", [0, -1, True, 1.5, "1"])
def test_a_lag_is_a_whole_number_of_at_least_one(lag: Any) -> None:
    with pytest.raises(AccessError, match=r"lag is after how many events the write arrives"):
        Write(lag=lag)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"batch.loss": Write(lag=1)}, r"declares 'batch.loss': Write\(lag=1\). Only entries of cbstate"),
        ({"cbstate": Write(lag=1)}, r"declares 'cbstate': Write\(lag=1\). Only entries of cbstate, named one by one"),
        ({"resource.file": Write(lag=1)}, r"Only entries of cbstate"),
        ({"cbstate.a": Write(lag=1), "cbstate.a.b": Write(lag=2)}, r"which is a part of it"),
    ],
)
def test_only_entries_of_cbstate_are_written_with_a_lag(access: Access, message: str) -> None:
    with pytest.raises(AccessError, match=message):
        tiny_learner(Scores(access))


def test_a_lag_excludes_a_broadcast() -> None:
    with pytest.raises(AccessError, match=r"Write Write\(lag=1\) or Write\(broadcast=True\)"):
        Write(lag=1, broadcast=True)


def test_only_a_deferrable_callback_writes_with_a_lag_and_only_at_events_that_come_again() -> None:
    class InPlace(Scores):
        deferrable = False

    with pytest.raises(CallbackError, match=r"InPlace declares 'cbstate.score': Write\(lag=2\), and is not deferrable"):
        tiny_learner(InPlace())

    class AtTheEnd(Scores):
        @on(FitEnd)
        def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None: ...

    with pytest.raises(
        CallbackError, match=r"end handles FitEnd: a write of FitBegin or FitEnd would arrive in another"
    ):
        tiny_learner(AtTheEnd())
    with pytest.raises(CallbackError, match=r'is declared so: \{"cbstate.score": Write\(lag=1\)\}'):
        tiny_learner(Scores({"cbstate.score": Write()}))


def test_a_deferrable_reader_cannot_ask_for_the_event_of_a_value() -> None:
    class Asks(Reads):
        deferrable = True
        stochastic = False

    with pytest.raises(UsageError, match=r"Asks calls learner.arrival\('cbstate.score'\), but it is deferrable"):
        tiny_learner(Asks(), Scores(), n_batches=1).fit(1)


def test_each_phase_and_event_type_counts_for_itself() -> None:
    class Both(Scores):
        @on(EpochEnd, ValidationPhase)
        def other(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            learner.cbstate.score = 100 + learner.cbstate.history[phase].epochs

    learner = tiny_learner(reads := Reads(), Both(), n_batches=2)
    learner.fit(4)
    # The validation epoch comes after the training epoch, and its writes arrive at its own events.
    assert [score for score, _ in reads.seen] == [0, 0, 1, 2]
    assert learner.cbstate.score == 104
