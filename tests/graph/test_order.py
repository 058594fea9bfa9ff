"""The order of callbacks that meet: the edges, their reasons, and the one serial order (rules 7, 8 and 12)."""

from __future__ import annotations

import re
from typing import Any

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from flowtrain.callback.access import Declaration, Path, meet
from flowtrain.callback.handler import find_handler
from flowtrain.graph.nodes import Order
from flowtrain.graph.order import order_event, order_setup
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.resolver import Resolver
from flowtrain.state.learner_state import LearnerState
from tests.support.examples import examples
from tests.support.ordered import A, At, B, C, SubA, pair, state_with_everything


def order(*callbacks: Callback) -> list[str]:
    """Return the names in serial order at BatchEnd; `setup` is not called."""
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
        meet(name(path), name(also)) and (isinstance(kind, Write) or isinstance(like, Write))
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
