"""The callback graph: for each event and phase, who must run before whom, and why.

Two callbacks meet where both have a handler for the same event and phase. What they declare becomes edges:

1. ``run_after``: the named type first.
2. Resolutions of conflicts: `RunFirst` is an edge.
3. A writer before a reader of what it writes, unless one of the two above orders this pair.
4. Two writers need a path of edges between them, or `NoConflict`; otherwise that is a `WriteConflictError`.
5. `NoConflict` pairs and users of one resource get an edge in serial order, added last. It closes no cycle, and it
   keeps an executor from running the two at the same time.

The serial order is the topological order that follows the list of callbacks wherever there is a choice. Callbacks that
never meet need no order, so what they declare for different events makes no cycle.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from flowtrain.access import Declaration, Meeting, Path, dotted, meetings
from flowtrain.callback import Callback
from flowtrain.errors import CallbackError, CycleError, ResolutionError, WriteConflictError, is_a
from flowtrain.events import Event
from flowtrain.handler import Handler
from flowtrain.phases import Phase
from flowtrain.resolution import NoConflict, Resolution, RunFirst, Unresolvable, resolutions_for

if TYPE_CHECKING:
    import networkx

CallbackGraph: TypeAlias = "networkx.DiGraph[Any]"

__all__ = ["CallbackGraph", "Edge", "Node", "Order", "Reason", "Resolver", "order_event", "order_setup", "to_networkx"]


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
    """

    callback: Callback
    name: str
    position: int
    handlers: tuple[tuple[type, Handler], ...]
    access: Mapping[Handler, Declaration]
    union: Declaration


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


class Resolver:
    """Asks both callbacks, and `resolve`, for the answer to a conflict; each pair is asked once."""

    def __init__(self) -> None:
        self._answers: dict[tuple[int, int], tuple[Node | None, Resolution, str] | None] = {}

    def answer(self, one: Node, other: Node) -> tuple[Node | None, Resolution, str] | None:
        """Return who runs first (or ``None``), the answer, and who gave it; ``None`` where nobody answered.

        Raises:
            ResolutionError: An answer is `Unresolvable`, two contradict each other, or one names neither callback.
        """
        key = (one.position, other.position)
        if key not in self._answers:
            self._answers[key] = self._ask(one, other)
        return self._answers[key]

    def _ask(self, one: Node, other: Node) -> tuple[Node | None, Resolution, str] | None:
        heard = resolutions_for(one.callback, other.callback)
        for asked, about in ((one, other), (other, one)):
            answer = asked.callback.resolve_conflict(about.callback)
            if answer is not None:
                heard.append((f"{asked.name}.resolve_conflict({about.name})", answer))
        first: tuple[Node | None, Resolution, str] | None = None
        for source, answer in heard:
            if isinstance(answer, Unresolvable):
                raise ResolutionError(
                    f"{one.name} and {other.name} cannot be used together: {source} says Unresolvable(). Remove one."
                )
            if isinstance(answer, RunFirst):
                winner = _winner(answer, one, other, source)
                if first is not None and first[0] not in (None, winner):
                    raise ResolutionError(
                        f"{first[2]} lets {first[0].name if first[0] else ''} run first and {source} lets "
                        f"{winner.name} run first. Both are heard, so they must agree."
                    )
                first = (winner, answer, source)
            elif is_a(answer, NoConflict):
                first = first or (None, answer, source)
            else:
                raise ResolutionError(
                    f"{source} returned {answer!r}. Return RunFirst(self), RunFirst(other), NoConflict(), "
                    f"Unresolvable(), or None for no answer."
                )
        return first


def _winner(answer: RunFirst, one: Node, other: Node, source: str) -> Node:
    named = answer.callback
    fits = [node for node in (one, other) if any(named is each for each in (node.callback, type(node.callback)))]
    if not fits and isinstance(named, type):  # a type names its own callbacks before those of its subclasses
        fits = [node for node in (one, other) if isinstance(node.callback, named)]
    if len(fits) != 1:
        which = "both of them" if fits else "neither of them"
        raise ResolutionError(
            f"{source} says RunFirst({named!r}) for {one.name} and {other.name}, which names {which}. "
            f"Name one of the two callbacks."
        )
    return fits[0]


