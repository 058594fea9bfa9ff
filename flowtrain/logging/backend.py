"""Records: the backends that take what is logged, and how it gets from a handler to its backend.

A handler logs a *loggable* (a `Value`, an `Image`, ...; see `flowtrain.logging.loggables`) with `log`. The backend
turns it into bytes where the handler runs (`LoggerBackend.encode`), and the process that owns the sink, which is the
one that trains, writes those bytes (`LoggerBackend.write`). In place both happen at once. A handler that runs elsewhere
runs inside `collecting`, which keeps the records, and they come back with its result: the owner gives them to
`deliver`. So a sink has one writer, whatever happens to the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from flowtrain.errors import LoggingError, is_whole
from flowtrain.logging.loggables import Figure, File, Group, Histogram, Image, Loggable, Settings, Text, Value

__all__ = [
    "Collector",
    "Figure",
    "File",
    "Group",
    "Histogram",
    "Identity",
    "Image",
    "Loggable",
    "LoggerBackend",
    "Outcome",
    "Run",
    "Settings",
    "Text",
    "Value",
    "collecting",
    "deliver",
    "identity",
    "log",
]


@dataclass(frozen=True)
class Run:
    """What a backend is told when it is opened.

    Attributes:
        id: The run's own identifier; a resumed run has that of the run it goes on with.
        resumed: Whether this goes on with a run of a checkpoint; then `LoggerBackend.restore` follows.
        rank: The number of the process in a distributed run; only the one with 0 writes.
    """

    id: str
    resumed: bool = False
    rank: int = 0


Outcome: TypeAlias = Literal["finished", "failed", "killed"]
"""How a run ended: as it should, stopped early by a callback included; with an error; or from outside (Ctrl-C,
SIGTERM, the end of the program in the middle of it)."""


class LoggerBackend(ABC):
    """Takes what is logged: a file, or a tracker.

    A constructor only stores its arguments, and a copy by pickle leaves behind what is open: a backend is copied to
    other processes before and after it is opened, and the copy encodes and never writes. `open` comes first, before
    training; then `write` for every record in order; `flush` at the end of a fit and for a checkpoint; `ended` and
    `close` last. It may be opened again after that, and goes on where it was. `flowtrain.testing.BackendContract`
    tests an implementation.

    Attributes:
        accepts: The kinds of loggables that `encode` takes. `log` gives it no others.
    """

    accepts: ClassVar[tuple[type[Loggable], ...]] = (Loggable,)

    @property
    @abstractmethod
    def sink(self) -> str:
        """What it writes to, such as the absolute path of a file: two backends of a learner never have the same."""

    @abstractmethod
    def open(self, run: Run) -> None:
        """Begin to take records; nothing of what is there is lost. With a rank other than 0, do nothing, for good.

        Raises:
            LoggingError: It cannot be written to, or a package is missing. Nothing has been trained then.
        """

    @abstractmethod
    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return a record of a loggable, with the clock time if the sink keeps it.

        A pure function of its arguments and the clock, called where the handler runs, perhaps in several threads at
        once, and in copies that were never opened.

        Args:
            loggable: One of `accepts`.
            name: What is logged, such as ``"Loss"``.
            step: The step that it belongs to.
            group: What the step counts, and where, such as ``("Step", "TrainingPhase")``.

        Raises:
            LoggingError: The loggable is none of `accepts`, or holds what cannot be logged.
        """

    @abstractmethod
    def write(self, record: bytes) -> None:
        """Take what `encode` returned, here or in another process.

        Raises:
            LoggingError: It cannot be written, as when the disk is full; what was written before is kept.
        """

    def write_all(self, records: Sequence[bytes]) -> None:
        """Take several records, in order. To be overridden where that costs less than one after the other.

        Raises:
            LoggingError: One cannot be written; those before it are.
        """
        for record in records:
            self.write(record)

    @abstractmethod
    def flush(self) -> Any:
        """Bring all that was written to where it stays; return the position, as plain values, for `restore`.

        Plain values are what JSON knows. What was flushed is there after the power has failed.
        """

    @abstractmethod
    def restore(self, position: Any) -> None:
        """Take back what was written after a position. Called after `open`, with what an earlier `flush` returned.

        Raises:
            LoggingError: What is there is not what was there at that position.
        """

    def ended(self, outcome: Outcome) -> None:  # noqa: B027  # a sink that does not keep it has nothing to do
        """Learn how the run ended, before `close`. To be overridden where the sink keeps that, as trackers do."""

    @abstractmethod
    def close(self) -> None:
        """Flush, and give back what is held. Does nothing if it is closed."""

    @property
    def resource(self) -> str:
        """The resource that a callback uses which holds this backend; nobody has to declare it."""
        return f"resource.{type(self).__name__}({self.sink.replace('.', '·')})"


