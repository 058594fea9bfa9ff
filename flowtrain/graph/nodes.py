"""The callback graph: callbacks, and for each event and phase their order with the reason of every edge.

`flowtrain.graph.order` finds the edges. networkx holds the graph over all events, for whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from flowtrain.callback.access import Declaration
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.logging.backend import LoggerBackend

if TYPE_CHECKING:
    import networkx

CallbackGraph: TypeAlias = "networkx.DiGraph[Any]"

__all__ = ["CallbackGraph", "Edge", "Node", "Order", "Reason", "to_networkx"]


@dataclass(frozen=True, eq=False)
class Node:
    """A callback in the graph.

    Attributes:
        callback: The callback.
        name: Its unique name.
        position: Its place in the list of callbacks.
        handlers: Its handlers at the time the graph was built, each with the type that registers it.
        access: What each handler declares.
        union: What any of its handlers, or its `state_access`, declares.
        backends: The logging backends that it holds.
        sinks: What holding these declares. It is in `access` and `union` too.
    """

    callback: Callback
    name: str
    position: int
    handlers: tuple[tuple[type, Handler], ...]
    access: Mapping[Handler, Declaration]
    union: Declaration
    backends: tuple[LoggerBackend, ...] = ()
    sinks: Declaration = ()

    def stated(self, declaration: Declaration) -> Declaration:
        """Return a declaration of this callback without `sinks`, which nobody writes down."""
        return tuple(item for item in declaration if item not in self.sinks)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one callback runs before another.

    Attributes:
        kind: ``"run_after"``, ``"resolution"``, ``"access"``, ``"no conflict"`` or ``"resource"``.
        text: The reason in words, with the callbacks' names in it.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Edge:
    """`before` runs before `after`, for each of `reasons`. Both are positions in an `Order`."""

    before: int
    after: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Order:
    """The callbacks that meet at one event and phase, in serial order.

    Attributes:
        nodes: The callbacks, in serial order.
        handlers: The handler of each.
        edges: The edges between them, sorted.
        ancestors: For each position, the positions that must have run before it, as the bits of an integer.
    """

    nodes: tuple[Node, ...]
    handlers: tuple[Handler, ...]
    edges: tuple[Edge, ...]
    ancestors: tuple[int, ...]


def to_networkx(nodes: Iterable[Node], orders: Mapping[tuple[type[Event], type[Phase]], Order]) -> CallbackGraph:
    """Return one graph over all events: callbacks by name, each edge with its reasons and events.

    Node attributes: ``callback``. Edge attributes: ``reason`` (text) and ``events`` (a tuple of pairs of types).
    """
    import networkx  # only here: it takes longer to import than everything else of flowtrain

    graph: CallbackGraph = networkx.DiGraph()
    for node in nodes:
        graph.add_node(node.name, callback=node.callback)
    found: dict[tuple[str, str], tuple[list[str], list[tuple[type[Event], type[Phase]]]]] = {}
    for where, order in orders.items():
        for edge in order.edges:
            before, after = order.nodes[edge.before].name, order.nodes[edge.after].name
            texts, events = found.setdefault((before, after), ([], []))
            texts += [str(reason) for reason in edge.reasons if str(reason) not in texts]
            events.append(where)
    for (before, after), (texts, events) in found.items():
        graph.add_edge(before, after, reason="; ".join(texts), events=tuple(events))
    return graph
