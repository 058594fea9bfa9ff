"""The resolver: collects the answers to a conflict from both callbacks and from `resolve`, and makes one of them.

All answers count, so the result does not depend on who is asked first: `Unresolvable` by anyone is an error, `RunFirst`
beats `NoConflict`, and two `RunFirst` must name the same callback.
"""

from __future__ import annotations

from flowtrain.callback.resolution import NoConflict, Resolution, RunFirst, Unresolvable, resolutions_for
from flowtrain.errors import ResolutionError
from flowtrain.errors.arguments import is_a
from flowtrain.graph.nodes import Node, within

__all__ = ["Resolver"]


class Resolver:
    """Finds the answer to the conflict of two callbacks. Each pair is asked once, though it may meet at many events."""

    def __init__(self) -> None:
        # By the positions of both callbacks: the callback that runs first (or None), the answer, and its source.
        self._answers: dict[tuple[int, int], tuple[Node | None, Resolution, str] | None] = {}

    def answer(self, one: Node, other: Node) -> tuple[Node | None, Resolution, str] | None:
        """Return the answer to the conflict of two callbacks, or ``None`` where no answer was given.

        Returns:
            The callback that runs first (``None`` for `NoConflict`), the resolution, and the call that gave it.

        Raises:
            ResolutionError: An answer is `Unresolvable`, two answers contradict each other, or one names neither
                callback.
        """
        first, second = one.asked, other.asked
        if first is second:  # the arrival of what a callback has written earlier, and the callback itself
            return None
        key = (first.position, second.position)
        if key not in self._answers:
            self._answers[key] = self._ask(first, second)
        if (answer := self._answers[key]) is None or answer[0] is None:
            return answer
        return (one if answer[0] is first else other, *answer[1:])

    def _ask(self, one: Node, other: Node) -> tuple[Node | None, Resolution, str] | None:
        """Collect the answers of `resolve` and of both callbacks, and return the one that counts."""
        answers = resolutions_for(one.callback, other.callback)
        for asked, about in ((one, other), (other, one)):
            with within(f"{asked.name}.resolve_conflict"):
                answer = asked.callback.resolve_conflict(about.callback)
            if answer is not None:
                answers.append((f"{asked.name}.resolve_conflict({about.name})", answer))
        chosen: tuple[Node | None, Resolution, str] | None = None
        for source, answer in answers:
            if isinstance(answer, Unresolvable):
                raise ResolutionError(
                    f"{one.name} and {other.name} cannot be used together: {source} says Unresolvable(). Remove one."
                )
            if isinstance(answer, RunFirst):
                winner = _winner(answer, one, other, source)
                if chosen is not None and chosen[0] not in (None, winner):
                    raise ResolutionError(
                        f"{chosen[2]} lets {chosen[0].name if chosen[0] else ''} run first and {source} lets "
                        f"{winner.name} run first. Both answers count, so they must agree: change one of them."
                    )
                chosen = (winner, answer, source)
            elif is_a(answer, NoConflict):
                chosen = chosen or (None, answer, source)
            else:
                raise ResolutionError(
                    f"{source} returned {answer!r}. Return RunFirst(self), RunFirst(other), NoConflict(), "
                    f"Unresolvable(), or None for no answer."
                )
        return chosen


def _winner(answer: RunFirst, one: Node, other: Node, source: str) -> Node:
    """Return the one of two callbacks that a `RunFirst` names, by itself or by its type."""
    named = answer.callback
    fits = [node for node in (one, other) if named is node.callback or named is type(node.callback)]
    if not fits and isinstance(named, type):  # a type names its own callbacks before those of its subclasses
        fits = [node for node in (one, other) if isinstance(node.callback, named)]
    if len(fits) != 1:
        which = "both of them" if fits else "neither of them"
        raise ResolutionError(
            f"{source} says RunFirst({named!r}) for {one.name} and {other.name}, which names {which}. "
            f"Name one of the two callbacks."
        )
    return fits[0]
