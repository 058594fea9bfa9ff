"""The callback graph: edges with reasons, the one serial order, and what has none (rules 7 to 9 and 12)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowtrain
from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    CycleError,
    EpochEnd,
    Event,
    FlowtrainError,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    Resolution,
    ResolutionError,
    RunFirst,
    TrainingPhase,
    Unresolvable,
    ValidationPhase,
    Write,
    WriteConflictError,
    callback_graph,
    on,
    resolve,
)
from flowtrain.access import Declaration, Path, meet
from flowtrain.callback import find_handler
from flowtrain.graph import Node, Order
from flowtrain.order import order_event, order_setup
from flowtrain.registry import Callbacks
from flowtrain.resolver import Resolver
from flowtrain.state import LearnerState


class At(Callback):
    """Handles `BatchEnd` and declares what it is told to; tests subclass it to have types."""

    def __init__(self, access: Access | None = None, after: Sequence[type[Callback]] = (), name: str = "") -> None:
        self.access: Access = access or {}
        self.after = tuple(after)
        self.answers: dict[Callback, Resolution] = {}
        self.name = name

    def state_access(self) -> Access:
        return self.access

    def run_after(self) -> tuple[type[Callback], ...]:
        return self.after

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return self.answers.get(other)

    @on(BatchEnd)
    def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


class A(At): ...


class B(At): ...


class C(At): ...


class SubA(A): ...


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Take back what a test says with `resolve`: it counts for the whole process."""
    yield
    kinds = (A, B, C, SubA)
    for one in kinds:
        for other in kinds:
            resolve(one, other, None)


def order(*callbacks: Callback) -> list[str]:
    """Return the names in serial order at BatchEnd. Nothing is set up."""
    graph_order = ordered(*callbacks)
    return [node.name for node in graph_order.nodes]


def ordered(*callbacks: Callback) -> Order:
    """Order the callbacks at (BatchEnd, TrainingPhase)."""
    nodes = Callbacks(callbacks, state_with_everything()).nodes
    participants = []
    for node in nodes:
        handler = find_handler(node.handlers, BatchEnd, TrainingPhase)
        assert handler is not None
        participants.append((node, handler))
    return order_event(BatchEnd, TrainingPhase, participants, Resolver())


def state_with_everything() -> LearnerState:
    """A state in which every entry that these tests read is there, so that only the order is in question."""
    state = LearnerState()
    for name in ("x", "y", "z", "stats"):
        setattr(state.cbstate, name, {})
    return state


def edges(*callbacks: Callback) -> dict[tuple[str, str], str]:
    """Return the edges at BatchEnd by names, each with its reasons as text."""
    found = ordered(*callbacks)
    return {
        (found.nodes[edge.before].name, found.nodes[edge.after].name): "; ".join(map(str, edge.reasons))
        for edge in found.edges
    }


W, R = Write(), Read()


# --- writers, readers, run_after


def test_a_writer_goes_before_a_reader() -> None:
    """Rule 7."""
    reader, writer = A({"cbstate.x": R}), B({"cbstate.x": W})
    assert order(reader, writer) == ["B", "A"]
    assert edges(reader, writer) == {("B", "A"): "B writes cbstate.x, A reads it"}


def test_paths_meet_where_one_covers_the_other() -> None:
    """Rules 4 and 5: a path covers what lies below it, and ``params`` are the parameters of ``model``."""
    assert edges(A({"batch": R}), B({"batch.loss": W})) == {("B", "A"): "B writes batch.loss, A reads batch"}
    assert edges(A({"params.w": R}), B({"model": W})) == {("B", "A"): "B writes model, A reads params.w"}
    assert edges(A({"optimizer": R}), B({"optimizer.hyperparams": W})) == {
        ("B", "A"): "B writes optimizer.hyperparams, A reads optimizer"
    }
    assert edges(A({"optimizer.state": R}), B({"optimizer.hyperparams": W})) == {}
    assert edges(A({"batch.grads": W}), B({"params": W}), C({"batch.loss": R})) == {}