@dataclass
class _Draft:
    """The edges between the participants of one event while they are found, by positions in `nodes`."""

    nodes: Sequence[Node]
    where: str
    hard: dict[tuple[int, int], list[Reason]] = field(default_factory=dict)
    soft: dict[tuple[int, int], list[Reason]] = field(default_factory=dict)
    writers: list[tuple[int, int, Meeting]] = field(default_factory=list)
    settled: set[tuple[int, int]] = field(default_factory=set)

    def name(self, position: int) -> str:
        return self.nodes[position].name

    def edge(self, before: int, after: int, kind: str, text: str) -> None:
        reasons = self.hard.setdefault((before, after), [])
        if all(reason.text != text for reason in reasons):
            reasons.append(Reason(kind, text))

    def pair(self, one: int, other: int, kind: str, text: str) -> None:
        reasons = self.soft.setdefault((min(one, other), max(one, other)), [])
        if all(reason.text != text for reason in reasons):
            reasons.append(Reason(kind, text))


def order_event(
    event_type: type[Event],
    phase_type: type[Phase],
    participants: Sequence[tuple[Node, Handler]],
    resolver: Resolver,
) -> Order:
    """Order the callbacks that meet at one event and phase.

    Args:
        event_type: The event.
        phase_type: The phase.
        participants: The callbacks with a handler for it, each with that handler, in list order.
        resolver: Answers conflicts.

    Raises:
        WriteConflictError: Two writers without an order.
        CycleError: The edges go in a circle.
        ResolutionError: See `Resolver.answer`.
        CallbackError: A `run_after` that holds something other than callback types.
    """
    nodes = [node for node, _ in participants]
    draft = _Draft(nodes, f"{event_type.__name__}, {phase_type.__name__}")
    _add_run_after(draft)
    declarations = [node.access[handler] for node, handler in participants]
    _add_conflicts(draft, declarations, resolver)
    sequence = _topological(draft)
    _add_resources(draft, declarations, sequence)
    _check_writers(draft, _ancestors(sequence, draft.hard))
    place = {position: index for index, position in enumerate(sequence)}
    edges = {(place[before], place[after]): reasons for (before, after), reasons in draft.hard.items()}
    soft = {(min(place[a], place[b]), max(place[a], place[b])): reasons for (a, b), reasons in draft.soft.items()}
    ancestors = _add_soft(len(nodes), edges, soft)
    return Order(
        nodes=tuple(nodes[position] for position in sequence),
        handlers=tuple(participants[position][1] for position in sequence),
        edges=tuple(Edge(before, after, tuple(reasons)) for (before, after), reasons in sorted(edges.items())),
        ancestors=tuple(ancestors),
    )


def _add_run_after(draft: _Draft) -> None:
    instances: dict[type, list[int]] = {}
    for after, node in enumerate(draft.nodes):
        types = node.callback.run_after()
        if not is_a(types, tuple) or not all(is_a(kind, type) for kind in types):
            raise CallbackError(
                f"{node.name}.run_after() returned {types!r}. Return a tuple of callback types, as (Recorder,)."
            )
        for kind in types:
            if kind not in instances:
                instances[kind] = [index for index, other in enumerate(draft.nodes) if isinstance(other.callback, kind)]
            for before in instances[kind]:
                if before != after:
                    draft.edge(before, after, "run_after", f"{node.name}.run_after() names {kind.__name__}")
                    draft.settled.add((min(before, after), max(before, after)))


def _add_conflicts(draft: _Draft, declarations: Sequence[Declaration], resolver: Resolver) -> None:
    for meeting in meetings([tuple(item for item in each if item[0][0] != "resource") for each in declarations]):
        first, second = meeting.first, meeting.second
        answer = resolver.answer(draft.nodes[first], draft.nodes[second])
        if answer is not None:
            winner, resolution, source = answer
            if isinstance(resolution, NoConflict):
                draft.pair(first, second, "no conflict", f"NoConflict() by {source}: in serial order, never together")
            else:
                before, after = (first, second) if draft.nodes[first] is winner else (second, first)
                draft.edge(before, after, "resolution", f"RunFirst({draft.name(before)}) by {source}")
        elif (first, second) in draft.settled:
            continue  # run_after orders this pair, whichever of them writes
        elif all(meeting.writes):
            draft.writers.append((first, second, meeting))
        else:
            turned = meeting.writes[1]
            before, after = (second, first) if turned else (first, second)
            written, read = meeting.paths[::-1] if turned else meeting.paths
            what = "it" if written == read else dotted(read)
            text = f"{draft.name(before)} writes {dotted(written)}, {draft.name(after)} reads {what}"
            draft.edge(before, after, "access", text)


