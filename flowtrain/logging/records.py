"""Records: `log` writes those of handlers in place, and keeps those of deferred handlers.

A handler in place writes its records at once. A deferred handler runs within `collecting`, which keeps the records:
they return with its result, and `deliver` writes them in the training process. A deferrable callback logs only to the
backends that it held when its learner got it; in place `holding` sees to that.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from flowtrain.errors import LoggingError, raise_worst
from flowtrain.errors.arguments import is_whole
from flowtrain.logging.backend import HOLD, Group, Loggable, LoggerBackend
from flowtrain.logging.names import readable

__all__ = ["Collector", "Identity", "collecting", "deliver", "holding", "identity", "log"]

_MOST = 1 << 63  # steps are below this


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a deferred event, by which a handler can recognize a side effect that happens a second time.

    A handler in another process runs again if that process dies before its result has arrived. Its records are still
    written once, but its own side effects (a message that it sends, a row that it inserts) may happen twice, both times
    with the same identity.

    Attributes:
        run: The id of the run.
        lane: The name of the lane.
        sequence: The number of the event in its lane, from 0.
    """

    run: str
    lane: str
    sequence: int


@dataclass(slots=True)
class Collector:
    """Keeps the records that one callback logs while its handler runs deferred.

    Attributes:
        identity: The identity of the event.
        backends: The backends that the callback holds. With ``None`` the handler may log to any backend, and no record
            is kept.
        records: The index in `backends` and the bytes of each record.
    """

    identity: Identity
    backends: Sequence[LoggerBackend] | None
    records: list[tuple[int, bytes]] = field(default_factory=list)

    def take(self, backend: LoggerBackend, record: bytes) -> None:
        """Keep a record.

        Raises:
            LoggingError: The callback does not hold the backend.
        """
        # The callbacks of a dry run have no learner that has opened their backends.
        if self.backends is None:
            return
        self.records.append((_place_of(backend, self.backends), record))


@dataclass(slots=True)
class _InPlace:
    """Writes the records that a deferrable callback logs in place, to the backends that it could log to in its lane.

    Attributes:
        backends: The backends that the callback holds.
        identity: ``None``, since the event is not deferred.
    """

    backends: Sequence[LoggerBackend]
    identity: None = None

    def take(self, backend: LoggerBackend, record: bytes) -> None:
        """Write a record.

        Raises:
            LoggingError: The callback does not hold the backend, or the backend cannot write the record.
        """
        _place_of(backend, self.backends)
        backend.write(record)


def _place_of(backend: LoggerBackend, backends: Sequence[LoggerBackend]) -> int:
    """Return the index of a backend among those that a callback holds.

    Raises:
        LoggingError: The callback does not hold it.
    """
    # By identity: two backends that a user has made equal still have two sinks.
    place = next((place for place, one in enumerate(backends) if one is backend), None)
    if place is None:
        raise LoggingError(
            f"{backend!r} is none of the backends that the callback held when it was given to the learner: "
            f"{', '.join(map(repr, backends)) or 'it held none'}. {HOLD}"
        )
    return place


_collector: ContextVar[Collector | _InPlace | None] = ContextVar("flowtrain_collector", default=None)


def log(
    backends: LoggerBackend | Iterable[LoggerBackend], loggable: Loggable, name: str, step: int, group: Group
) -> None:
    """Log a loggable to each of the given backends that takes its type.

    Args:
        backends: One backend or several, which the callback holds: they can be reached from its attributes when the
            learner gets the callback.
        loggable: The loggable.
        name: The name to log under, such as ``"Loss"``.
        step: The step.
        group: The unit that the step counts, and the phase, such as ``("Step", "TrainingPhase")``.

    Raises:
        LoggingError: No backend takes the type of the loggable, a backend cannot encode or write it, the callback does
            not hold a backend, or an argument is of a wrong type.
    """
    backends = _checked(backends, name, step, group)
    step = int(step)  # numpy has whole numbers of its own
    if not (name.isascii() and all(map(str.isascii, group))):
        name, group = readable(name), tuple(map(readable, group))
    collector = _collector.get()
    taken = False
    for backend in backends:
        if not isinstance(loggable, backend.accepts):
            continue
        taken = True
        try:
            record = backend.encode(loggable, name, step, group)
            if collector is None:
                backend.write(record)
            else:
                collector.take(backend, record)
        except Exception as error:
            error.add_note(f"raised when {name!r} of {'/'.join(group)}, step {step}, was logged to {backend.sink}")
            raise
    if not taken:
        raise LoggingError(
            f"{type(loggable).__name__} {name!r} was logged to {', '.join(map(repr, backends)) or 'no backend'}, and "
            f"none takes that kind. Add one that does, such as JsonlBackend(path)."
        )


