"""The resolver: which callbacks are asked about a conflict, and which of their answers count (rule 8)."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain import (
    Callback,
    EpochEnd,
    Event,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    Resolution,
    ResolutionError,
    RunFirst,
    Unresolvable,
    Write,
    callback_graph,
    on,
    resolve,
)
from tests.support.ordered import A, At, B, C, SubA, edges, order, pair

W, R = Write(), Read()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("winner", [0, 1])
@pytest.mark.parametrize("by_type", [False, True])
def test_run_first_from_either_side_by_instance_or_type(side: int, winner: int, by_type: bool) -> None:
    """Rule 8: the answers of both callbacks count."""
    both = pair()
    first = both[winner]
    both[side].answers[both[1 - side]] = RunFirst(type(first) if by_type else first)
    assert order(*both) == order(*both[::-1]) == (["A", "B"] if winner == 0 else ["B", "A"])


def test_resolve_answers_for_types_one_does_not_own() -> None:
    """Rule 8: `resolve` gives an answer for types that a user cannot change."""
    resolve(A, B, RunFirst(B))
    assert edges(SubA({"cbstate.x": W}), B({"cbstate.x": W})) == {
        ("B", "SubA"): "RunFirst(B) by resolve(A, B, ...)",
    }


def test_the_same_answer_from_everybody() -> None:
    one, other = pair()
    one.answers[other], other.answers[one] = RunFirst(other), RunFirst(B)
    resolve(A, B, RunFirst(B))
    [(pair_of_names, reason)] = edges(one, other).items()
    assert (pair_of_names, reason) == (("B", "A"), "RunFirst(B) by B.resolve_conflict(A)")


def test_run_first_beats_no_conflict() -> None:
    """Rule 8: `RunFirst` beats `NoConflict`, whichever callback gives it."""
    one, other = pair()
    one.answers[other], other.answers[one] = NoConflict(), RunFirst(other)
    assert order(one, other) == ["B", "A"]
    one.answers[other], other.answers[one] = RunFirst(other), NoConflict()
    assert order(one, other) == ["B", "A"]


def test_contradicting_answers() -> None:
    """Rule 8: two `RunFirst` that contradict each other are an error."""
    one, other = pair()
    one.answers[other], other.answers[one] = RunFirst(one), RunFirst(other)
    with pytest.raises(ResolutionError) as caught:
        order(one, other)
    assert str(caught.value) == (
        "A.resolve_conflict(B) lets A run first and B.resolve_conflict(A) lets B run first. "
        "Both answers count, so they must agree: change one of them."
    )
    one.answers.clear()
    resolve(A, B, RunFirst(A))
    with pytest.raises(ResolutionError, match=r"^resolve\(A, B, \.\.\.\) lets A run first and B\.resolve_c"):
        order(one, other)


@pytest.mark.parametrize("side", [0, 1])
def test_unresolvable(side: int) -> None:
    """Rule 8: any `Unresolvable` is an error."""
    both = pair()
    both[side].answers[both[1 - side]] = Unresolvable()
    both[1 - side].answers[both[side]] = RunFirst(both[0])
    who = ("A.resolve_conflict(B)", "B.resolve_conflict(A)")[side]
    with pytest.raises(ResolutionError) as caught:
        order(*both)
    assert str(caught.value) == f"A and B cannot be used together: {who} says Unresolvable(). Remove one."


def test_who_does_not_conflict_is_not_asked() -> None:
    resolve(A, B, Unresolvable())
    assert order(A({"cbstate.x": R}), B({"cbstate.x": R})) == ["A", "B"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (RunFirst(C), "which names neither of them. Name one of the two callbacks."),
        (RunFirst(At), "which names both of them. Name one of the two callbacks."),
        (
            RunFirst,
            "A.resolve_conflict(B) returned <class 'flowtrain.callback.resolution.RunFirst'>. Return RunFirst(self), ",
        ),
        (True, "returned True. Return RunFirst(self), RunFirst(other), NoConflict(), Unresolvable(), or None for no"),
    ],
)
def test_answers_that_mean_nothing(answer: Any, message: str) -> None:
    one, other = pair()
    one.answers[other] = answer
    with pytest.raises(ResolutionError) as caught:
        order(one, other)
    assert message in str(caught.value)


def test_each_pair_is_asked_once() -> None:
    asked: list[str] = []

    class Asks(At):
        def resolve_conflict(self, other: Callback) -> Resolution:
            asked.append(f"{self.name or 'A'}")
            return NoConflict()

        @on(EpochEnd)
        def more(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    callback_graph([Asks({"cbstate.x": W, "cbstate.y": W}, name="one"), Asks({"cbstate": W}, name="two")])
    assert asked == ["one", "two"]
