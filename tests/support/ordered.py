"""Callbacks with the declarations that a test gives them, and the order that the graph derives for them."""

from __future__ import annotations

from collections.abc import Sequence

from flowtrain import Access, BatchEnd, Callback, Event, LearnerView, Phase, Resolution, TrainingPhase, Write, on
from flowtrain.callback.handler import find_handler
from flowtrain.graph.nodes import Order
from flowtrain.graph.order import order_event
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.resolver import Resolver
from flowtrain.state.learner_state import LearnerState


class At(Callback):
    """Handles `BatchEnd` with the declaration that the test gives; tests subclass it to get more types."""

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


def pair() -> tuple[A, B]:
    """Return two callbacks that write the same entry."""
    return A({"cbstate.x": Write()}), B({"cbstate.x": Write()})


def state_with_everything() -> LearnerState:
    """Return a state with every entry that these tests read, so that no callback fails for a missing one."""
    state = LearnerState()
    for name in ("x", "y", "z", "stats"):
        setattr(state.cbstate, name, {})
    return state


def ordered(*callbacks: Callback) -> Order:
    """Order the callbacks at (BatchEnd, TrainingPhase); `setup` is not called, and no view is made."""
    nodes = Callbacks(callbacks, state_with_everything()).nodes
    participants = []
    for node in nodes:
        handler = find_handler(node.handlers, BatchEnd, TrainingPhase)
        assert handler is not None
        participants.append((node, handler))
    return order_event(BatchEnd, TrainingPhase, participants, Resolver())


def order(*callbacks: Callback) -> list[str]:
    """Return the names in serial order."""
    return [node.name for node in ordered(*callbacks).nodes]


def edges(*callbacks: Callback) -> dict[tuple[str, str], str]:
    """Return the edges by names, each with its reasons as text."""
    found = ordered(*callbacks)
    return {
        (found.nodes[edge.before].name, found.nodes[edge.after].name): "; ".join(map(str, edge.reasons))
        for edge in found.edges
    }
