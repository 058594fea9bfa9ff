"""Leaks: objects of a batch that stay in memory after the batch, and the references that keep them.

After a batch only the learner refers to its state, until the next batch is complete. A callback that keeps
``learner.batch.outputs`` keeps an autograd graph and megabytes in memory. `leaks` runs a learner and finds such
objects, `holders` finds the callback, module or function that keeps an object.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
import weakref
from collections.abc import Iterator
from types import FrameType, GeneratorType, ModuleType
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import BatchEnd
from flowtrain.callbacks import CustomCallback
from flowtrain.data.nested import Attribute, attributes, parts, place_text
from flowtrain.learner import Learner

__all__ = ["holders", "leaks"]

_DEEPEST = 8  # the length of the longest chain of references that is followed


def leaks(learner: Learner) -> list[str]:
    """Run one epoch of every phase; return a line for each object of an earlier batch that is still in memory.

    Inputs and targets are left out, because a loader may keep them, as a list does. The last batch of an epoch is left
    out too, because the learner keeps it.

    Args:
        learner: A learner with data, which this trains.

    >>> from flowtrain.testing import tiny_learner
    >>> leaks(tiny_learner())
    []
    """
    seen: list[tuple[str, weakref.ref[Any]]] = []
    numbers: dict[str, int] = {}

    def note(view: Any) -> None:
        """Note the objects of the batch that ends, with weak references."""
        batch = learner.batch
        what = repr(learner.loop.scopes.phase)
        numbers[what] = numbers.get(what, 0) + 1
        seen.append((f"batch {numbers[what]} of {what}", weakref.ref(batch)))
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor) and name not in ("inputs", "targets"):
                seen.append((f"batch.{name} of batch {numbers[what]} of {what}", weakref.ref(value)))

    watcher = CustomCallback(note, BatchEnd)
    before = list(learner.callbacks)
    learner.add_callback(watcher)
    try:
        for phase in list(learner.data):
            learner.epoch(phase)
    finally:
        learner.set_callbacks(before)
    gc.collect()
    own = {id(learner.batch), *(id(value) for value in vars(learner.batch).values())}
    found: list[str] = []
    for what, reference in seen:
        thing = reference()
        if thing is not None and id(thing) not in own:
            found.append(f"{what} is held by {', and by '.join(holders(thing)) or 'something outside of Python'}")
        del thing  # otherwise this frame would hold the object while the next one is examined
    return found


def holders(thing: object) -> list[str]:
    """Return a text for each callback, module or function that keeps an object in memory, at any distance.

    Args:
        thing: The object. References in the frames that call this function are left out.
    """
    callers: set[int] = set()
    frame = inspect.currentframe()
    while frame is not None:
        callers.add(id(frame))
        frame = frame.f_back
    return sorted(set(_ends(thing, "", callers, {id(thing)}, 0)))


def _ends(thing: object, path: str, callers: set[int], passed: set[int], depth: int) -> Iterator[str]:
    """Yield a text for each named object that refers to `thing`; follow the references to objects without a name.

    Args:
        thing: The object.
        path: The path from `thing` to the object whose holders are looked for.
        callers: The ids of frames that are left out.
        passed: The ids of objects that have been visited; this function adds to it.
        depth: The length of the chain of references so far.
    """
    referrers = gc.get_referrers(thing)
    passed.add(id(referrers))  # the list refers to every holder itself
    for holder in referrers:
        if id(holder) in passed or id(holder) in callers or getattr(holder, "gi_code", None) is _ends.__code__:
            continue
        passed.add(id(holder))
        if isinstance(holder, GeneratorType) and holder.gi_frame is not None:
            holder = holder.gi_frame  # the frame of a suspended generator has the local variables
        if isinstance(thing, dict) and getattr(holder, "__dict__", None) is thing:
            path = re.sub(r"^\['(\w+)'\]", r".\1", path)
        link = _link(holder, thing) + path
        if isinstance(holder, Callback):
            yield f"{holder.name or type(holder).__name__}{link}"
        elif isinstance(holder, FrameType):
            yield f"{holder.f_code.co_qualname}() in {holder.f_code.co_filename}:{holder.f_lineno}, local{link}"
        elif isinstance(holder, dict) and "__name__" in holder and holder["__name__"] in sys.modules:
            yield f"module {holder['__name__']}{link}"
        elif isinstance(holder, ModuleType):
            yield f"module {holder.__name__}{link}"
        elif depth < _DEEPEST:
            further = [*_ends(holder, link if link else path, callers, passed, depth + 1)]
            yield from further or [f"a {type(holder).__name__}{link}"] * (depth == 0)
        del holder
    referrers.clear()


def _link(holder: object, thing: object) -> str:
    """Return the path from one object to the other: ``[0]``, ``.name``; an empty text if it is not known."""
    if isinstance(holder, FrameType):
        return next((f" {name}" for name, value in holder.f_locals.items() if value is thing), "")
    inner = parts(holder)
    if inner is None:
        inner = [(Attribute(name), value) for name, value in attributes(holder).items()]
    return next((place_text(where) for where, value in inner if value is thing), "")
