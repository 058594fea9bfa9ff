"""Resolutions: the answers to a conflict, which say who of two callbacks runs first or that the order does not matter.

A callback answers in `Callback.resolve_conflict`, and `resolve` answers for two types that the user does not own. All
answers count: any `Unresolvable` is an error, `RunFirst` beats `NoConflict`, and two different `RunFirst` are an error.
`flowtrain.graph.resolver` collects them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from flowtrain.errors import ResolutionError
from flowtrain.errors.arguments import is_a

__all__ = ["NoConflict", "Resolution", "RunFirst", "Unresolvable", "resolutions_for", "resolve"]


@dataclass(frozen=True)
class RunFirst:
    """The named one of the two callbacks runs first.

    Args:
        callback: One of the two callbacks, or its type.
    """

    callback: object


@dataclass(frozen=True)
class NoConflict:
    """The order of the two callbacks does not matter. They run in serial order and never at the same time."""


@dataclass(frozen=True)
class Unresolvable:
    """The two callbacks cannot be used together: a learner that has both is an error."""


Resolution: TypeAlias = RunFirst | NoConflict | Unresolvable

_RESOLVED: dict[tuple[type, type], Resolution] = {}
"""The answers of `resolve` by the two types, for the whole process; a pair is stored in one order only."""


def resolve(one: type, other: type, resolution: Resolution | None) -> None:
    """Answer every conflict between two callback types, subclasses included, in learners that are built from now on.

    Args:
        one: A callback type.
        other: The other callback type, or the same one.
        resolution: The answer; ``None`` withdraws an earlier answer.

    Raises:
        ResolutionError: `one` or `other` is no type, `resolution` is no resolution, or it is a `RunFirst` that names a
            third type.
    """
    if not (is_a(one, type) and is_a(other, type)):
        raise ResolutionError(
            f"resolve() takes two callback types and a resolution, got {one!r} and {other!r}. "
            f"Write resolve(Mine, Yours, RunFirst(Mine)), with the classes and not instances of them."
        )
    if resolution is None:
        _RESOLVED.pop((one, other), None)
        _RESOLVED.pop((other, one), None)
        return
    if not is_a(resolution, (RunFirst, NoConflict, Unresolvable)):
        raise ResolutionError(
            f"resolve({one.__name__}, {other.__name__}, ...) got {resolution!r}. "
            f"Write RunFirst({one.__name__}), NoConflict() or Unresolvable()."
        )
    if isinstance(resolution, RunFirst) and all(resolution.callback is not kind for kind in (one, other)):
        raise ResolutionError(
            f"resolve({one.__name__}, {other.__name__}, RunFirst(...)) names {resolution.callback!r}. "
            f"Name one of the two types."
        )
    _RESOLVED.pop((other, one), None)  # a later answer replaces an earlier one, in whichever order the types were given
    _RESOLVED[one, other] = resolution


def resolutions_for(one: object, other: object) -> list[tuple[str, Resolution]]:
    """Return the answers that `resolve` holds for two callbacks, each with the call that gave it, for messages."""
    return [
        (f"resolve({first.__name__}, {second.__name__}, ...)", resolution)
        for (first, second), resolution in _RESOLVED.items()
        if (isinstance(one, first) and isinstance(other, second))
        or (isinstance(other, first) and isinstance(one, second))
    ]
