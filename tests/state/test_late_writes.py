"""Late writes: what a handler may write with a lag, how it is kept, and when it arrives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowtrain import ProtectedException, TrainingPhase, UsageError, ValidationPhase, Write
from flowtrain.callback.access import declare
from flowtrain.callback.events import EpochEnd
from flowtrain.state.arrivals import Arrivals, Changes
from flowtrain.state.encoding import Packer
from flowtrain.state.late_writes import Change, LateLearner, apply_change, packed_change, unpacked_change
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import make_entries
from flowtrain.state.partial_view import Owner
from flowtrain.state.views import bind_view

ACCESS = {"cbstate.score": Write(lag=1), "cbstate.own.best": Write(lag=2), "cbstate.tracehistory": Write(lag=1)}


def late_view(access: dict[str, Any] | None = None) -> tuple[LearnerState, LateLearner, Any]:
    """Return a state with some entries, the late learner of a handler, and its view."""
    declaration = declare(access or ACCESS, "Scorer")
    state = LearnerState()
    make_entries(state.cbstate, [path for path, _ in declaration], late=False)
    state.cbstate.score = {"value": 1}
    late = LateLearner(state, declaration, "Scorer")
    shown: Any = late
    return state, late, bind_view(declaration, shown, Owner("Scorer", "Scorer", "state_access", declaration))


def test_writes_are_kept_and_the_state_stays_until_they_arrive() -> None:
    state, late, learner = late_view()
    value = {"loss": torch.ones(2)}
    learner.cbstate.score = value
    learner.cbstate.own.best = 3
    learner.cbstate.tracehistory[TrainingPhase].push("Norm", torch.tensor(0.5), 7)
    value["loss"].zero_()
    assert learner.cbstate.score["value"] == 1
    assert "best" not in state.cbstate.own
    assert not state.cbstate.tracehistory
    changes = late.taken()
    assert [change.lag for change in changes] == [1, 2, 1]
    assert late.taken() == ()
    for change in changes:
        apply_change(state.cbstate, change)
    assert state.cbstate.score["loss"].tolist() == [1, 1]
    assert state.cbstate.own.best == 3
    assert list(state.cbstate.tracehistory[TrainingPhase]["Norm"]) == [(7, 0.5)]


def test_one_series_is_written_through_its_own_path() -> None:
    state, late, learner = late_view({"cbstate.tracehistory.Norm": Write(lag=1)})
    learner.cbstate.tracehistory[ValidationPhase].push("Norm", 2.0, step=1)
    learner.cbstate.tracehistory[ValidationPhase].Norm.push(3.0, step=2)
    with pytest.raises(ProtectedException, match=r"Write access to Learner.cbstate.tracehistory.Other"):
        learner.cbstate.tracehistory[ValidationPhase].push("Other", 1.0, 1)
    for change in late.taken():
        apply_change(state.cbstate, change)
    assert list(state.cbstate.tracehistory[ValidationPhase]["Norm"]) == [(1, 2.0), (2, 3.0)]


def test_a_value_is_replaced_and_never_changed_in_place() -> None:
    _, _, learner = late_view()
    with pytest.raises(ProtectedException, match=r"Assign a new one: cbstate.score = ..."):
        learner.cbstate.score["value"] = 2
    with pytest.raises(UsageError, match=r"Scorer removes cbstate.score, which it writes with a lag"):
        del learner.cbstate.score
    with pytest.raises(UsageError, match=r"assigns cbstate.tracehistory, which is filled and never replaced"):
        learner.cbstate.tracehistory = {}


def test_only_plain_values_can_wait() -> None:
    _, _, learner = late_view()
    with pytest.raises(UsageError, match=r"Scorer writes cbstate.score with a lag, and object is no plain value"):
        learner.cbstate.score = object()
    with pytest.raises(UsageError, match="step"):
        learner.cbstate.tracehistory[TrainingPhase].push("Norm", 1.0, -1)


def test_a_change_is_the_same_after_a_checkpoint() -> None:
    change = Change(2, ("tracehistory", TrainingPhase(), "Norm"), 0.5, 3)
    packed = packed_change(change, Packer())
    assert packed == {"lag": 2, "keys": ["tracehistory", ["TrainingPhase"], "Norm"], "value": 0.5, "step": 3}
    assert unpacked_change(packed, {}) == change


class Ready:
    """Gives changes, or fails, when it is asked."""

    def __init__(self, changes: Changes | None, failure: Exception | None = None) -> None:
        self.changes, self.failure, self.asked = changes, failure, 0

    def is_there(self) -> bool:
        return True

    def get(self) -> Changes | None:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return self.changes


def stream_of(state: LearnerState, **lags: int) -> Any:
    paths: dict[tuple[str, ...], int] = {("cbstate", name): lag for name, lag in lags.items()}
    return state.arrivals.stream("Scorer", EpochEnd, TrainingPhase, paths)


def test_changes_arrive_at_the_event_that_their_lag_says() -> None:
    state = LearnerState()
    stream = stream_of(state, soon=1, late=3)
    for number in (1, 2, 3, 4):
        stream.arrive(updates=number * 10)
        stream.put((Change(1, ("soon",), number), Change(3, ("late",), number)))
        assert vars(state.cbstate).get("soon") == (number - 1 or None)
        assert vars(state.cbstate).get("late") == (1 if number == 4 else None)
    assert state.arrivals.arrived["cbstate.soon"] == (3, 30)
    assert state.arrivals.arrived["cbstate.late"] == (1, 10)
    for deliver in state.arrivals.rest():
        deliver()
    assert (state.cbstate.soon, state.cbstate.late) == (4, 4)
    assert not state.arrivals.rest()


def test_a_result_is_asked_for_only_when_it_is_due_and_a_failure_is_raised_once() -> None:
    state = LearnerState()
    stream, awaited = stream_of(state, score=2), Ready((), ValueError("no score"))
    stream.arrive(0)
    stream.put(awaited=awaited)
    stream.arrive(0)
    assert awaited.asked == 0
    with pytest.raises(ValueError, match="no score"):
        stream.arrive(0)
    stream.arrive(0)
    assert awaited.asked == 1


def test_an_entry_is_missing_when_its_writer_does_not_run_any_more() -> None:
    state = LearnerState()
    state.cbstate.score = 1
    stream = stream_of(state, score=1)
    stream.arrive(0)
    stream.put()
    assert state.cbstate.score == 1
    stream.arrive(0)
    assert "score" not in state.cbstate


def test_a_checkpoint_has_what_is_under_way() -> None:
    state = LearnerState()
    stream = stream_of(state, score=2)
    stream.arrive(5)
    stream.put(awaited=Ready((Change(2, ("score",), torch.ones(1)),)))
    stream.arrive(6)
    saved: Any = state.arrivals.state_dict(Packer())
    other = LearnerState()
    other.arrivals.load_state_dict(saved, {}, ["Scorer"], Packer())
    resumed = stream_of(other, score=2)
    resumed.arrive(7)
    assert other.cbstate.score.tolist() == [1]
    assert other.arrivals.arrived == {"cbstate.score": (1, 5)}
    # A learner without the callback, and a result whose event has waited in a lane.
    lacks = LearnerState()
    lacks.arrivals.load_state_dict(saved, {}, [], Packer())
    assert not lacks.arrivals.rest()
    waiting = LearnerState()
    under_way: list[Any] = [{**each, "changes": None} for each in saved["under way"]]
    waiting.arrivals.load_state_dict({**saved, "under way": under_way}, {}, ["Scorer"], Packer())
    waiting.arrivals.fill(under_way[0]["number"], (Change(2, ("score",), 4),))
    stream_of(waiting, score=2).arrive(7)
    assert waiting.cbstate.score == 4


def test_a_learner_without_late_writes_saves_nothing() -> None:
    assert Arrivals(LearnerState().cbstate).state_dict(Packer()) is None