def _add_resources(draft: _Draft, declarations: Sequence[Declaration], sequence: Iterable[int]) -> None:
    """Pair each user of a resource with the last one before it. That is a chain, and needs no pair for every two."""
    last: dict[Path, int] = {}
    below: dict[Path, set[Path]] = {}
    for position in sequence:
        used = [path for path, _ in declarations[position] if path[0] == "resource"]
        for path in used:
            for other in (*(path[:length] for length in range(2, len(path))), *below.get(path, ())):
                if other in last:
                    draft.pair(last[other], position, "resource", f"both use {dotted(max(path, other, key=len))}")
        for path in used:
            last[path] = position
            for length in range(2, len(path) + 1):
                below.setdefault(path[:length], set()).add(path)


def _topological(draft: _Draft) -> list[int]:
    """Return the positions in the topological order that prefers list order (Kahn's algorithm with a heap)."""
    after: dict[int, list[int]] = {}
    waiting = [0] * len(draft.nodes)
    for before, later in draft.hard:
        after.setdefault(before, []).append(later)
        waiting[later] += 1
    free = [position for position, count in enumerate(waiting) if not count]
    sequence: list[int] = []
    while free:
        position = heapq.heappop(free)
        sequence.append(position)
        for later in after.get(position, ()):
            waiting[later] -= 1
            if not waiting[later]:
                heapq.heappush(free, later)
    if len(sequence) < len(draft.nodes):
        raise _cycle_error(draft, {position for position, count in enumerate(waiting) if count})
    return sequence


def _cycle_error(draft: _Draft, stuck: set[int]) -> CycleError:
    """Find a cycle among the positions that never became free, and say what holds it together."""
    into: dict[int, list[int]] = {}
    for before, later in draft.hard:
        if before in stuck and later in stuck:
            into.setdefault(later, []).append(before)
    position, seen = min(stuck), [min(stuck)]
    while True:
        position = min(into[position])  # every stuck position waits for a stuck one, so walking back must repeat
        if position in seen:
            cycle = seen[seen.index(position) :][::-1]
            break
        seen.append(position)
    first = cycle.index(min(cycle))
    cycle = [*cycle[first:], *cycle[:first]]  # from the one that comes first in the list
    names = tuple(draft.name(position) for position in cycle)
    lines = [
        f"  {draft.name(before)} before {draft.name(after)}: {'; '.join(map(str, draft.hard[before, after]))}"
        for before, after in zip(cycle, (*cycle[1:], cycle[0]), strict=True)
    ]
    advice = "take a type out of run_after, change a resolution, declare less, or give a handler an access= of its own"
    for before, after in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
        if all(reason.kind == "access" for reason in draft.hard[before, after]):
            kinds = [type(draft.nodes[position].callback) for position in (before, after)]
            one, other = (kind.__name__ for kind in kinds)
            answer = "NoConflict()" if kinds[0] is kinds[1] else f"RunFirst({other})"
            advice += f"; or turn one edge around: resolve({one}, {other}, {answer})"
            break
    return CycleError(
        names,
        draft.where,
        f"The callbacks {', '.join(names)} wait for each other at ({draft.where}):\n"
        + "\n".join(lines)
        + f"\nBreak the circle at one of these: {advice}.",
    )


def _ancestors(sequence: Sequence[int], edges: Iterable[tuple[int, int]]) -> list[int]:
    """Return, by position, what comes before it along edges, as the bits of an integer."""
    before: dict[int, list[int]] = {}
    for one, other in edges:
        before.setdefault(other, []).append(one)
    found = [0] * len(sequence)
    for position in sequence:
        for one in before.get(position, ()):
            found[position] |= found[one] | 1 << one
    return found


