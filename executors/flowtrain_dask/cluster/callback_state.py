"""The state of a lane's callbacks as bytes, and back.

What travels is the attributes of each callback. Three kinds of objects stay where they are, and are named by their
place among all of them: the callbacks themselves, so that an attribute may refer to its callback; the backends that
they hold, in whatever attribute, of which the driver's write and the copies elsewhere only encode; and their
conditions, which the driver asks. So when a state comes home, the callbacks are the same objects with new attributes,
holding the same backends and conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError
from flowtrain.graph.held_backends import backends_of_type
from flowtrain.logging.backend import LoggerBackend
from flowtrain_dask.cluster.pickling import dumps, loads
from flowtrain_dask.lanes.work import Job

__all__ = ["build", "check_travels", "dump_job", "dump_state", "load_state"]


def dump_job(job: Job, callbacks: Sequence[Callback]) -> bytes:
    """Return what another process needs to make the callbacks anew, without their state."""
    return dumps((job, [(type(each), each.conditions) for each in callbacks]))


def build(blob: bytes) -> tuple[Job, list[Callback], list[object]]:
    """Return the job, callbacks without any state, and what stays of them (see `stays`), from `dump_job`."""
    job, crew = loads(blob)
    # A class that was imported here has made its backends anew: these stand for the copies of the driver's.
    own = {backend.sink: backend for kind, _ in crew for backend in backends_of_type(kind)}
    job = replace(job, backends=tuple(tuple(own.get(one.sink, one) for one in held) for held in job.backends))
    callbacks = [kind.__new__(kind) for kind, _ in crew]
    return job, callbacks, _staying(job, callbacks, [conditions for _, conditions in crew])


def stays(job: Job, callbacks: Sequence[Callback]) -> list[object]:
    """Return the objects that do not travel with a state, in the order in which `build` has them."""
    return _staying(job, callbacks, [each.conditions for each in callbacks])


def dump_state(callbacks: Sequence[Callback], kept: Sequence[object]) -> bytes:
    """Return the attributes of callbacks as bytes.

    Args:
        callbacks: The callbacks.
        kept: What stays.
    """
    return dumps([each.__getstate__() for each in callbacks], kept)


def load_state(callbacks: Sequence[Callback], kept: Sequence[object], blob: bytes) -> None:
    """Replace the attributes of callbacks by those from `dump_state`."""
    for callback, state in zip(callbacks, loads(blob, kept), strict=True):
        # Not emptied first: the training thread may just be looking for its backends or its name.
        before = set(vars(callback))
        given = _restore(callback, state)
        for name in before - given:
            vars(callback).pop(name, None)


def check_travels(job: Job, callbacks: Sequence[Callback]) -> None:
    """Check that callbacks can be sent to another process.

    Raises:
        ExecutorError: One cannot; the text names it, and the attribute where there is one.
    """
    kept = stays(job, callbacks)
    for name, callback, backends in zip(job.callbacks, callbacks, job.backends, strict=True):
        try:
            dump_state([callback], kept)
            dump_job(replace(job, backends=(backends,)), [callback])
        except Exception as error:  # pickling calls what objects define
            what, error = _culprit(callback, backends, kept, error)
            raise ExecutorError(
                f"{name} cannot be sent to another process: {what} does not pickle ({type(error).__name__}: {error}). "
                f"Make it in a handler when it is first needed and leave it out in {type(callback).__name__}."
                f"__getstate__, set {name}.deferrable = False, or use DaskExecutor(), whose lanes are threads."
            ) from error


def _restore(callback: Callback, state: Any) -> set[str]:
    """Give a callback the state that ``__getstate__`` returned, as unpickling does; return what it has then."""
    setter = getattr(callback, "__setstate__", None)
    if setter is not None:
        vars(callback).clear()  # only that function knows what it gives
        setter(state)
        return set(vars(callback))
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    for name, value in {**(attributes or {}), **(slots or {})}.items():
        object.__setattr__(callback, name, value)  # a slot here may be an attribute there, see `reducing`
    return set(attributes or {})


def _staying(job: Job, callbacks: Sequence[Callback], conditions: Sequence[Sequence[object]]) -> list[object]:
    return [*callbacks, *(each for several in (*job.backends, *conditions) for each in several)]


def _culprit(
    callback: Callback, backends: Sequence[LoggerBackend], kept: Sequence[object], error: Exception
) -> tuple[str, Exception]:
    """Return what of a callback does not pickle, and why."""
    for backend in backends:
        try:
            dumps(backend)
        except Exception as why:
            return f"its backend {type(backend).__name__}", why
    for attribute, value in vars(callback).items():
        try:
            dumps(value, kept)
        except Exception as why:
            return f"its attribute {attribute!r}, a {type(value).__name__},", why
    return "its type", error
