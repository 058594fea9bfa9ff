"""Who holds what a batch has left behind.

After a batch nothing but the learner holds its state, and that until the next batch is complete. A callback that keeps
``learner.batch.outputs`` keeps a graph and megabytes with it. `leaks` runs a learner and says, for everything of a
batch that is still there when it should not be, who holds it (`holders`).
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
from flowtrain.callback.nested import Attribute, attributes, parts, step
from flowtrain.callbacks import CustomCallback
from flowtrain.learner import Learner

__all__ = ["holders", "leaks"]

_DEEPEST = 8


def leaks(learner: Learner) -> list[str]:
    """Run one epoch of every phase and return a line for each piece of an earlier batch that is still held.

    The data itself is left out: a loader may keep it, as a list does. The last batch of an epoch is the learner's.

    Args:
        learner: One with data; it is trained by this.

    >>> from flowtrain.testing import tiny_learner
    >>> leaks(tiny_learner())
    []
    """
    seen: list[tuple[str, weakref.ref[Any]]] = []
    numbers: dict[str, int] = {}

    def note(view: Any) -> None:
        """Remember what there is of the batch that ends, without holding it."""
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
        del thing
    return found


def holders(thing: object) -> list[str]:
    """Say who holds an object: for each chain of references the nearest callback, module or function at its end.

    Args:
        thing: What should be gone. The frames that call this do not count.
    """
    callers: set[int] = set()
    frame = inspect.currentframe()
    while frame is not None:
        callers.add(id(frame))
        frame = frame.f_back
    return sorted(set(_ends(thing, "", callers, {id(thing)}, 0)))


def _ends(thing: object, path: str, callers: set[int], passed: set[int], depth: int) -> Iterator[str]:
    """Yield a text for each holder that has a name; follow those that have none."""
    referrers = gc.get_referrers(thing)
    passed.add(id(referrers))
    for holder in referrers:
        if id(holder) in passed or id(holder) in callers or getattr(holder, "gi_code", None) is _ends.__code__:
            continue
        passed.add(id(holder))
        if isinstance(holder, GeneratorType) and holder.gi_frame is not None:
            holder = holder.gi_frame  # one that waits; its locals are what it holds
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
    """Write how one holds the other: ``[0]``, ``.name``; nothing where that is not to be seen."""
    if isinstance(holder, FrameType):
        return next((f" {name}" for name, value in holder.f_locals.items() if value is thing), "")
    inner = parts(holder)
    if inner is None:
        inner = [(Attribute(name), value) for name, value in attributes(holder).items()]
    return next((step(where) for where, value in inner if value is thing), "")