def deliver(
    backends: Sequence[LoggerBackend],
    records: Iterable[tuple[int, bytes]],
    failures: dict[int, Exception] | None = None,
) -> None:
    """Write the records of `Collector` objects in the training process; each backend gets its records in order.

    Args:
        backends: The backends of the callback, `Collector.backends`.
        records: The records of any number of events, `Collector.records`, from this process or another one.
        failures: The error of each failed backend by the `id` of the backend. This function adds to it, and writes
            nothing to a backend in it.

    Raises:
        Exception: Without `failures`, the error of the first backend that failed, with those of others attached; all
            other backends have been written.
    """
    noted: dict[int, Exception] = {} if failures is None else failures
    by_backend: dict[int, list[bytes]] = {}
    for position, record in records:
        by_backend.setdefault(position, []).append(record)
    for position, own in by_backend.items():
        backend = backends[position]
        if id(backend) in noted:  # after a failure a later record would leave a gap in the sink
            continue
        try:
            backend.write_all(own)
        except Exception as error:
            error.add_note(f"raised when records were written to {backend.sink}")
            noted[id(backend)] = error
    if failures is None and noted:
        raise_worst([*noted.values()])


@contextmanager
def collecting(identity: Identity, backends: Sequence[LoggerBackend] | None) -> Generator[Collector]:
    """Give a context whose `Collector` keeps the records of handlers instead of writing them."""
    collector = Collector(identity, backends)
    before = _collector.get()
    try:
        _collector.set(collector)
        yield collector
    finally:
        _collector.set(before)


@contextmanager
def holding(backends: Sequence[LoggerBackend]) -> Generator[None]:
    """Give a context for a handler of a deferrable callback that runs in place: it logs to these backends only."""
    if _collector.get() is not None:  # in a dry run, no record is written
        yield
        return
    _collector.set(_InPlace(backends))
    try:
        yield
    finally:
        _collector.set(None)


def identity() -> Identity | None:
    """Return the identity of the event that the calling handler handles; ``None`` in a handler that runs in place."""
    collector = _collector.get()
    return None if collector is None else collector.identity


def _checked(backends: object, name: object, step: object, group: object) -> tuple[LoggerBackend, ...]:
    """Check the types of the arguments of `log`; return the backends as a tuple.

    Raises:
        LoggingError: An argument is of a wrong type.
    """
    several: tuple[Any, ...] = (backends,)
    if not isinstance(backends, LoggerBackend) and not isinstance(backends, str) and isinstance(backends, Iterable):
        several = tuple(backends)
    for backend in several:
        if not isinstance(backend, LoggerBackend):
            raise LoggingError(
                f"log() was given {backend!r} to log to, which is no LoggerBackend. Write log(self.backend, ...), with "
                f"self.backend = JsonlBackend(path) in __init__."
            )
    if not isinstance(name, str) or not name:
        raise LoggingError(f'log() was given the name {name!r}. A name is a text that is not empty, such as "Loss".')
    if not is_whole(step) or not -_MOST <= cast("int", step) < _MOST:
        raise LoggingError(
            f"log({name!r}) was given the step {step!r}. A step is a whole number of at most 64 bits: write int(...)."
        )
    if not isinstance(group, tuple) or not group or not all(isinstance(part, str) and part for part in group):
        raise LoggingError(
            f"log({name!r}) was given the group {group!r}. A group is a tuple of texts, which say what the step "
            f'counts, and where: ("Step", "TrainingPhase"), or ("Evaluation",).'
        )
    return several
