"""The types of the dependency graph: callbacks as nodes, and edges that say which of two runs first, and why.

There is one `Order` for each event and phase, since callbacks need an order only where they meet.
`flowtrain.graph.order` makes it. `to_networkx` joins all orders in one graph, for a user who wants to look at it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

from flowtrain.callback.access import Declaration
from flowtrain.callback.callback import Callback
from flowtrain.callback.conditions import Condition
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler, is_bundled_event
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.errors import CallbackError
from flowtrain.errors.arguments import is_a, is_type
from flowtrain.logging.backend import LoggerBackend

if TYPE_CHECKING:
    import networkx

CallbackGraph: TypeAlias = "networkx.DiGraph[Any]"

__all__ = [
    "CallbackGraph",
    "Edge",
    "Node",
    "Order",
    "Reason",
    "assign_names",
    "step_events",
    "to_networkx",
    "unique_names",
    "within",
]


@dataclass(frozen=True, eq=False)  # compared by identity, since nodes are keys of dictionaries
class Node:
    """A callback in the dependency graph.

    Attributes:
        callback: The callback.
        name: The unique name of the callback.
        position: The place of the callback in the learner's list, from 0.
        handlers: The handlers that the callback had when the learner was built, each with the type that registers it.
        access: The declaration of each handler.
        union: The union of the declarations of all handlers and of `Callback.state_access`.
        backends: The logging backends that the callback holds.
        sinks: The declaration of the backends as resources, which `access` and `union` include.
        exchanges: Whether a handler exchanges values with other ranks, so that all handlers run on the training thread.
        writer: For the arrival of what a callback has written with a lag, that callback; otherwise ``None``.
    """

    callback: Callback
    name: str
    position: int
    handlers: tuple[tuple[type, Handler], ...]
    access: Mapping[Handler, Declaration]
    union: Declaration
    backends: tuple[LoggerBackend, ...] = ()
    sinks: Declaration = ()
    exchanges: bool = False
    writer: Node | None = None

    @property
    def asked(self) -> Node:
        """The callback whose declarations of order count for the node: for an arrival, the callback that writes."""
        return self if self.writer is None else self.writer

    def stated(self, declaration: Declaration) -> Declaration:
        """Return a declaration of this callback without `sinks`, which a user never writes."""
        return tuple(item for item in declaration if item not in self.sinks)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one callback runs before another.

    Attributes:
        kind: ``"run_after"``, ``"resolution"``, ``"access"``, ``"no conflict"`` or ``"resource"``.
        text: The reason in words, with the names of both callbacks.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge of the dependency graph: the callback at one position of an `Order` runs before that at another.

    Attributes:
        before: The position of the callback that runs first.
        after: The position of the callback that runs later.
        reasons: Why; at least one reason.
    """

    before: int
    after: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Order:
    """The callbacks that meet at one event and phase, in serial order.

    Attributes:
        nodes: The callbacks, in serial order.
        handlers: The handler of each callback, in the same order.
        edges: The edges between the callbacks, sorted by their positions.
        ancestors: For each position, the positions that must have run before it, as the bits of an integer.
    """

    nodes: tuple[Node, ...]
    handlers: tuple[Handler, ...]
    edges: tuple[Edge, ...]
    ancestors: tuple[int, ...]


def to_networkx(nodes: Iterable[Node], orders: Mapping[tuple[type[Event], type[Phase]], Order]) -> CallbackGraph:
    """Return the dependency graph over all events: the names of callbacks, and the edges with reasons and events.

    A node has the attribute ``callback``. The late writes of a callback arrive in a node of their own, whose name ends
    with ``.arrival``. An edge has the attributes ``reason``, a text, and ``events``, a tuple of pairs of an event type
    and a phase type.

    Args:
        nodes: All callbacks of the learner; one that meets no other is in the graph too.
        orders: The order for each event type and phase type.
    """
    import networkx  # only here: it takes longer to import than everything else of flowtrain

    graph: CallbackGraph = networkx.DiGraph()
    for node in dict.fromkeys([*nodes, *(node for order in orders.values() for node in order.nodes)]):
        graph.add_node(node.name, callback=node.asked.callback)
    edges: dict[tuple[str, str], tuple[list[str], list[tuple[type[Event], type[Phase]]]]] = {}
    for event_and_phase, order in orders.items():
        for edge in order.edges:
            before, after = order.nodes[edge.before].name, order.nodes[edge.after].name
            texts, events = edges.setdefault((before, after), ([], []))
            texts += [str(reason) for reason in edge.reasons if str(reason) not in texts]
            events.append(event_and_phase)
    for (before, after), (texts, events) in edges.items():
        graph.add_edge(before, after, reason="; ".join(texts), events=tuple(events))
    return graph


