"""The order of the callbacks that meet at one event and phase, derived from their declarations.

Two callbacks meet where both have a handler for the same event and phase. Their declarations become edges:

1. ``run_after``: the callbacks of the named type run first.
2. `RunFirst`, the answer to a conflict, makes an edge.
3. A writer runs before a reader of the same state, unless one of the first two rules orders this pair.
4. Two writers of the same state need a chain of edges between them, or `NoConflict`; otherwise they are a
   `WriteConflictError`.
5. `NoConflict` pairs and users of one resource get an edge in serial order. These *soft* edges are added last, when the
   serial order is known, so they close no cycle; they keep an executor from running the two at the same time.

The serial order is the topological order that follows the list of callbacks wherever it has a choice. Callbacks that
never meet need no order, so their declarations make no cycle.

`Draft` holds the edges while they are found. `check_writers` and `cycle_error` make the errors for declarations that
have no order.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flowtrain.callback.access import Declaration, Path, at_event, dotted
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.resolution import NoConflict
from flowtrain.errors import CallbackError, CycleError, WriteConflictError
from flowtrain.errors.arguments import is_a
from flowtrain.graph.nodes import Edge, Node, Order, Reason, within
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
        event_type: The event type.
        phase_type: The phase type.
        participants: The callbacks that meet, each with its handler, in list order.
        resolver: Finds the answers to conflicts.
        reach: Maps paths to regions; without it the regions are used that hold without a learner.

    Raises:
        WriteConflictError: Two callbacks write the same state, and nothing orders them.
        CycleError: The edges form a cycle.
        ResolutionError: The answers to a conflict cannot be followed (`Resolver.answer`).
        CallbackError: A `run_after` returns something else than callback types.
    """
    nodes = [node for node, _ in participants]
    draft = Draft(nodes, f"{event_type.__name__}, {phase_type.__name__}")
    _add_run_after(draft)
    declarations = [at_event(node.access[handler]) for node, handler in participants]
    _add_conflicts(draft, declarations, resolver, reach)
    sequence = _topological(draft)
    _add_resources(draft, declarations, sequence)
    # Two writers need an order that has a reason, and the serial order of a soft edge has none: hard edges only.
    check_writers(draft, _ancestors(sequence, draft.hard))
    # A draft counts positions in list order; an `Order` counts them in serial order.
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
    """Add the edges of `Callback.run_after`; a callback does not run after itself, even if its type is named."""
    instances: dict[type, list[int]] = {}
    for after, node in enumerate(draft.nodes):
        with within(f"{node.name}.run_after"):
            types = node.callback.run_after()
        if not is_a(types, tuple) or not all(is_a(kind, type) for kind in types):
            raise CallbackError(
                f"{node.name}.run_after() returned {types!r}. Return a tuple of callback types, as (Recorder,)."
            )
        for kind in types:
            if kind not in instances:
                callbacks = [other.asked.callback for other in draft.nodes]
                instances[kind] = [index for index, other in enumerate(callbacks) if isinstance(other, kind)]
            for before in instances[kind]:
                if before != after and draft.nodes[before].asked is not node:
                    draft.edge(before, after, "run_after", f"{node.name}.run_after() names {kind.__name__}")
                    draft.settled.add((min(before, after), max(before, after)))


def _add_conflicts(draft: Draft, declarations: Sequence[Declaration], resolver: Resolver, reach: Reach | None) -> None:
    """Add the edges of conflicts: those of the answers, and otherwise writer before reader.

    Pairs of writers without an answer are collected in `Draft.writers`: other edges may still order them.
    """
    # Users of one resource are no conflict: `_add_resources` pairs them.
    of_state = [tuple(item for item in declared if item[0][0] != "resource") for declared in declarations]
    for meeting in meetings(of_state, reach):
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
            second_writes = meeting.writes[1]
            before, after = (second, first) if second_writes else (first, second)
            written, read = meeting.paths[::-1] if second_writes else meeting.paths
            shown = "it" if written == read else dotted(read)
            text = f"{draft.name(before)} writes {dotted(written)}, {draft.name(after)} reads {shown}{meeting.why}"
            draft.edge(before, after, "access", text)