@dataclass(frozen=True, slots=True)
class Identity:
    """Which event a handler is at work on, for removing doubles of side effects of its own.

    A handler that runs in another process runs again when that process dies before its result has arrived. Its
    records are then written once; what it does itself (a message sent, a row inserted) may happen twice, both times
    with the same identity.

    Attributes:
        run: The run.
        lane: The lane.
        sequence: The number of the event in its lane, from 0.
    """

    run: str
    lane: str
    sequence: int


@dataclass(slots=True)
class Collector:
    """Keeps what one callback logs while its handler runs elsewhere.

    Attributes:
        identity: What the handler is at work on.
        backends: The backends that the callback holds; ``None``: it may log to any, and no record is kept.
        records: For each record the position of its backend in `backends`, and the bytes.
    """

    identity: Identity
    backends: Sequence[LoggerBackend] | None
    records: list[tuple[int, bytes]] = field(default_factory=list)

    def take(self, backend: LoggerBackend, record: bytes) -> None:
        """Keep a record.

        Raises:
            LoggingError: The callback does not hold the backend.
        """
        if self.backends is None:
            return
        place = next((place for place, one in enumerate(self.backends) if one is backend), None)
        if place is None:
            raise LoggingError(
                f"{backend!r} is none of the backends that the callback held when it was given to the learner: "
                f"{', '.join(map(repr, self.backends)) or 'it held none'}. {HOLD}"
            )
        self.records.append((place, record))


HOLD = (
    "A learner opens the backends that its callbacks hold when it is built or its callbacks change. Make all of them "
    "in __init__ and keep them in attributes, as in self.backend = JsonlBackend(path); to use another one later, put "
    "it into the callback between two fits and call learner.set_callbacks(list(learner.callbacks))."
)
"""What to do about a backend that no learner knows."""

_collector: ContextVar[Collector | None] = ContextVar("flowtrain_collector", default=None)


def log(
    backends: LoggerBackend | Iterable[LoggerBackend], loggable: Loggable, name: str, step: int, group: Group
) -> None:
    """Log something to one or several backends: to each that takes its kind.

    Args:
        backends: One backend or several, of those that the callback holds. A callback holds what one of its attributes
            leads to when it is given to the learner.
        loggable: What to log.
        name: What it is called, such as ``"Loss"``.
        step: The step that it belongs to.
        group: What the step counts, and where, such as ``("Step", "TrainingPhase")``.

    Raises:
        LoggingError: No backend takes its kind, one cannot take this one, the callback does not hold one, or an
            argument is of another type.
    """
    backends = _checked(backends, name, step, group)
    step = int(step)  # also of NumPy's
    if not name.isascii():
        name = name.encode(errors="replace").decode()  # half a character, as in the name of a file, becomes "?"
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
    """Write what a `Collector` kept, in the process that owns the sinks; each backend gets its own in order.

    Args:
        backends: `Collector.backends`: those of the callback whose handler logged.
        records: `Collector.records`, here or in another process, of any number of events.
        failures: Where a backend that fails is noted, by its id, with what it raised; what is in it gets nothing more.

    Raises:
        Exception: Without `failures`, what the first backend raised that failed; the others have theirs all the same.
    """
    noted: dict[int, Exception] = {} if failures is None else failures
    by_backend: dict[int, list[bytes]] = {}
    for position, record in records:
        by_backend.setdefault(position, []).append(record)
    for position, own in by_backend.items():
        backend = backends[position]
        if id(backend) in noted:
            continue
        try:
            backend.write_all(own)
        except Exception as error:
            error.add_note(f"raised when records were written to {backend.sink}")
            noted[id(backend)] = error
    if failures is None and noted:
        raise next(iter(noted.values()))


@contextmanager
def collecting(identity: Identity, backends: Sequence[LoggerBackend] | None) -> Generator[Collector]:
    """Keep the records of the handlers that run in this context instead of writing them, see `Collector`."""
    collector = Collector(identity, backends)
    token = _collector.set(collector)
    try:
        yield collector
    finally:
        _collector.reset(token)


def identity() -> Identity | None:
    """Return which event the calling handler is at work on; ``None`` in a handler that runs in place."""
    collector = _collector.get()
    return None if collector is None else collector.identity


def _checked(backends: object, name: object, step: object, group: object) -> tuple[LoggerBackend, ...]:
    """Return the backends that were given, when all arguments of `log` are of their types.

    Raises:
        LoggingError: One is not.
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
    if not is_whole(step):
        raise LoggingError(f"log({name!r}) was given the step {step!r}. A step is a whole number: write int(...).")
    if not isinstance(group, tuple) or not group or not all(isinstance(part, str) and part for part in group):
        raise LoggingError(
            f"log({name!r}) was given the group {group!r}. A group is a tuple of texts, which say what the step "
            f'counts, and where: ("Step", "TrainingPhase"), or ("Evaluation",).'
        )
    return several
