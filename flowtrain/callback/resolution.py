"""Answers to a conflict: which of two callbacks runs first, or that their order does not matter.

A callback answers in `Callback.resolve_conflict`; `resolve` answers for two types that one does not own. All answers
are heard: any `Unresolvable` is an error, `RunFirst` beats `NoConflict`, and two different `RunFirst` are an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from flowtrain.errors import ResolutionError, is_a

__all__ = ["NoConflict", "Resolution", "RunFirst", "Unresolvable", "resolutions_for", "resolve"]


@dataclass(frozen=True)
class RunFirst:
    """Of the two callbacks, run this one first.

    Args:
        callback: One of the two: the callback itself, or its type.
    """

    callback: object


@dataclass(frozen=True)
class NoConflict:
    """The order does not matter. The two run in serial order and never at the same time."""


@dataclass(frozen=True)
class Unresolvable:
    """The two cannot be used together."""


Resolution: TypeAlias = RunFirst | NoConflict | Unresolvable

_RESOLVED: dict[tuple[type, type], Resolution] = {}


def resolve(one: type, other: type, resolution: Resolution | None) -> None:
    """Answer for every conflict between two callback types, subclasses included, in learners built from now on.

    Args:
        one: A callback type.
        other: A callback type.
        resolution: The answer; ``None`` takes an earlier answer back.

    Raises:
        ResolutionError: The arguments are no types, or no resolution, or `RunFirst` names a third type.
    """
    if not (is_a(one, type) and is_a(other, type)):
        raise ResolutionError(f"resolve() takes two callback types and a resolution, got {one!r} and {other!r}.")
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
    _RESOLVED.pop((other, one), None)
    _RESOLVED[one, other] = resolution


def resolutions_for(one: object, other: object) -> list[tuple[str, Resolution]]:
    """Return the answers that `resolve` holds for two callbacks, each with who gave it."""
    return [
        (f"resolve({first.__name__}, {second.__name__}, ...)", resolution)
        for (first, second), resolution in _RESOLVED.items()
        if (isinstance(one, first) and isinstance(other, second))
        or (isinstance(other, first) and isinstance(one, second))
    ]
