"""Edges while they are found, and the errors for those that fit no order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowtrain.access import Path, dotted
from flowtrain.errors import CycleError, WriteConflictError
from flowtrain.graph import Node, Reason
from flowtrain.reach import Meeting

__all__ = ["Draft", "check_writers", "cycle_error"]


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