def test_run_after_names_types_with_their_subclasses_and_never_itself() -> None:
    """Rule 7."""
    assert edges(B(after=[A]), A(), SubA()) == {
        ("A", "B"): "B.run_after() names A",
        ("SubA", "B"): "B.run_after() names A",
    }
    assert order(B(after=[A]), A(), SubA()) == ["A", "SubA", "B"]
    assert edges(A(after=[A])) == {}
    assert order(SubA(after=[A]), A()) == ["A", "SubA"]
    assert order(B(after=[At]), C(), A()) == ["C", "A", "B"]
    assert order(B(after=[C]), A()) == ["B", "A"]  # nothing of that type is there


def test_run_after_overrules_writer_before_reader() -> None:
    """Rule 7: writer before reader, unless `run_after` says otherwise."""
    assert edges(A({"cbstate.x": R}), B({"cbstate.x": W}, after=[A])) == {("A", "B"): "B.run_after() names A"}


def test_a_resolution_overrules_writer_before_reader() -> None:
    """Rule 7: writer before reader, unless a resolution says otherwise."""
    reader, writer = A({"cbstate.x": R}), B({"cbstate.x": W})
    reader.answers[writer] = RunFirst(reader)
    assert edges(writer, reader) == {("A", "B"): "RunFirst(A) by A.resolve_conflict(B)"}
    resolve(A, B, NoConflict())
    reader.answers.clear()
    assert order(reader, writer) == ["A", "B"]
    assert order(writer, reader) == ["B", "A"]


def test_all_reasons_of_an_edge_are_kept() -> None:
    reader, writer = A({"cbstate.x": R, "cbstate.y": R}), B({"cbstate": W})
    assert edges(reader, writer) == {
        ("B", "A"): "B writes cbstate, A reads cbstate.x; B writes cbstate, A reads cbstate.y"
    }
    writer.answers[reader] = RunFirst(A)
    reader.after = ()
    writer.after = (A,)
    assert edges(reader, writer) == {("A", "B"): "B.run_after() names A; RunFirst(A) by B.resolve_conflict(A)"}


@pytest.mark.parametrize("wrong", [[A], (A({}),), A, None, ("A",)])
def test_run_after_returns_a_tuple_of_types(wrong: Any) -> None:
    callback = B()
    callback.after = wrong
    with pytest.raises(CallbackError) as caught:
        order(callback)
    assert str(caught.value) == f"B.run_after() returned {wrong!r}. Return a tuple of callback types, as (Recorder,)."


# --- two writers


def test_two_writers_need_an_order() -> None:
    """Rule 7: the error has both callbacks, both paths, the event, and lines to paste."""
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
    """Do what each of the remedies in the message says, one after the other; yield the types as they are then."""
    for block in str(error).split("\n\n")[1:]:
        names: dict[str, Any] = {**vars(flowtrain), **types}
        target = re.search(r"# in (\w+)", block)
        source = f"class {target[1]}({target[1]}):\n{block}" if target else block.strip()
        exec(source, names)  # the lines as the user pastes them
        yield {name: names[name] for name in types}


def test_each_remedy_works_when_pasted() -> None:
    """Rule 7: each line that the error offers settles the conflict, and A goes first as it says."""
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
    """A type cannot go before itself: no `run_after` and no `RunFirst` of types is offered."""
    access: Access = {"cbstate.x": W}
    with pytest.raises(WriteConflictError) as caught:
        order(A(access), A(access))
    remedy = str(caught.value).partition("\n\n")[2]
    assert remedy == "    resolve(A, A, NoConflict())      # each two of them run in the order of the list\n"
    assert list(paste(caught.value, {"A": A})) == [{"A": A}]
    assert order(A(access), A(access), SubA(access)) == ["A", "A#2", "SubA"]
    assert len(edges(A(access), A(access), SubA(access))) == 2


def test_a_path_of_edges_is_order_enough() -> None:
    """Rule 7: two writers need a path of edges between them, not an edge."""
    first, last = A({"cbstate.x": W, "cbstate.y": W}), B({"cbstate.x": W}, after=[C])
    between = C({"cbstate.y": R})
    assert order(last, between, first) == ["A", "C", "B"]
    assert set(edges(last, between, first)) == {("A", "C"), ("C", "B")}
    with pytest.raises(WriteConflictError):
        order(last, first)


