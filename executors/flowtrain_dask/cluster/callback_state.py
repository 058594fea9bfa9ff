"""The state of a lane's callbacks as bytes, and back.

The attributes of each callback are sent. Three kinds of objects are not sent; the bytes refer to them by their position
in a list that both sides have (`shared_objects`):

- the callbacks themselves, so that an attribute may refer to its callback;
- the logging backends that they hold, in whatever attribute: those of the training process write records, and their
  copies on a worker only encode;
- the conditions of the callbacks, which the training process asks.

So when a state comes back, the callbacks are the same objects with new attributes, and hold the same backends and
conditions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError
from flowtrain.graph.held_backends import backends_of_type, names_in
from flowtrain.logging.backend import LoggerBackend
from flowtrain_dask.cluster.pickling import dumps, loads
from flowtrain_dask.lanes.work import Job

__all__ = ["build", "check_can_be_sent", "dump_job", "dump_state", "load_state", "shared_objects"]


def dump_job(job: Job, callbacks: Sequence[Callback]) -> bytes:
    """Return the bytes from which another process can make the callbacks anew, without their state."""
    return dumps((job, [(type(each), each.conditions) for each in callbacks]))


def build(blob: bytes) -> tuple[Job, list[Callback], list[object]]:
    """Return the job, callbacks without any state, and their `shared_objects`, from the bytes of `dump_job`."""
    job, parts = loads(blob)
    # A backend in a class attribute exists twice here: the class was imported with one of its own, and a copy was sent
    # with the job. Handlers log to the one in the class, so the job must name that one.
    own = {backend.sink: backend for kind, _ in parts for backend in backends_of_type(kind)}
    job = replace(job, backends=tuple(tuple(own.get(one.sink, one) for one in held) for held in job.backends))
    callbacks = [kind.__new__(kind) for kind, _ in parts]
    return job, callbacks, _shared_objects(job, callbacks, [conditions for _, conditions in parts])


def shared_objects(job: Job, callbacks: Sequence[Callback]) -> list[object]:
    """Return the objects that are not sent with a state, in the order that `build` gives them on the worker."""
    return _shared_objects(job, callbacks, [each.conditions for each in callbacks])


def dump_state(callbacks: Sequence[Callback], shared: Sequence[object]) -> bytes:
    """Return the attributes of callbacks as bytes.

    Args:
        callbacks: The callbacks.
        shared: The objects that are not sent, see `shared_objects`.
    """
    return dumps([each.__getstate__() for each in callbacks], shared)


def load_state(callbacks: Sequence[Callback], shared: Sequence[object], blob: bytes) -> None:
    """Replace the attributes of callbacks by those from the bytes of `dump_state`."""
    for callback, state in zip(callbacks, loads(blob, shared), strict=True):
        # Attributes are replaced before the others are removed, and never all removed first: the training thread may
        # read the name or the backends of the callback at the same time.
        before = set(vars(callback))
        given = _restore(callback, state)
        for name in before - given:
            vars(callback).pop(name, None)


def check_can_be_sent(job: Job, callbacks: Sequence[Callback]) -> None:
    """Check that callbacks can be sent to another process.

    Raises:
        ExecutorError: A callback does not pickle. The text names the part of it that is to blame, and what to write.
    """
    shared = shared_objects(job, callbacks)
    for name, callback, backends in zip(job.callbacks, callbacks, job.backends, strict=True):
        try:
            dump_state([callback], shared)
            dump_job(replace(job, backends=(backends,)), [callback])
        except Exception as error:  # objects of the user define how they pickle, so anything may be raised
            what, why, remedy = _find_unpicklable(callback, backends, shared, error)
            raise ExecutorError(
                f"{name} cannot be sent to another process: {what} ({type(why).__name__}: {why}). "
                f"{remedy}, set {name}.deferrable = False, or use DaskExecutor(), whose lanes are threads."
            ) from why


def _restore(callback: Callback, state: Any) -> set[str]:
    """Give a callback the state that ``__getstate__`` returned, as unpickling does; return the names it then has."""
    setter = getattr(callback, "__setstate__", None)
    if setter is not None:
        vars(callback).clear()  # `__setstate__` may expect an empty object, and alone knows which names it sets
        setter(state)
        return set(vars(callback))
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    for name, value in {**(attributes or {}), **(slots or {})}.items():
        object.__setattr__(callback, name, value)  # a slot here may be an attribute on the worker, see `pickling`
    return set(attributes or {})


def _shared_objects(job: Job, callbacks: Sequence[Callback], conditions: Sequence[Sequence[object]]) -> list[object]:
    return [*callbacks, *(each for several in (*job.backends, *conditions) for each in several)]


class _Unpicklable(NamedTuple):
    """The part of a callback that does not pickle.

    Attributes:
        what: The words that say it.
        why: Its exception.
        remedy: What to write instead.
    """

    what: str
    why: Exception
    remedy: str


def _find_unpicklable(
    callback: Callback, backends: Sequence[LoggerBackend], shared: Sequence[object], error: Exception
) -> _Unpicklable:
    """Return the part of a callback that does not pickle; `error` is the exception for the whole of it."""
    kind = type(callback).__name__
    for backend in backends:
        if (why := _failure(backend)) is not None:
            name = type(backend).__name__
            remedy = f"Leave out in {name}.__getstate__ whatever its open() makes"
            return _Unpicklable(f"its backend {name} does not pickle", why, remedy)
    try:
        state = callback.__getstate__()
    except Exception as failure:
        return _Unpicklable("its __getstate__ fails", failure, f"Return a dict of attributes in {kind}.__getstate__")
    remedy = f"Make it in a handler when it is first needed and leave it out in {kind}.__getstate__"
    for each in state if isinstance(state, tuple) else (state,):
        for name, value in each.items() if isinstance(each, dict) else ():
            if (why := _failure(value, shared)) is not None:
                return _Unpicklable(f"its attribute {name!r}, a {type(value).__name__}, does not pickle", why, remedy)
    remedy = f"Define {kind} in a module that the workers can import, which is sent by its name alone"
    for what, value in _code_of(type(callback)):
        if (why := _failure(value)) is not None:
            return _Unpicklable(f"{what}, a {type(value).__name__}, does not pickle", why, remedy)
    return _Unpicklable("its type does not pickle", error, remedy)


def _failure(value: object, shared: Sequence[object] = ()) -> Exception | None:
    """Return the exception with which a value fails to pickle, or ``None``."""
    try:
        dumps(value, shared)
    except Exception as why:
        return why
    return None


def _code_of(kind: type) -> Iterator[tuple[str, object]]:
    """Yield the globals that the methods of a class name, its methods, and its attributes, each with words for it."""
    for name, value in vars(kind).items():
        if isinstance(value, FunctionType):
            for each in names_in(value.__code__):
                if each in value.__globals__:
                    yield f"the global {each!r} in the code of {kind.__name__}.{name}", value.__globals__[each]
        if isinstance(value, FunctionType) or not name.startswith("__"):
            yield f"its class attribute {name!r}", value
