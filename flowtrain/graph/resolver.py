"""The resolver: asks both callbacks, and `resolve`, for the answer to a conflict."""

from __future__ import annotations

from flowtrain.callback.resolution import NoConflict, Resolution, RunFirst, Unresolvable, resolutions_for
from flowtrain.errors import ResolutionError, is_a
from flowtrain.graph.nodes import Node

__all__ = ["Resolver"]


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
