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

Edges while they are found, and the errors for those that fit no order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flowtrain.callback.access import Declaration, Path, dotted
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.resolution import NoConflict
from flowtrain.errors import CallbackError, CycleError, WriteConflictError, is_a
from flowtrain.graph.nodes import Edge, Node, Order, Reason
from flowtrain.graph.reach import Meeting, Reach, meetings
from flowtrain.graph.resolver import Resolver

__all__ = [
    "Draft",
    "check_writers",
    "cycle_error",
    "order_event",
    "order_setup",
]


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


def _add_conflicts(draft: Draft, declarations: Sequence[Declaration], resolver: Resolver, reach: Reach | None) -> None:
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


@dataclass
class Draft:
    """The edges between the participants of one event while they are found, by positions in `nodes`."""

    nodes: Sequence[Node]
    where: str
    hard: dict[tuple[int, int], list[Reason]] = field(default_factory=dict)
    soft: dict[tuple[int, int], list[Reason]] = field(default_factory=dict)
    writers: list[tuple[int, int, Meeting]] = field(default_factory=list)
    settled: set[tuple[int, int]] = field(default_factory=set)

    def name(self, position: int) -> str:
        """Return the name of the callback at a position."""
        return self.nodes[position].name

    def edge(self, before: int, after: int, kind: str, text: str) -> None:
        """Add a reason why one runs before the other."""
        reasons = self.hard.setdefault((before, after), [])
        if all(reason.text != text for reason in reasons):
            reasons.append(Reason(kind, text))

    def pair(self, one: int, other: int, kind: str, text: str) -> None:
        """Add a reason why two never run at the same time, in whichever order."""
        reasons = self.soft.setdefault((min(one, other), max(one, other)), [])
        if all(reason.text != text for reason in reasons):
            reasons.append(Reason(kind, text))


def cycle_error(draft: Draft, stuck: set[int]) -> CycleError:
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


def check_writers(draft: Draft, ancestors: Sequence[int]) -> None:
    """Check that of each two writers of one entry one runs before the other.

    Args:
        draft: All edges that decide the order.
        ancestors: By position, what comes before it along those edges, as the bits of an integer.

    Raises:
        WriteConflictError: Two without an order; it names the first such pair in the list.
    """
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
    # The remedy goes into the user's class, where only one of the two is the user's.
    ours = [kind.__module__.startswith("flowtrain.") for kind in types]
    one, other = (kind.__name__ for kind in (types[::-1] if ours == [False, True] else types))
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
        f"{names[0]} writes {paths[0]}, {names[1]} writes {paths[1]}{meeting.why}.{more}"
        f"{''.join(map(_narrower, names, meeting.paths)) if meeting.why else ''} Say it, in one of these ways:\n\n"
        f"{remedy}",
    )


def _narrower(name: str, path: Path) -> str:
    """Say what a callback may declare instead of a path that reaches more than it names."""
    if path == ("batch",):
        return f" If {name} writes no gradients, let it declare the entries that it writes, such as batch.targets."
    if path == ("optimizer",) or (path[0] == "optimizer" and path[-1] == "param_groups"):
        narrow = dotted((*(path if len(path) == 1 else path[:-1]), "hyperparams"))
        return f" If {name} sets hyperparameters only, let it use and declare {narrow}."
    return ""
