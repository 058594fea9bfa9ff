"""The names of callbacks: unique in a learner, and the key of their state in checkpoints and reports."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from flowtrain.callback import Callback
from flowtrain.errors import CallbackError, is_a, is_type

__all__ = ["unique_names"]


def unique_names(callbacks: list[Callback]) -> list[tuple[Callback, str]]:
    """Give each callback its name: its own, or its type's name with a number where that is taken.

    Raises:
        CallbackError: Not a callback, the same one twice, or two with one name of their own.
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
    if len({id(callback) for callback in callbacks}) < len(callbacks):
        twice = next(callback for place, callback in enumerate(callbacks) if callback in callbacks[:place])
        raise CallbackError(f"{twice!r} is in the list twice. Make two instances if you want two.")
    own = [callback.name for callback in callbacks if not _is_automatic(callback)]
    for name in own:
        if own.count(name) > 1:
            raise CallbackError(f"Two callbacks have the name {name!r}. A name is unique in a learner: change one.")
    taken = set(own)
    kept: set[int] = set()
    for callback in callbacks:  # a name that a callback has had before stays its own, wherever it stands now
        if _is_automatic(callback) and callback.name and callback.name not in taken:
            taken.add(callback.name)
            kept.add(id(callback))
    numbers: dict[str, Iterator[int]] = {}
    named = []
    for callback in callbacks:
        name = callback.name
        if _is_automatic(callback) and id(callback) not in kept:
            kind, name = type(callback).__name__, ""
            while not name or name in taken:
                number = next(numbers.setdefault(kind, count(1)))
                name = kind if number == 1 else f"{kind}#{number}"
            taken.add(name)
        named.append((callback, name))
    return named


def _is_automatic(callback: Callback) -> bool:
    kind, _, number = callback.name.partition("#")
    return not callback.name or (kind == type(callback).__name__ and (not number or number.isdigit()))
