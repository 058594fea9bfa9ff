"""What a worker does with an assignment, without a cluster (rules 25 and 26)."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, LearnerView, Read, TrainingPhase, on
from flowtrain.callback.access import declare
from flowtrain.state.partial_view import Owner
from flowtrain_dask.cluster.callback_state import dump_job, dump_state, load_state, shared_objects
from flowtrain_dask.cluster.codec import dump_entries
from flowtrain_dask.cluster.pickling import loads
from flowtrain_dask.cluster.worker import Assignment, Reply, Versions, run_assignment, versions
from flowtrain_dask.lanes.work import Entry, Job, LaneHandler


class Unportable(Exception):
    """Pickles, and cannot be made again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class Adder(Callback):
    """Adds up what it gets; fails at the numbers in ``bad``."""

    def __init__(self, *bad: int) -> None:
        self.name = "Adder"
        self.total = 0
        self.bad = bad
        self.deep = False

    @on(BatchEnd, TrainingPhase)
    def add(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Take one number."""
        number: int = learner.batch.inputs
        if number in self.bad:
            if self.deep:
                self.add(event, phase, learner)
            raise Unportable("number", str(number))
        self.total += number


def assign(
    token: str, callback: Adder, numbers: list[int], base: int = 0, *, state: bool = True, **changes: Any
) -> Reply:
    """Return the reply to an assignment of numbers, with the callback's state or without."""
    declaration = declare({"batch.inputs": Read()}, "test")
    [(_, handler)] = callback.handlers()
    lane_handler = LaneHandler(0, "Adder", handler, declaration, Owner("Adder", "Adder", "state_access", declaration))
    job = Job("Adder", "run", ("Adder",), ((),), (lane_handler,))
    entries = [
        Entry(base + place, 0, BatchEnd(), TrainingPhase(), {("batch", "inputs"): number}, 8)
        for place, number in enumerate(numbers)
    ]
    blob = dump_state([callback], shared_objects(job, [callback])) if state else None
    events = bytes(dump_entries(entries))
    call = Assignment(token, versions(), dump_job(job, [callback]), base, blob, events, True)
    reply = pickle.loads(run_assignment(pickle.dumps(Assignment(**{**vars(call), **changes}))))
    assert type(reply) is Reply
    return reply


def total(reply: Reply) -> int:
    assert reply.state is not None
    home = Adder()
    load_state([home], [home], reply.state)
    return home.total


def test_callbacks_stay_and_go_on_from_exactly_their_state() -> None:
    first = assign("stay", Adder(), [1, 2])
    assert (first.kind, first.done, first.ran, total(first)) == ("done", 2, 2, 3)
    second = assign("stay", Adder(), [3], base=2, state=False)
    assert (second.kind, total(second)) == ("done", 6)
    again = assign("stay", Adder(), [3], base=2, state=False)  # given out twice: the callbacks are past it
    assert again.kind == "missing"
    assert assign("other", Adder(), [3], base=2, state=False).kind == "missing"


def test_a_batch_that_is_given_out_again_with_its_state_is_run_again_from_there() -> None:
    """Rule 25: a pure function, so a doubled worker gives the same."""
    replies = [assign("again", Adder(), [1, 2]) for _ in range(2)]
    assert [total(reply) for reply in replies] == [3, 3]


def test_a_failure_comes_back_with_the_state_and_the_place() -> None:
    """Rule 27; an exception that cannot be made again comes as its text."""
    reply = assign("fail", Adder(2), [1, 2, 3])
    assert (reply.kind, reply.done, reply.ran, total(reply)) == ("done", 2, 3, 1)
    assert reply.failure is not None
    sequence, blob = reply.failure
    failure = loads(blob)
    assert sequence == 1
    assert str(failure) == "Unportable: number 2"
    where, trace = failure.__notes__
    assert where == "raised in Adder.add at (BatchEnd, TrainingPhase), deferred as event 1 of lane Adder"
    assert 'raise Unportable("number", str(number))' in trace


def test_too_deep_a_recursion_is_a_reply() -> None:
    """As a task's failure dask would never hand it on."""
    callback = Adder(1)
    callback.deep = True
    reply = assign("deep", callback, [1])
    assert reply.failure is not None
    assert isinstance(loads(reply.failure[1]), RecursionError)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"versions": Versions("2.7", "0.1", "0")}, "versions", ""),
        ({"entries": b"no events"}, "not picklable", "ValueError: this is no blob of flowtrain's codec"),
    ],
)
def test_what_cannot_be_run_is_told(changes: dict[str, Any], kind: str, text: str) -> None:
    reply = assign("refused", Adder(), [1], **changes)
    assert reply.kind == kind
    assert reply.text.startswith(text)


def test_what_is_no_assignment_is_told() -> None:
    assert pickle.loads(run_assignment(b"nonsense")).kind == "not picklable"
    assert versions().differences(Versions("2.7", versions().torch, "0")) == ["python", "flowtrain"]
