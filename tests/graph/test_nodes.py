"""The callback graph as users inspect it: callbacks, and edges with their reasons and events."""

from __future__ import annotations

from collections.abc import Sequence

from flowtrain import (
    BatchEnd,
    EpochEnd,
    Event,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    callback_graph,
    on,
)
from flowtrain.graph.nodes import Node
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from tests.support.ordered import At

W, R = Write(), Read()


def test_the_graph_has_reasons_and_events_on_every_edge() -> None:
    class Twice(At):
        @on(EpochEnd, TrainingPhase)
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    class Reader(Twice): ...

    writer, reader = Twice({"cbstate.x": W}), Reader({"cbstate.x": R})
    alone = At(name="alone")
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


def test_a_node_is_in_one_place() -> None:
    """Names, positions and declarations of the nodes follow the list of callbacks."""
    one, other = At({"batch.loss": R}), At({"cbstate.x": W})
    nodes: Sequence[Node] = Callbacks([one, other], LearnerState()).nodes
    assert [(node.callback, node.name, node.position) for node in nodes] == [(one, "At", 0), (other, "At#2", 1)]
    assert [node.union for node in nodes] == [((("batch", "loss"), R),), ((("cbstate", "x"), W),)]
