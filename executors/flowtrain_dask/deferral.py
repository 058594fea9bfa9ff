"""Which callbacks are deferred, which share a lane, and why one that could be deferred is not.

A deferrable callback stays in place where something in place needs it to have run: a callback that names it in
``run_after``, or one that uses a resource of its. That one staying can keep others, so it is asked until nothing
changes. Deferred callbacks that are joined in one of these two ways share a lane, which keeps their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowtrain.access import Path, Read
from flowtrain.callback import Callback
from flowtrain.errors import CallbackError
from flowtrain.graph import Node
from flowtrain.holding import LIVE, is_learner, reachable
from flowtrain.state import LearnerState

__all__ = ["Deferral", "check_holds_no_state", "decide", "stays_here"]


@dataclass(frozen=True)
class Deferral:
    """What is deferred.

    Attributes:
        lanes: The callbacks of each lane, in list order.
        kept: Why each other deferrable callback runs in place, by its name.
    """

    lanes: tuple[tuple[Node, ...], ...] = ()
    kept: dict[str, str] | None = None

    def lane_of(self, node: Node) -> int | None:
        """Return the number of a callback's lane; ``None`` if it runs in place."""
        return next((number for number, lane in enumerate(self.lanes) if node in lane), None)

    def why_kept(self, node: Node) -> str:
        """Return why a callback runs in place though it is deferrable; empty where there is nothing to say."""
        return (self.kept or {}).get(node.name, "")


def decide(nodes: Sequence[Node]) -> Deferral:
    """Decide what is deferred."""
    kept: dict[str, str] = {}
    deferred = [node for node in nodes if node.callback.deferrable]
    while True:
        staying = {id(node) for node in deferred}
        in_place = [node for node in nodes if id(node) not in staying]
        found = {node.name: why for node in deferred if (why := _held_by(node, in_place))}
        if not found:
            return Deferral(_lanes(deferred), kept)
        kept |= found
        deferred = [node for node in deferred if node.name not in found]


def stays_here(node: Node) -> str:
    """Return why a deferred callback cannot leave this process; empty if it can."""
    for path, kind in node.union:
        if isinstance(kind, Read) and kind.full:
            return f"it declares Read(full=True) on {'.'.join(path)!r}"
    return ""


def check_holds_no_state(callback: Callback, name: str, state: LearnerState) -> None:
    """Check that no attribute of a deferred callback is the learner, a view or its state.

    Raises:
        CallbackError: One is: on a lane it would be read while training changes it.
    """
    parts = (state.model, state.optimizer, state.optimizers, state.data, state.params, state.cbstate)
    live = {id(part) for part in (state, *parts) if part is not None}
    if isinstance(state.model, torch.nn.Module):
        live |= {id(part) for part in (*state.model.modules(), *state.model.parameters())}
    for attribute, value in vars(callback).items():
        held = (one for one in reachable(value) if id(one) in live or isinstance(one, LIVE) or is_learner(one))
        if (found := next(held, None)) is not None:
            raise CallbackError(
                f"{name} is deferred and keeps {type(found).__name__} in its attribute {attribute!r}: training goes on "
                f"changing that while the callback reads it. Declare what its handlers read, and read it from their "
                f"`learner`; or set deferrable = False."
            )


def _held_by(node: Node, in_place: Sequence[Node]) -> str:
    for other in in_place:
        if _runs_after(other, node):
            return f"{other.name} runs in place, after it"
        shared = _resources(node) & _resources(other)
        if shared:
            return f"{other.name} runs in place and shares {'.'.join(min(shared))}"
    return ""


def _lanes(deferred: Sequence[Node]) -> tuple[tuple[Node, ...], ...]:
    lanes: list[list[Node]] = []
    for node in deferred:
        joined = [lane for lane in lanes if any(_joined(node, other) for other in lane)]
        lanes = [lane for lane in lanes if lane not in joined]
        lanes.append(sorted([node, *(other for lane in joined for other in lane)], key=lambda one: one.position))
    return tuple(tuple(lane) for lane in sorted(lanes, key=lambda lane: lane[0].position))


def _joined(one: Node, other: Node) -> bool:
    return _runs_after(one, other) or _runs_after(other, one) or bool(_resources(one) & _resources(other))


def _runs_after(later: Node, earlier: Node) -> bool:
    return any(isinstance(earlier.callback, kind) for kind in later.callback.run_after())


def _resources(node: Node) -> set[Path]:
    return {path[:2] for path, _ in node.union if path[0] == "resource"}