def _add_resources(draft: Draft, declarations: Sequence[Declaration], sequence: Sequence[int]) -> None:
    """Pair each user of a resource with the last user before it: a chain orders them all with the fewest edges.

    A callback that declares ``callbacks`` may look at the attributes of all others, which these change without
    declaring it, so it is paired with each of them.
    """
    last: dict[Path, int] = {}  # the last user of each resource so far
    below: dict[Path, set[Path]] = {}  # the resources that were used, at and below each path
    for position in sequence:
        if any(path[0] == "callbacks" for path, _ in declarations[position]):
            for other in set(sequence) - {position}:
                text = f"{draft.name(position)} sees callbacks, and {draft.name(other)} is one"
                draft.pair(other, position, "access", text)
        used = [path for path, _ in declarations[position] if path[0] == "resource"]
        # A resource may have parts, as ``resource.files.a``: a user of all of it meets the users of each part.
        for path in used:
            for other in (*(path[:length] for length in range(2, len(path))), *below.get(path, ())):
                if other in last:
                    draft.pair(last[other], position, "resource", f"both use {dotted(max(path, other, key=len))}")
        for path in used:
            last[path] = position
            for length in range(2, len(path) + 1):
                below.setdefault(path[:length], set()).add(path)


def _topological(draft: Draft) -> list[int]:
    """Return the positions in the topological order that prefers list order (Kahn's algorithm with a heap).

    Raises:
        CycleError: The edges form a cycle.
    """
    after: dict[int, list[int]] = {}
    waiting = [0] * len(draft.nodes)
    for before, later in draft.hard:
        after.setdefault(before, []).append(later)
        waiting[later] += 1
    free = [position for position, count in enumerate(waiting) if not count]  # sorted, and so a heap already
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
    """Return the ancestors of each position: the positions with a chain of edges to it, as the bits of an integer.

    Args:
        sequence: The positions in topological order.
        edges: Pairs of positions, of which the first comes before the second.
    """
    parents: dict[int, list[int]] = {}
    for before, after in edges:
        parents.setdefault(after, []).append(before)
    ancestors = [0] * len(sequence)
    for position in sequence:
        for parent in parents.get(position, ()):
            ancestors[position] |= ancestors[parent] | 1 << parent
    return ancestors


def _add_soft(
    count: int, edges: dict[tuple[int, int], list[Reason]], soft: Mapping[tuple[int, int], list[Reason]]
) -> list[int]:
    """Add the soft edges that no chain of other edges implies, and return the ancestors with them.

    Args:
        count: The number of positions, which are counted in serial order.
        edges: The edges with their reasons; soft edges are added here.
        soft: The soft edges, in serial order, with their reasons.
    """
    parents: list[list[int]] = [[] for _ in range(count)]
    soft_parents: list[list[int]] = [[] for _ in range(count)]
    for before, after in edges:
        parents[after].append(before)
    for before, after in soft:
        soft_parents[after].append(before)
    ancestors = [0] * count
    for position in range(count):
        for parent in parents[position]:
            ancestors[position] |= ancestors[parent] | 1 << parent
        for parent in sorted(soft_parents[position], reverse=True):  # the nearest first, as it may imply the others
            if not ancestors[position] >> parent & 1:
                ancestors[position] |= ancestors[parent] | 1 << parent
                edges[parent, position] = list(soft[parent, position])
    return ancestors


def order_setup(nodes: Sequence[Node], reach: Reach | None = None) -> list[Node]:
    """Return the order in which `setup` is called: writers before readers, and list order within a cycle.

    A cycle is no error here, as it is at an event: the union of several handlers' declarations often has one.

    Args:
        nodes: The callbacks to set up, in list order.
        reach: Maps paths to regions, as for `order_event`.
    """
    writers: dict[int, set[int]] = {}  # by reader
    for meeting in meetings([node.union for node in nodes], reach):
        if meeting.writes[0] != meeting.writes[1]:
            writer, reader = (meeting.first, meeting.second)[:: -1 if meeting.writes[1] else 1]
            writers.setdefault(reader, set()).add(writer)
    remaining = dict.fromkeys(range(len(nodes)))  # a set that keeps list order
    order: list[Node] = []
    while remaining:
        ready = next((position for position in remaining if not writers.get(position, set()) & remaining.keys()), None)
        for position in _cycle(remaining, writers) if ready is None else [ready]:
            del remaining[position]
            order.append(nodes[position])
    return order