def _check_writers(draft: _Draft, ancestors: Sequence[int]) -> None:
    conflicts = [
        (first, second, meeting)
        for first, second, meeting in draft.writers
        if not (ancestors[first] >> second & 1 or ancestors[second] >> first & 1)
    ]
    if not conflicts:
        return
    first, second, meeting = min(conflicts, key=lambda conflict: conflict[:2])
    names = (draft.name(first), draft.name(second))
    types = [type(draft.nodes[position].callback) for position in (first, second)]
    one, other = (kind.__name__ for kind in types)
    paths = (dotted(meeting.paths[0]), dotted(meeting.paths[1]))
    pairs = len({(first, second) for first, second, _ in conflicts})
    more = f" ({pairs - 1} more such pairs at this event.)" if pairs > 1 else ""
    if types[0] is types[1]:  # a type cannot go before itself
        remedy = f"    resolve({one}, {one}, NoConflict())      # each two of them run in the order of the list\n"
    else:
        remedy = (
            f"    def run_after(self) -> tuple[type[Callback], ...]:      # in {other}\n"
            f"        return ({one},)\n\n"
            f"    def resolve_conflict(self, other: Callback) -> Resolution | None:      # in {other}\n"
            f"        return RunFirst(other) if isinstance(other, {one}) else None       # or NoConflict()\n\n"
            f"    resolve({one}, {other}, RunFirst({one}))      # for types that you do not own\n"
        )
    raise WriteConflictError(
        names,
        paths,
        draft.where,
        f"{names[0]} and {names[1]} both write at ({draft.where}), and nothing says which goes first: "
        f"{names[0]} writes {paths[0]}, {names[1]} writes {paths[1]}.{more} Say it, in one of these ways:\n\n{remedy}",
    )


def _add_soft(
    count: int, edges: dict[tuple[int, int], list[Reason]], soft: Mapping[tuple[int, int], list[Reason]]
) -> list[int]:
    """Add the edges in serial order that are not implied by others; return the ancestors with them."""
    before: list[list[int]] = [[] for _ in range(count)]
    wanted: list[list[int]] = [[] for _ in range(count)]
    for one, other in edges:
        before[other].append(one)
    for one, other in soft:
        wanted[other].append(one)
    found = [0] * count
    for position in range(count):
        for one in before[position]:
            found[position] |= found[one] | 1 << one
        for one in sorted(wanted[position], reverse=True):  # nearest first: it implies those before it
            if not found[position] >> one & 1:
                found[position] |= found[one] | 1 << one
                edges[one, position] = list(soft[one, position])
    return found


def order_setup(nodes: Sequence[Node]) -> list[Node]:
    """Return the order in which `setup` is called: writers before readers, list order inside a circle.

    Args:
        nodes: The callbacks to set up, in list order.
    """
    before: dict[int, set[int]] = {}
    for meeting in meetings([node.union for node in nodes]):
        if meeting.writes[0] != meeting.writes[1]:
            writer, reader = (meeting.first, meeting.second)[:: -1 if meeting.writes[1] else 1]
            before.setdefault(reader, set()).add(writer)
    left = dict.fromkeys(range(len(nodes)))
    order: list[Node] = []
    while left:
        ready = next((position for position in left if not before.get(position, set()) & left.keys()), None)
        for position in _circle(left, before) if ready is None else [ready]:
            del left[position]
            order.append(nodes[position])
    return order


def _circle(left: Iterable[int], before: Mapping[int, set[int]]) -> list[int]:
    """Return, in list order, the first positions that wait only for each other."""
    remaining = set(left)
    waits: dict[int, set[int]] = {}
    for position in remaining:
        found: set[int] = set()
        ahead = [position]
        while ahead:
            new = (before.get(ahead.pop(), set()) & remaining) - found
            found |= new
            ahead.extend(new)
        waits[position] = found
    first = next(position for position in left if all(position in waits[other] for other in waits[position]))
    return sorted(waits[first])


def to_networkx(
    nodes: Iterable[Node], orders: Mapping[tuple[type[Event], type[Phase]], Order]
) -> CallbackGraph:
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