_SWITCHES = (
    "deferrable", "durable", "quiet", "audited", "stops_at_nan", "agrees", "may_cancel", "may_checkpoint",
)  # fmt: skip
"""The attributes of a callback that are ``True`` or ``False``."""


@contextmanager
def within(method: str) -> Generator[None]:
    """Return a context in which a method of a user's callback is called; it notes the method on an exception.

    Args:
        method: The name of the callback and of the method: ``"Printer.setup"``.
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"raised in {method}")
        raise


def step_events(phase: type[Phase], nodes: Iterable[Node]) -> list[type[Event]]:
    """Return the known events of a phase, in order: those that it fires, and the user's events that have a handler."""
    fires = phase.events
    if fires is None:  # the phase does not list its events, so it may fire any of the library's
        fires = AbstractTrainingPhase.events or ()
    # A user's event may be fired in any phase, so it is known in all.
    handled = [handler.event_type for node in nodes for _, handler in node.handlers]
    return [*fires, *dict.fromkeys(event for event in handled if not is_bundled_event(event))]


def unique_names(callbacks: list[Callback]) -> list[tuple[Callback, str]]:
    """Return each callback with its name: its own, or the name of its type, with a number where that name is taken.

    Raises:
        CallbackError: An object is no callback, a callback is there twice, or two callbacks have set the same name.
    """
    _check(callbacks)
    own = [callback.name for callback in callbacks if not _is_automatic(callback)]
    for name in own:
        if own.count(name) > 1:
            raise CallbackError(f"Two callbacks have the name {name!r}. A name is unique in a learner: change one.")
    taken = set(own)
    # When the list changes, callbacks keep the names that they were given before: checkpoints refer to these.
    keeps_name: set[int] = set()
    for callback in callbacks:
        if _is_automatic(callback) and callback.name and callback.name not in taken:
            taken.add(callback.name)
            keeps_name.add(id(callback))
    numbers: dict[str, Iterator[int]] = {}
    named = []
    for callback in callbacks:
        name = callback.name
        if _is_automatic(callback) and id(callback) not in keeps_name:
            kind, name = type(callback).__name__, ""
            while not name or name in taken:
                number = next(numbers.setdefault(kind, count(1)))
                name = kind if number == 1 else f"{kind}#{number}"
            taken.add(name)
        named.append((callback, name))
    return named


def assign_names(named: Iterable[tuple[Callback, str]]) -> None:
    """Give every callback its name.

    Raises:
        CallbackError: A callback needs another name than it has, and its name cannot be assigned.
    """
    for callback, name in named:
        if callback.name == name:
            continue
        try:
            callback.name = name
        except AttributeError as error:  # that of a frozen dataclass is one too
            raise CallbackError(
                f"{type(callback).__name__} cannot be given its name, {name!r}: {error}. Let the name be an "
                f"attribute that can be assigned, in no frozen dataclass, or give the class a name of its own."
            ) from error


def _check(callbacks: list[Callback]) -> None:
    """Check that these are callbacks, each there once, with a name and conditions that can be used.

    Raises:
        CallbackError: They are not.
    """
    for callback in callbacks:
        if is_type(callback, Callback):
            name = getattr(callback, "__name__", "")
            raise CallbackError(f"{name} is a class. Pass an instance: {name}().")
        if not is_a(callback, Callback):
            raise CallbackError(
                f"{callback!r} is no callback. Subclass flowtrain.Callback, or wrap a function: "
                f"CustomCallback(f, EpochEnd, TrainingPhase)."
            )
        if not is_a(callback.name, str):
            raise CallbackError(
                f"{type(callback).__name__}.name is {callback.name!r}. A name is a text, such as 'Printer', or '' for "
                f"the name of the type."
            )
        for name in _SWITCHES:
            if not is_a(getattr(callback, name), bool):
                raise CallbackError(
                    f"{type(callback).__name__}.{name} is {getattr(callback, name)!r}. It is True or False: any other "
                    f"value, as 'no', would count as true."
                )
        conditions: Any = callback.conditions
        if not is_a(conditions, (tuple, list)) or not all(is_a(each, Condition) for each in conditions):
            raise CallbackError(
                f"{type(callback).__name__}.conditions is {conditions!r}. It is a tuple of conditions of "
                f"flowtrain.callback.conditions, such as (Every(BatchEnd, 10),)."
            )
    places: dict[int, int] = {}  # by id, as a user may define __eq__
    for place, callback in enumerate(callbacks):
        first = places.setdefault(id(callback), place)
        if first != place:
            raise CallbackError(
                f"{callback!r} is in the list twice, at {first} and {place}. Make two instances if you want two."
            )


def _is_automatic(callback: Callback) -> bool:
    """Tell whether the name of a callback is empty or was made here, from its type and a number."""
    kind, _, number = callback.name.partition("#")
    return not callback.name or (kind == type(callback).__name__ and (not number or number.isdigit()))
