"""The order of the callbacks that meet at one event and phase, from what they declare.

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

from flowtrain.access import Declaration, Path, dotted
from flowtrain.conflicts import Draft, check_writers, cycle_error
from flowtrain.errors import CallbackError, is_a
from flowtrain.events import Event
from flowtrain.graph import Edge, Node, Order, Reason
from flowtrain.handler import Handler
from flowtrain.phases import Phase
from flowtrain.reach import Reach, meetings
from flowtrain.resolution import NoConflict
from flowtrain.resolver import Resolver

__all__ = ["order_event", "order_setup"]


def order_event(
    event_type: type[Event],
    phase_type: type[Phase],
    participants: Sequence[tuple[Node, Handler]],
    resolver: Resolver,
    reach: Reach | None = None,
) -> Order:
    """Order the callbacks that meet at one event and phase.

    Args:
        event_type: The event.
        phase_type: The phase.
        participants: The callbacks with a handler for it, each with that handler, in list order.
        resolver: Answers conflicts.
        reach: Which state a path reaches; without it the regions that hold without a learner.

    Raises:
        WriteConflictError: Two writers without an order.
        CycleError: The edges go in a circle.
        ResolutionError: See `Resolver.answer`.
        CallbackError: A `run_after` that holds something other than callback types.
    """
    nodes = [node for node, _ in participants]
    draft = Draft(nodes, f"{event_type.__name__}, {phase_type.__name__}")
    _add_run_after(draft)
    declarations = [node.access[handler] for node, handler in participants]
    _add_conflicts(draft, declarations, resolver, reach)
    sequence = _topological(draft)
    _add_resources(draft, declarations, sequence)
    check_writers(draft, _ancestors(sequence, draft.hard))
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


def _add_run_after(draft: Draft) -> None:
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


def _add_conflicts(
    draft: Draft, declarations: Sequence[Declaration], resolver: Resolver, reach: Reach | None
) -> None:
    state = [tuple(item for item in each if item[0][0] != "resource") for each in declarations]
    for meeting in meetings(state, reach):
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
            text = f"{draft.name(before)} writes {dotted(written)}, {draft.name(after)} reads {what}{meeting.why}"
            draft.edge(before, after, "access", text)


def _add_resources(draft: Draft, declarations: Sequence[Declaration], sequence: Sequence[int]) -> None:
    """Pair each user of a resource with the last one before it. That is a chain, and needs no pair for every two.

    Who declares ``callbacks`` looks at the attributes of all others, which these change without a declaration, so it
    is paired with each of them.
    """
    last: dict[Path, int] = {}
    below: dict[Path, set[Path]] = {}
    for position in sequence:
        if any(path[0] == "callbacks" for path, _ in declarations[position]):
            for other in set(sequence) - {position}:
                text = f"{draft.name(position)} sees callbacks, and {draft.name(other)} is one"
                draft.pair(other, position, "access", text)
        used = [path for path, _ in declarations[position] if path[0] == "resource"]
        for path in used:
            for other in (*(path[:length] for length in range(2, len(path))), *below.get(path, ())):
                if other in last:
                    draft.pair(last[other], position, "resource", f"both use {dotted(max(path, other, key=len))}")
        for path in used:
            last[path] = position
            for length in range(2, len(path) + 1):
                below.setdefault(path[:length], set()).add(path)


def _topological(draft: Draft) -> list[int]:
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
        raise cycle_error(draft, {position for position, count in enumerate(waiting) if count})
    return sequence


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


def order_setup(nodes: Sequence[Node], reach: Reach | None = None) -> list[Node]:
    """Return the order in which `setup` is called: writers before readers, list order inside a circle.

    Args:
        nodes: The callbacks to set up, in list order.
        reach: As for `order_event`.
    """
    before: dict[int, set[int]] = {}
    for meeting in meetings([node.union for node in nodes], reach):
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
