"""Records: loggables, the backends that write them, and the way of a record from a handler to its backend.

A handler logs a *loggable* (a `Value`, an `Image`, ...) with `log`, under a name, with a step and a group. The group
says what the step counts: ``("Step", "TrainingPhase")``, ``("Epoch", "ValidationPhase")``. Backends show the three
parts as one path, ``Step/TrainingPhase/Loss``; TensorBoard has the phase in the name of the run instead.

The backend encodes the loggable as bytes in the thread and process of the handler (`LoggerBackend.encode`). Only the
process that trains writes the bytes to the sink (`LoggerBackend.write`). For a handler that runs in place both happen
at once. A deferred handler runs within `collecting`, which keeps the records; they return with its result, and the
training process writes them with `deliver`. So a sink has one writer, even if a worker dies or runs a handler twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar, Literal, TypeAlias, cast

from flowtrain.errors import LoggingError, is_whole
from flowtrain.logging.names import readable

__all__ = [
    "HOLD",
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

Group: TypeAlias = tuple[str, ...]
"""What a step counts, and the phase that it counts in: ``("Step", "TrainingPhase")``."""


@dataclass(frozen=True, eq=False)
class Loggable:
    """Base of all objects that can be logged. A loggable holds the object of a callback; the backend encodes it."""


@dataclass(frozen=True, eq=False)
class Value(Loggable):
    """A number.

    Args:
        value: A number, or a tensor or array with one element. NaN and infinite values are allowed.
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Image(Loggable):
    """A picture.

    Args:
        image: A tensor or array of shape (height, width), (channels, height, width) or (height, width, channels), with
            1, 3 or 4 channels; floating point values from 0 to 1, or whole numbers from 0 to 255. Values outside of
            this range are clamped, and NaN becomes 0. A shape that fits two of these has its channels first.
    """

    image: Any


@dataclass(frozen=True, eq=False)
class Text(Loggable):
    """A text, which backends show as Markdown if they can.

    Args:
        text: The text.
    """

    text: str


@dataclass(frozen=True, eq=False)
class Histogram(Loggable):
    """The distribution of many values.

    Args:
        values: A tensor or array of any shape. NaN and infinite values are left out; `JsonlBackend` logs their number.
        bins: The number of bins, which have equal width.
    """

    values: Any
    bins: int = 64


@dataclass(frozen=True, eq=False)
class Figure(Loggable):
    """A drawing of matplotlib.

    Args:
        figure: A ``matplotlib.figure.Figure``, made without pyplot, which threads must not share.
    """

    figure: Any


@dataclass(frozen=True, eq=False)
class File(Loggable):
    """A whole file, which is kept under the name it is logged with.

    Args:
        path: The path of the file, which is read when it is logged.
    """

    path: str | PathLike[str]


@dataclass(frozen=True, eq=False)
class Settings(Loggable):
    """The settings of a run, such as the batch size, by which trackers list and compare runs.

    Args:
        values: The settings by name: numbers, texts, ``None``, and lists and mappings of these.
    """

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The run that a backend is opened for.

    Attributes:
        id: The identifier of the run; a resumed run has the same one again.
        resumed: Whether the run is resumed from a checkpoint; then `LoggerBackend.restore` is called after `open`.
        rank: The rank of the process in a distributed run; only the process with rank 0 writes, unless the backend has
            a sink for each rank.
    """

    id: str
    resumed: bool = False
    rank: int = 0


Outcome: TypeAlias = Literal["finished", "failed", "killed"]
"""How a run ended: normally or by a callback; by an error; or from outside (Ctrl-C, SIGTERM, or the program ended)."""


class LoggerBackend(ABC):
    """Writes records to a sink: a file, or a tracker.

    A constructor only stores its arguments, and pickling leaves out open files and connections: a backend is copied to
    other processes before and after it is opened, and a copy only encodes. `open` is called first, before training;
    then `write` for every record in order; `flush` at the end of a fit and for a checkpoint; `ended` and `close` last.
    A closed backend may be opened again, and then continues its sink. `flowtrain.testing.BackendContract` tests an
    implementation.

    Attributes:
        accepts: The types of loggables that `encode` takes. `log` gives the backend no others.
        per_rank: Whether each process (*rank*) of a training has a sink of its own. Otherwise only the first one, the
            main rank, writes.
    """

    accepts: ClassVar[tuple[type[Loggable], ...]] = (Loggable,)
    per_rank: bool = False

    @property
    @abstractmethod
    def sink(self) -> str:
        """The name of the sink, such as the absolute path of a file. No two backends of a learner have the same."""

    @abstractmethod
    def open(self, run: Run) -> None:
        """Prepare to write records after the records that the sink has already.

        In a process with another rank than 0 the backend must not write, neither now nor later, unless it has a sink
        for each rank.

        Raises:
            LoggingError: The sink cannot be written, or a package is missing. Training has not begun then.
        """

    @abstractmethod
    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return a record of a loggable, with the clock time if the sink keeps it.

        This is a pure function of its arguments and the clock. It is called in the thread of the handler, so several
        threads may call it at once, and in copies of the backend that were never opened.

        Args:
            loggable: A loggable of one of the types in `accepts`.
            name: The name, such as ``"Loss"``.
            step: The step.
            group: The unit that the step counts, and the phase, such as ``("Step", "TrainingPhase")``.

        Raises:
            LoggingError: The loggable is of another type, or holds an object that cannot be logged.
        """

    @abstractmethod
    def write(self, record: bytes) -> None:
        """Write a record that `encode` has returned, in this process or in another one.

        Raises:
            LoggingError: The record cannot be written, as when the disk is full. Earlier records are kept.
        """

    def write_all(self, records: Sequence[bytes]) -> None:
        """Write several records in order. Override this if it can cost less than one `write` for each.

        Raises:
            LoggingError: A record cannot be written. The records before it are written.
        """
        for record in records:
            self.write(record)

    @abstractmethod
    def flush(self) -> Any:
        """Bring all written records to the sink, so that they survive a power failure.

        Returns:
            The position in the sink, for `restore`, as values that JSON can hold.
        """

    def check(self, position: Any) -> None:  # noqa: B027  # not abstract: a backend may find out in `restore` alone
        """Check that `restore` can go back to a position, and change nothing. It is called for all sinks before one.

        Raises:
            LoggingError: The sink is shorter than at that position, or is another one.
        """

    @abstractmethod
    def restore(self, position: Any) -> None:
        """Remove the records that were written after a position. This is called after `open`, when a run is resumed.

        Args:
            position: A position that an earlier `flush` returned.

        Raises:
            LoggingError: The sink is shorter than at that position, or is another one.
        """

    def ended(self, outcome: Outcome) -> None:  # noqa: B027  # not abstract: most sinks do not keep the outcome
        """Note how the run has ended; `close` follows. Override this if the sink keeps the outcome, as trackers do."""

    @abstractmethod
    def close(self) -> None:
        """Flush, and close files and connections. This does nothing if the backend is closed."""

    @property
    def resource(self) -> str:
        """The resource of this backend. A callback that holds the backend uses it without declaring it."""
        return f"resource.{type(self).__name__}({self.sink.replace('.', '·')})"


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
        # By identity: two backends that a user has made equal still have two sinks.
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
"""The remedy in errors about a backend that no learner has opened."""

_MOST = 1 << 63  # steps are below this

_collector: ContextVar[Collector | None] = ContextVar("flowtrain_collector", default=None)


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
        Exception: Without `failures`, the error of the first backend that failed; all other backends have been written.
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
        raise next(iter(noted.values()))


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