# --- resolutions


def pair() -> tuple[A, B]:
    return A({"cbstate.x": W}), B({"cbstate.x": W})


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("winner", [0, 1])
@pytest.mark.parametrize("by_type", [False, True])
def test_run_first_from_either_side_by_instance_or_type(side: int, winner: int, by_type: bool) -> None:
    """Rule 8: the answers of both sides are heard."""
    both = pair()
    first = both[winner]
    both[side].answers[both[1 - side]] = RunFirst(type(first) if by_type else first)
    assert order(*both) == order(*both[::-1]) == (["A", "B"] if winner == 0 else ["B", "A"])


def test_resolve_answers_for_types_one_does_not_own() -> None:
    """Rule 8."""
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
    """Rule 8: `RunFirst` beats `NoConflict`, whoever says which."""
    one, other = pair()
    one.answers[other], other.answers[one] = NoConflict(), RunFirst(other)
    assert order(one, other) == ["B", "A"]
    one.answers[other], other.answers[one] = RunFirst(other), NoConflict()
    assert order(one, other) == ["B", "A"]


def test_contradicting_answers() -> None:
    """Rule 8: two different `RunFirst` are an error."""
    one, other = pair()
    one.answers[other], other.answers[one] = RunFirst(one), RunFirst(other)
    with pytest.raises(ResolutionError) as caught:
        order(one, other)
    assert str(caught.value) == (
        "A.resolve_conflict(B) lets A run first and B.resolve_conflict(A) lets B run first. "
        "Both are heard, so they must agree."
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
        (RunFirst, "A.resolve_conflict(B) returned <class 'flowtrain.resolution.RunFirst'>. Return RunFirst(self), "),
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


# --- NoConflict and resources


def test_no_conflict_is_an_edge_in_serial_order() -> None:
    """Rule 8: the two never run at the same time, so there is an edge."""
    resolve(A, B, NoConflict())
    one, other = pair()
    text = "NoConflict() by resolve(A, B, ...): in serial order, never together"
    assert edges(one, other) == {("A", "B"): text}
    assert edges(other, one) == {("B", "A"): text}


def test_no_conflict_follows_the_order_that_others_ask_for() -> None:
    """Rule 8: the edge is added last, so that no cycle arises."""
    resolve(A, B, NoConflict())
    one, other = pair()
    one.after = (C,)
    assert edges(one, C(after=[B]), other) == {("B", "C"): "C.run_after() names B", ("C", "A"): "A.run_after() names C"}


def test_users_of_one_resource_run_in_serial_order() -> None:
    """Rule 6: without a conflict, never together."""
    use: Access = {"resource.pyplot": W}
    assert edges(A(use), B({"resource.rng": W}), C(use)) == {("A", "C"): "both use resource.pyplot"}
    assert edges(A(use), C(use, after=[B]), B()) == {
        ("A", "C"): "both use resource.pyplot",
        ("B", "C"): "C.run_after() names B",
    }


def test_many_users_of_a_resource_make_a_chain() -> None:
    """An edge that others imply is left out."""
    users = [A({"resource.sink.file": W}) for _ in range(20)]
    assert set(edges(*users)) == {(f"A{'' if n == 1 else f'#{n}'}", f"A#{n + 1}") for n in range(1, 20)}


# --- cycles


def test_a_cycle_is_printed_with_its_reasons() -> None:
    """Rule 9: the cycle, the reason of each edge, and what would break it."""
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
    """Only an edge by access can be answered with `resolve`; one by `run_after` would still be there."""
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
    assert order(other, one) == ["A#2", "A"]  # each keeps its name


def test_run_first_against_run_after_is_a_cycle() -> None:
    one, other = A({"cbstate.x": W}), B({"cbstate.x": W}, after=[A])
    one.answers[other] = RunFirst(other)
    with pytest.raises(CycleError) as caught:
        order(one, other)
    assert "  A before B: B.run_after() names A\n  B before A: RunFirst(B) by A.resolve_conflict(B)\n" in str(
        caught.value
    )
    assert "resolve(" not in str(caught.value).partition("Break")[2]


def test_callbacks_that_never_meet_make_no_cycle() -> None:
    """Rule 7: one order for each event and phase; only together they would go in a circle."""

    class Both(Callback):
        @on(BatchBegin, access={"cbstate.x": R})
        def begin(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

        @on(BatchEnd, TrainingPhase, access={"cbstate.x": W})
        def train(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

        @on(BatchEnd, ValidationPhase, access={"cbstate.x": R})
        def validate(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    class Counter(Callback):
        @on(BatchBegin, access={"cbstate.x": W})
        def begin(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

        @on(BatchEnd, TrainingPhase, access={"cbstate.x": R})
        def train(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

        @on(BatchEnd, ValidationPhase, access={"cbstate.x": W})
        def validate(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    callbacks = Callbacks([Both(), Counter()], state_with_everything(), [TrainingPhase, ValidationPhase])

    def labels(event_type: type[Event], phase_type: type[Phase]) -> list[str]:
        return [step.label for step in callbacks.plan(event_type, phase_type).steps]

    assert labels(BatchBegin, TrainingPhase) == ["Counter.begin", "Both.begin"]
    assert labels(BatchEnd, TrainingPhase) == ["Both.train", "Counter.train"]
    assert labels(BatchEnd, ValidationPhase) == ["Counter.validate", "Both.validate"]
    assert callbacks.graph.edges["Both", "Counter"] == {
        "reason": "Both writes cbstate.x, Counter reads it",
        "events": ((BatchEnd, TrainingPhase),),
    }
    assert callbacks.graph.edges["Counter", "Both"]["events"] == (
        (BatchBegin, TrainingPhase),
        (BatchBegin, ValidationPhase),
        (BatchEnd, ValidationPhase),
    )


# --- the order of setup


def setup_order(*callbacks: Callback) -> list[str]:
    state = state_with_everything()
    state.cbstate.w = {}
    return [node.name for node in order_setup(Callbacks(callbacks, state).nodes)]


class Quiet(Callback):
    """Handles nothing, so that only its union access counts."""

    def __init__(self, name: str, reads: str = "", writes: str = "") -> None:
        self.name = name
        self.reads, self.writes = reads, writes

    def state_access(self) -> Access:
        return {f"cbstate.{path}": R for path in self.reads} | {f"cbstate.{path}": W for path in self.writes}


def test_setup_writers_before_readers() -> None:
    """Rule 7."""
    assert setup_order(Quiet("reads", "x"), Quiet("between", "y", "x"), Quiet("writes", "", "y")) == [
        "writes",
        "between",
        "reads",
    ]
    assert setup_order(Quiet("a", "x"), Quiet("b"), Quiet("c", "", "x")) == ["b", "c", "a"]


def test_setup_by_the_list_where_nothing_says_otherwise() -> None:
    """Two writers of one entry need no order to be set up."""
    assert setup_order(Quiet("b", "", "x"), Quiet("a", "", "x"), Quiet("c")) == ["b", "a", "c"]


def test_setup_in_a_circle_goes_by_the_list() -> None:
    """Rule 7: list order inside a circle; who waits for the circle comes after it, who is before it before."""
    circle = [Quiet("c1", "x", "y"), Quiet("c2", "z", "x"), Quiet("c3", "yw", "z")]
    after, before = Quiet("after", "z", ""), Quiet("before", "", "w")
    assert setup_order(after, *circle, before) == ["before", "c1", "c2", "c3", "after"]
    assert setup_order(*circle[::-1], before, after) == ["before", "c3", "c2", "c1", "after"]


def test_setup_of_two_circles() -> None:
    one = [Quiet("a1", "x", "y"), Quiet("a2", "y", "x")]
    other = [Quiet("b1", "zy", "w"), Quiet("b2", "w", "z")]
    assert setup_order(other[0], one[1], other[1], one[0]) == ["a2", "a1", "b1", "b2"]


# --- to_networkx


def test_the_graph_has_reasons_and_events_on_every_edge() -> None:
    class Twice(At):
        @on(EpochEnd, TrainingPhase)
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    class Reader(Twice): ...

    writer, reader = Twice({"cbstate.x": W}), Reader({"cbstate.x": R})
    alone = A(name="alone")
    graph = callback_graph([reader, writer, alone])
    assert list(graph.nodes(data=True)) == [
        ("Reader", {"callback": reader}),
        ("Twice", {"callback": writer}),
        ("alone", {"callback": alone}),
    ]
    assert list(graph.edges(data=True)) == [
        (
            "Twice",
            "Reader",
            {
                "reason": "Twice writes cbstate.x, Reader reads it",
                "events": (
                    (BatchEnd, TrainingPhase),
                    (EpochEnd, TrainingPhase),
                    (BatchEnd, ValidationPhase),
                ),
            },
        )
    ]


# --- properties


PATHS = ["batch", "batch.loss", "batch.outputs", "cbstate", "cbstate.x", "cbstate.x.y", "model", "params", "params.w"]
ACCESS = st.dictionaries(
    st.sampled_from([*PATHS, "resource.rng", "resource.plot", "resource.plot.one", "resource.plot.two"]),
    st.sampled_from([R, W]),
    max_size=3,
)
KINDS = [type(f"K{number}", (At,), {}) for number in range(8)]


@st.composite
def declared(draw: st.DrawFn) -> list[At]:
    """Random callbacks: what they declare, whom they run after, and how they answer."""
    count = draw(st.integers(1, 8))
    callbacks: list[At] = []
    for number in range(count):
        access = {
            path: kind if not path.startswith("resource") else W
            for path, kind in draw(ACCESS).items()
            if kind == W or path != "cbstate"
        }
        after = draw(st.lists(st.sampled_from(KINDS[:count]), max_size=1 if number % 2 else 2))
        callbacks.append(KINDS[number](access, after))
    for one in callbacks:
        for other in callbacks:
            kind = draw(st.sampled_from(["", "", "first", "none", "none", "none"])) if one is not other else ""
            if kind:
                winner = max(one, other, key=callbacks.index)
                one.answers[other] = RunFirst(winner) if kind == "first" else NoConflict()
    return callbacks


def try_to_order(callbacks: list[At]) -> Order | None:
    try:
        return ordered(*callbacks)
    except (WriteConflictError, CycleError):
        return None


def as_graph(found: Order) -> networkx.DiGraph[int]:
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from(range(len(found.nodes)))
    graph.add_edges_from((edge.before, edge.after) for edge in found.edges)
    return graph


def conflict(one: Declaration, other: Declaration) -> bool:
    """The definition, without an index: some two paths meet and one of them is written."""

    def name(path: Path) -> Path:
        return ("model", *path[1:]) if path[0] == "params" else path

    return any(
        meet(name(path), name(also)) and (isinstance(kind, Write) or isinstance(like, Write))
        for path, kind in one
        for also, like in other
    )


@settings(max_examples=100, deadline=None)
@given(declared())
def test_every_conflicting_pair_is_ordered_or_refused(callbacks: list[At]) -> None:
    """Rules 7 and 8: where no error is raised, each pair that conflicts has one that runs before the other."""
    found = try_to_order(callbacks)
    if found is None:
        return
    declarations = [node.union for node in found.nodes]
    for later in range(len(found.nodes)):
        for earlier in range(later):
            if conflict(declarations[earlier], declarations[later]):
                assert found.ancestors[later] >> earlier & 1, (found.nodes[earlier].name, found.nodes[later].name)


@settings(max_examples=100, deadline=None)
@given(declared())
def test_the_serial_order_is_the_first_topological_order_by_list(callbacks: list[At]) -> None:
    """Rule 12: among all topological orders the one that follows the list, as networkx finds it."""
    found = try_to_order(callbacks)
    if found is None:
        return
    hard: networkx.DiGraph[int] = networkx.DiGraph()
    hard.add_nodes_from(range(len(callbacks)))
    for edge in found.edges:
        if any(reason.kind not in ("no conflict", "resource") for reason in edge.reasons):
            hard.add_edge(found.nodes[edge.before].position, found.nodes[edge.after].position)
    positions = [node.position for node in found.nodes]
    assert positions == list(networkx.lexicographical_topological_sort(hard))
    # With the edges that were added last it is still that order.
    for edge in found.edges:
        hard.add_edge(found.nodes[edge.before].position, found.nodes[edge.after].position)
    assert positions == list(networkx.lexicographical_topological_sort(hard))


@settings(max_examples=100, deadline=None)
@given(declared())
def test_ancestors_are_those_of_the_graph(callbacks: list[At]) -> None:
    found = try_to_order(callbacks)
    if found is None:
        return
    graph = as_graph(found)
    for position, bits in enumerate(found.ancestors):
        assert {other for other in graph if bits >> other & 1} == networkx.ancestors(graph, position)
        assert bits >> position == 0  # only earlier ones


@settings(max_examples=100, deadline=None)
@given(declared())
def test_an_edge_added_last_is_never_implied(callbacks: list[At]) -> None:
    """Rule 8: what other edges imply needs no edge of its own, so the graph shows what matters."""
    found = try_to_order(callbacks)
    if found is None:
        return
    graph = as_graph(found)
    for edge in found.edges:
        if {reason.kind for reason in edge.reasons} <= {"no conflict", "resource"}:
            graph.remove_edge(edge.before, edge.after)
            assert not networkx.has_path(graph, edge.before, edge.after)
            graph.add_edge(edge.before, edge.after)


@settings(max_examples=100, deadline=None)
@given(declared())
def test_a_cycle_error_names_a_real_cycle(callbacks: list[At]) -> None:
    """Rule 9: each line of the message is an edge, and the lines close."""
    try:
        ordered(*callbacks)
    except CycleError as error:
        steps = re.findall(r"^  (\S+) before (\S+): \S", str(error), re.MULTILINE)
        names = error.cycle
        assert len(set(names)) == len(names) >= 2
        assert steps == list(zip(names, (*names[1:], names[0]), strict=True))
    except FlowtrainError:
        pass


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from("uvwxyz")), st.sets(st.sampled_from("uvwxyz"))), max_size=8))
def test_setup_order(declarations: list[tuple[set[str], set[str]]]) -> None:
    """Rule 7: writers before readers; inside a circle list order, one after the other; without circles list order."""
    callbacks = [
        Quiet(f"q{number}", "".join(reads - writes), "".join(writes))
        for number, (reads, writes) in enumerate(declarations)
    ]
    state = LearnerState()
    for name in "uvwxyz":
        setattr(state.cbstate, name, 0)
    found = [node.position for node in order_setup(Callbacks(callbacks, state).nodes)]
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from(range(len(callbacks)))
    for one, (_, writes) in enumerate(declarations):
        for other, (reads, also) in enumerate(declarations):
            if writes & (reads - also):
                graph.add_edge(one, other)
    circles = [sorted(circle) for circle in networkx.strongly_connected_components(graph)]
    place = {position: number for number, position in enumerate(found)}
    for circle in circles:
        assert found[place[circle[0]] : place[circle[0]] + len(circle)] == circle
    for writer, reader in graph.edges:
        if not networkx.has_path(graph, reader, writer):
            assert place[writer] < place[reader]
    if len(circles) == len(found):
        assert found == list(networkx.lexicographical_topological_sort(graph))


def test_a_node_is_in_one_place() -> None:
    """Names, positions and declarations are those of the list."""
    one, other = A({"batch.loss": R}), A({"cbstate.x": W})
    nodes: Sequence[Node] = Callbacks([one, other], state_with_everything()).nodes
    assert [(node.callback, node.name, node.position) for node in nodes] == [(one, "A", 0), (other, "A#2", 1)]
    assert [node.union for node in nodes] == [((("batch", "loss"), R),), ((("cbstate", "x"), W),)]
