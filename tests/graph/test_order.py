"""The order of callbacks that meet: its edges and their reasons, and what has no order (rules 7 to 9 and 12)."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    Event,
    FlowtrainError,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    RunFirst,
    TrainingPhase,
    ValidationPhase,
    Write,
    WriteConflictError,
    on,
    resolve,
)
from flowtrain.callback.access import Declaration, Path, overlap
from flowtrain.callbacks import Recorder
from flowtrain.graph.nodes import Order
from flowtrain.graph.order import order_setup
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from tests.support.examples import examples
from tests.support.ordered import A, At, B, C, SubA, edges, order, ordered, pair, state_with_everything

W, R = Write(), Read()


# --- writers, readers, run_after


def test_a_writer_goes_before_a_reader() -> None:
    """Rule 7."""
    reader, writer = A({"cbstate.x": R}), B({"cbstate.x": W})
    assert order(reader, writer) == ["B", "A"]
    assert edges(reader, writer) == {("B", "A"): "B writes cbstate.x, A reads it"}


def test_paths_meet_where_one_covers_the_other() -> None:
    """Rules 4 and 5: a path covers the paths below it, and ``params`` are the parameters of ``model``."""
    assert edges(A({"batch": R}), B({"batch.loss": W})) == {("B", "A"): "B writes batch.loss, A reads batch"}
    assert edges(A({"params.w": R}), B({"model": W})) == {("B", "A"): "B writes model, A reads params.w"}
    assert edges(A({"optimizer": R}), B({"optimizer.hyperparams": W})) == {
        ("B", "A"): "B writes optimizer.hyperparams, A reads optimizer"
    }
    assert edges(A({"optimizer.state": R}), B({"optimizer.hyperparams": W})) == {}
    assert edges(A({"batch.inputs": W}), B({"params": W}), C({"batch.loss": R})) == {}


def test_paths_that_reach_one_object_meet_and_the_reason_names_it() -> None:
    """Rule 5: gradients belong to parameters, and the groups of an optimizer hold parameters and hyperparameters."""
    assert edges(A({"params.w": R}), B({"batch.grads": W})) == {
        ("B", "A"): "B writes batch.grads, A reads params.w (both reach batch.grads.w)"
    }
    assert edges(A({"batch": R}), B({"model": W})) == {
        ("B", "A"): "B writes model, A reads batch (both reach batch.grads)"
    }
    assert edges(A({"optimizer.hyperparams": R}), B({"optimizer.param_groups": W})) == {
        ("B", "A"): "B writes optimizer.param_groups, A reads optimizer.hyperparams (both reach optimizer.hyperparams)"
    }
    assert edges(A({"optimizer": R}), B({"params.w": W}), C({"optimizer.state": R})) == {
        ("B", "A"): "B writes params.w, A reads optimizer (both reach model.w)"
    }
    assert edges(A({"lossfn.scale": W}), B({"optimizer.gen.param_groups": R})) == {
        ("A", "B"): "A writes lossfn.scale, B reads optimizer.gen.param_groups (both reach lossfn.scale)"
    }


def test_who_sees_callbacks_never_runs_with_one_of_them_and_that_is_no_circle() -> None:
    """Rule 5: ``callbacks`` reaches the attributes of every callback, which it may change undeclared."""
    seen = Read()
    assert edges(A({"callbacks": seen}), B({"cbstate.x": W}), C({"callbacks": seen})) == {
        ("A", "B"): "A sees callbacks, and B is one",
        ("B", "C"): "C sees callbacks, and B is one",
    }
    assert edges(A({"cbstate.x": R, "callbacks": seen}), B({"cbstate.x": W})) == {
        ("B", "A"): "B writes cbstate.x, A reads it"
    }


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
    assert order(B(after=[C]), A()) == ["B", "A"]  # the list has no callback of that type


def test_run_after_overrules_writer_before_reader() -> None:
    """Rule 7: a writer runs before a reader, unless `run_after` says otherwise."""
    assert edges(A({"cbstate.x": R}), B({"cbstate.x": W}, after=[A])) == {("A", "B"): "B.run_after() names A"}


def test_a_resolution_overrules_writer_before_reader() -> None:
    """Rule 7: a writer runs before a reader, unless a resolution says otherwise."""
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


# --- NoConflict and resources


def test_no_conflict_is_an_edge_in_serial_order() -> None:
    """Rule 8: two callbacks with `NoConflict` never run at the same time, so they get an edge."""
    resolve(A, B, NoConflict())
    one, other = pair()
    text = "NoConflict() by resolve(A, B, ...): in serial order, never together"
    assert edges(one, other) == {("A", "B"): text}
    assert edges(other, one) == {("B", "A"): text}


def test_no_conflict_follows_the_order_that_others_ask_for() -> None:
    """Rule 8: the edge for `NoConflict` is added last and follows the other edges, so that it closes no cycle."""
    resolve(A, B, NoConflict())
    one, other = pair()
    one.after = (C,)
    assert edges(one, C(after=[B]), other) == {("B", "C"): "C.run_after() names B", ("C", "A"): "A.run_after() names C"}


def test_users_of_one_resource_run_in_serial_order() -> None:
    """Rule 6: users of a resource have no conflict, and never run at the same time."""
    use: Access = {"resource.pyplot": W}
    assert edges(A(use), B({"resource.rng": W}), C(use)) == {("A", "C"): "both use resource.pyplot"}
    assert edges(A(use), C(use, after=[B]), B()) == {
        ("A", "C"): "both use resource.pyplot",
        ("B", "C"): "C.run_after() names B",
    }


def test_many_users_of_a_resource_make_a_chain() -> None:
    """Edges that follow from other edges are left out."""
    users = [A({"resource.sink.file": W}) for _ in range(20)]
    assert set(edges(*users)) == {(f"A{'' if n == 1 else f'#{n}'}", f"A#{n + 1}") for n in range(1, 20)}


# --- each event has an order of its own


def test_callbacks_that_never_meet_make_no_cycle() -> None:
    """Rule 7: each event and phase has its own order; only the orders together would form a cycle."""

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
        return [planned.label for planned in callbacks.plan(event_type, phase_type).handlers]

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
    """Has no handler, so that only its `state_access` counts."""

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
    """Rule 7: callbacks in a cycle are set up in list order, between those before and those after the cycle."""
    circle = [Quiet("c1", "x", "y"), Quiet("c2", "z", "x"), Quiet("c3", "yw", "z")]
    after, before = Quiet("after", "z", ""), Quiet("before", "", "w")
    assert setup_order(after, *circle, before) == ["before", "c1", "c2", "c3", "after"]
    assert setup_order(*circle[::-1], before, after) == ["before", "c3", "c2", "c1", "after"]


def test_setup_of_two_circles() -> None:
    one = [Quiet("a1", "x", "y"), Quiet("a2", "y", "x")]
    other = [Quiet("b1", "zy", "w"), Quiet("b2", "w", "z")]
    assert setup_order(other[0], one[1], other[1], one[0]) == ["a2", "a1", "b1", "b2"]


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
    """Draw random callbacks: their declarations, their `run_after`, and their resolutions."""
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
    """Return whether two declarations conflict, by the definition: two paths meet and one of them is written."""

    def name(path: Path) -> Path:
        return ("model", *path[1:]) if path[0] == "params" else path

    return any(
        overlap(name(path), name(also)) and (isinstance(kind, Write) or isinstance(like, Write))
        for path, kind in one
        for also, like in other
    )


@settings(max_examples=examples(100))
@given(declared())
def test_every_conflicting_pair_is_ordered_or_refused(callbacks: list[At]) -> None:
    """Rules 7 and 8: if no error is raised, one callback of each conflicting pair runs before the other."""
    found = try_to_order(callbacks)
    if found is None:
        return
    declarations = [node.union for node in found.nodes]
    for later in range(len(found.nodes)):
        for earlier in range(later):
            if conflict(declarations[earlier], declarations[later]):
                assert found.ancestors[later] >> earlier & 1, (found.nodes[earlier].name, found.nodes[later].name)


@settings(max_examples=examples(100))
@given(declared())
def test_the_serial_order_is_the_first_topological_order_by_list(callbacks: list[At]) -> None:
    """Rule 12: networkx finds the same order, the topological order that follows the list."""
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
    # The edges that were added last leave the order unchanged.
    for edge in found.edges:
        hard.add_edge(found.nodes[edge.before].position, found.nodes[edge.after].position)
    assert positions == list(networkx.lexicographical_topological_sort(hard))


@settings(max_examples=examples(100))
@given(declared())
def test_ancestors_are_those_of_the_graph(callbacks: list[At]) -> None:
    found = try_to_order(callbacks)
    if found is None:
        return
    graph = as_graph(found)
    for position, bits in enumerate(found.ancestors):
        assert {other for other in graph if bits >> other & 1} == networkx.ancestors(graph, position)
        assert bits >> position == 0  # an ancestor comes earlier


@settings(max_examples=examples(100))
@given(declared())
def test_an_edge_added_last_is_never_implied(callbacks: list[At]) -> None:
    """Rule 8: an edge that follows from other edges is left out, so the graph shows only edges with an effect."""
    found = try_to_order(callbacks)
    if found is None:
        return
    graph = as_graph(found)
    for edge in found.edges:
        if {reason.kind for reason in edge.reasons} <= {"no conflict", "resource"}:
            graph.remove_edge(edge.before, edge.after)
            assert not networkx.has_path(graph, edge.before, edge.after)
            graph.add_edge(edge.before, edge.after)


@settings(max_examples=examples(100))
@given(declared())
def test_a_cycle_error_names_a_real_cycle(callbacks: list[At]) -> None:
    """Rule 9: each line of the message is an edge, and the lines together form a cycle."""
    try:
        ordered(*callbacks)
    except CycleError as error:
        steps = re.findall(r"^  (\S+) before (\S+): \S", str(error), re.MULTILINE)
        names = error.cycle
        assert len(set(names)) == len(names) >= 2
        assert steps == list(zip(names, (*names[1:], names[0]), strict=True))
    except FlowtrainError:
        pass


@settings(max_examples=examples(100))
@given(st.lists(st.tuples(st.sets(st.sampled_from("uvwxyz")), st.sets(st.sampled_from("uvwxyz"))), max_size=8))
def test_setup_order(declarations: list[tuple[set[str], set[str]]]) -> None:
    """Rule 7: writers come before readers; callbacks inside a cycle follow the list."""
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


# --- two writers (rule 7)


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


# --- cycles (rule 9)


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
