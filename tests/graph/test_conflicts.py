"""Pairs of writers and cycles, which have no order: each error says what to write (rules 7 and 9)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

import flowtrain
from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CycleError,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    RunFirst,
    Write,
    WriteConflictError,
    on,
    resolve,
)
from flowtrain.callbacks import Recorder
from tests.support.ordered import A, At, B, C, SubA, edges, order

W, R = Write(), Read()


# --- two writers


def test_two_writers_need_an_order() -> None:
    """Rule 7: the error names both callbacks, both paths and the event, and has lines to paste."""
    with pytest.raises(WriteConflictError) as caught:
        order(C({"cbstate.x": R}), A({"cbstate.stats": W}), B({"cbstate.stats.mean": W}))
    error = caught.value
    assert (error.callbacks, error.paths, error.event) == (
        ("A", "B"),
        ("cbstate.stats", "cbstate.stats.mean"),
        "BatchEnd, TrainingPhase",
    )
    assert str(error) == (
        "A and B both write at (BatchEnd, TrainingPhase), and nothing says which goes first: A writes cbstate.stats, "
        "B writes cbstate.stats.mean. Say it, in one of these ways:\n\n"
        "    def run_after(self) -> tuple[type[Callback], ...]:      # in B\n"
        "        return (A,)\n\n"
        "    def resolve_conflict(self, other: Callback) -> Resolution | None:      # in B\n"
        "        return RunFirst(other) if isinstance(other, A) else None       # or NoConflict()\n\n"
        "    resolve(A, B, RunFirst(A))      # for types that you do not own\n"
    )


def test_the_first_pair_in_the_list_is_named_and_the_others_are_counted() -> None:
    with pytest.raises(WriteConflictError, match=r"B writes cbstate\.x\. \(2 more such pairs at this event\.\) Say"):
        order(A({"cbstate": W}), B({"cbstate.x": W}), C({"cbstate.x": W, "cbstate.y": W}))


def paste(error: WriteConflictError, types: dict[str, type[At]]) -> Iterator[dict[str, type[At]]]:
    """Apply the remedies in the message one after the other; yield the types after each of them."""
    for block in str(error).split("\n\n")[1:]:
        names: dict[str, Any] = {**vars(flowtrain), **types}
        target = re.search(r"# in (\w+)", block)
        source = f"class {target[1]}({target[1]}):\n{block}" if target else block.strip()
        exec(source, names)  # the user pastes these lines
        yield {name: names[name] for name in types}


def test_each_remedy_works_when_pasted() -> None:
    """Rule 7: each remedy in the error settles the conflict, and then A runs first, as the remedy says."""
    access: Access = {"cbstate.x": W}
    with pytest.raises(WriteConflictError) as caught:
        order(A(access), B(access))
    ways = 0
    for types in paste(caught.value, {"A": A, "B": B}):
        one, other = types["A"](access), types["B"](access)
        assert order(one, other) == order(other, one) == ["A", "B"]
        ways += 1
    assert ways == 3


@pytest.mark.parametrize("kinds", [(A, SubA), (SubA, A)])
def test_each_remedy_works_between_a_type_and_its_subclass(kinds: tuple[type[At], type[At]]) -> None:
    access: Access = {"cbstate.x": W}
    one, other = kinds
    with pytest.raises(WriteConflictError) as caught:
        order(one(access), other(access))
    assert f"resolve({one.__name__}, {other.__name__}, RunFirst({one.__name__}))" in str(caught.value)
    resolve(one, other, RunFirst(one))
    assert order(one(access), other(access)) == [one.__name__, other.__name__]
    assert order(other(access), one(access)) == [one.__name__, other.__name__]


def test_two_of_one_type_are_offered_what_helps_them() -> None:
    """A type cannot run before itself, so the error suggests neither `run_after` nor `RunFirst` with types."""
    access: Access = {"cbstate.x": W}
    with pytest.raises(WriteConflictError) as caught:
        order(A(access), A(access))
    remedy = str(caught.value).partition("\n\n")[2]
    assert remedy == "    resolve(A, A, NoConflict())      # each two of them run in the order of the list\n"
    assert list(paste(caught.value, {"A": A})) == [{"A": A}]
    assert order(A(access), A(access), SubA(access)) == ["A", "A#2", "SubA"]
    assert len(edges(A(access), A(access), SubA(access))) == 2


def test_a_path_of_edges_is_order_enough() -> None:
    """Rule 7: two writers need a path of edges between them, not a direct edge."""
    first, last = A({"cbstate.x": W, "cbstate.y": W}), B({"cbstate.x": W}, after=[C])
    between = C({"cbstate.y": R})
    assert order(last, between, first) == ["A", "C", "B"]
    assert set(edges(last, between, first)) == {("A", "C"), ("C", "B")}
    with pytest.raises(WriteConflictError):
        order(last, first)


# --- cycles


def test_a_cycle_is_printed_with_its_reasons() -> None:
    """Rule 9: the error shows the cycle and the reason of each edge, and says which change breaks it."""
    first, second, third = A({"cbstate.x": W, "cbstate.z": R}), B({"cbstate.x": R}), C({"cbstate.z": W}, after=[B])
    with pytest.raises(CycleError) as caught:
        order(At(name="free"), first, second, third)
    assert set(caught.value.cycle) == {"A", "B", "C"}
    assert caught.value.event == "BatchEnd, TrainingPhase"
    assert str(caught.value) == (
        "The callbacks A, B, C wait for each other at (BatchEnd, TrainingPhase):\n"
        "  A before B: A writes cbstate.x, B reads it\n"
        "  B before C: C.run_after() names B\n"
        "  C before A: C writes cbstate.z, A reads it\n"
        "Break the circle at one of these: take a type out of run_after, change a resolution, declare less, or give a "
        "handler an access= of its own; or turn one edge around: resolve(A, B, RunFirst(B))."
    )
    resolve(A, B, RunFirst(B))
    assert order(first, second, third) == ["B", "C", "A"]


def test_the_edge_to_turn_around_is_one_that_can_be() -> None:
    """The error suggests `resolve` only for an edge by access, because an edge by `run_after` would remain."""
    with pytest.raises(CycleError) as caught:
        order(A({"cbstate.x": R}, after=[C]), B({"cbstate.x": W}, after=[A]), C(after=[B]))
    assert "resolve(" not in str(caught.value)
    one, middle, last = A({"cbstate.y": R}), C(after=[A]), B({"cbstate.y": W}, after=[C])
    with pytest.raises(CycleError) as caught:
        order(one, middle, last)
    assert str(caught.value).endswith("turn one edge around: resolve(B, A, RunFirst(A)).")
    resolve(B, A, RunFirst(A))
    assert order(last, middle, one) == ["A", "C", "B"]


def test_two_that_read_what_the_other_writes() -> None:
    one, other = A({"cbstate.x": W, "cbstate.y": R}), B({"cbstate.x": R, "cbstate.y": W})
    with pytest.raises(CycleError, match=r"resolve\(A, B, RunFirst\(B\)\)"):
        order(one, other)
    resolve(A, B, RunFirst(B))
    assert order(one, other) == ["B", "A"]


def test_a_circle_of_one_type_is_offered_no_conflict() -> None:
    one, other = A({"cbstate.x": W, "cbstate.y": R}), A({"cbstate.x": R, "cbstate.y": W})
    with pytest.raises(CycleError, match=r"turn one edge around: resolve\(A, A, NoConflict\(\)\)\.$"):
        order(one, other)
    resolve(A, A, NoConflict())
    assert order(other, one) == ["A#2", "A"]  # the names of the callbacks do not follow the list


def test_run_first_against_run_after_is_a_cycle() -> None:
    one, other = A({"cbstate.x": W}), B({"cbstate.x": W}, after=[A])
    one.answers[other] = RunFirst(other)
    with pytest.raises(CycleError) as caught:
        order(one, other)
    assert "  A before B: B.run_after() names A\n  B before A: RunFirst(B) by A.resolve_conflict(B)\n" in str(
        caught.value
    )
    assert "resolve(" not in str(caught.value).partition("Break")[2]


def test_the_remedy_goes_into_the_users_class_where_the_other_is_bundled() -> None:
    """In either order of the list the error suggests code for the user's class that lets the learner be built."""

    class Mine(Callback):
        def state_access(self) -> Access:
            return {"cbstate.history": Write()}

        @on(BatchEnd)
        def touch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    for callbacks in ([Mine(), Recorder()], [Recorder(), Mine()]):
        with pytest.raises(WriteConflictError) as caught:
            order(*callbacks)
        assert "# in Mine\n        return (Recorder,)" in str(caught.value)
        assert "in Recorder" not in str(caught.value)

    class Sorted(Mine):
        def run_after(self) -> tuple[type[Callback], ...]:
            return (Recorder,)

    assert order(Sorted(), Recorder()) == ["Recorder", "Sorted"]