def _cycle(remaining: Iterable[int], writers: Mapping[int, set[int]]) -> list[int]:
    """Return, in list order, the first positions that wait for each other and for no further position."""
    positions = set(remaining)
    awaited: dict[int, set[int]] = {}  # by position, all positions that it waits for, directly or not
    for position in positions:
        reached: set[int] = set()
        pending = [position]
        while pending:
            new = (writers.get(pending.pop(), set()) & positions) - reached
            reached |= new
            pending.extend(new)
        awaited[position] = reached
    first = next(position for position in remaining if all(position in awaited[other] for other in awaited[position]))
    return sorted(awaited[first])


@dataclass
class Draft:
    """The edges between the participants of one event, while they are found.

    Attributes:
        nodes: The participants in list order; edges are pairs of positions in it.
        where: The event and phase, for messages, as ``"BatchEnd, TrainingPhase"``.
        hard: The edges that determine the serial order, each with its reasons.
        soft: The pairs that must not run at the same time, in whichever order, each with its reasons.
        writers: The pairs of writers that need an order.
        settled: The pairs that a ``run_after`` has ordered, the smaller position first.
    """

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
        """Add an edge with a reason, or a further reason to an edge."""
        reasons = self.hard.setdefault((before, after), [])
        if all(reason.text != text for reason in reasons):
            reasons.append(Reason(kind, text))

    def pair(self, one: int, other: int, kind: str, text: str) -> None:
        """Add a pair that must not run at the same time, with a reason, or a further reason to a pair."""
        reasons = self.soft.setdefault((min(one, other), max(one, other)), [])
        if all(reason.text != text for reason in reasons):
            reasons.append(Reason(kind, text))


def cycle_error(draft: Draft, stuck: set[int]) -> CycleError:
    """Return the error for a cycle, with the reason of each of its edges.

    Args:
        draft: The edges.
        stuck: The positions that the topological order could not place; at least one cycle is among them.
    """
    parents: dict[int, list[int]] = {}
    for before, later in draft.hard:
        if before in stuck and later in stuck:
            parents.setdefault(later, []).append(before)
    position, seen = min(stuck), [min(stuck)]
    while True:
        position = min(parents[position])  # every stuck position waits for a stuck one, so walking back must repeat
        if position in seen:
            cycle = seen[seen.index(position) :][::-1]
            break
        seen.append(position)
    first = cycle.index(min(cycle))
    cycle = [*cycle[first:], *cycle[:first]]  # begin with the callback that comes first in the list
    names = tuple(draft.name(position) for position in cycle)
    lines = [
        f"  {draft.name(before)} before {draft.name(after)}: {'; '.join(map(str, draft.hard[before, after]))}"
        for before, after in zip(cycle, (*cycle[1:], cycle[0]), strict=True)
    ]
    advice = "take a type out of run_after, change a resolution, declare less, or give a handler an access= of its own"
    # The message offers one edge to turn around: `resolve` can do that with an edge that only declarations make.
    for before, after in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
        if all(reason.kind == "access" for reason in draft.hard[before, after]):
            kinds = [type(draft.nodes[position].asked.callback) for position in (before, after)]
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
    """Check that of each two callbacks that write the same state one runs before the other.

    Args:
        draft: The edges, and the pairs of writers.
        ancestors: The ancestors of each position along the hard edges, as the bits of an integer.

    Raises:
        WriteConflictError: Nothing orders two writers. The error names the first such pair in the list.
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
    types = [type(draft.nodes[position].asked.callback) for position in (first, second)]
    # If one of the two is bundled, the message offers methods for the other one, which the user can edit.
    bundled = [kind.__module__.startswith("flowtrain.") for kind in types]
    one, other = (kind.__name__ for kind in (types[::-1] if bundled == [False, True] else types))
    paths = (dotted(meeting.paths[0]), dotted(meeting.paths[1]))
    pairs = len({(first, second) for first, second, _ in conflicts})
    more = f" ({pairs - 1} more such pairs at this event.)" if pairs > 1 else ""
    if types[0] is types[1]:  # `RunFirst` and ``run_after`` cannot order two callbacks of one type
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
    """Return a hint at a narrower path, for a path that reaches more than its name shows; otherwise an empty text."""
    if path == ("batch",):
        return f" If {name} writes no gradients, let it declare the entries that it writes, such as batch.targets."
    if path == ("optimizer",) or (path[0] == "optimizer" and path[-1] == "param_groups"):
        narrow = dotted((*(path if len(path) == 1 else path[:-1]), "hyperparams"))
        return f" If {name} sets hyperparameters only, let it use and declare {narrow}."
    return ""
