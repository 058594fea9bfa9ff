"""Records: what is logged, the backends that take it, and how it gets from a handler to its backend.

A handler logs a *loggable* (a `Value`, an `Image`, ...) with `log`. The backend turns it into bytes where the handler
runs (`LoggerBackend.encode`), and the process that owns the sink, which is the one that trains, writes those bytes
(`LoggerBackend.write`). In place both happen at once. A handler that runs elsewhere runs inside `collecting`, which
keeps the records and hands them back with the result, so a sink has one writer whatever happens to the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

__all__ = [
    "Collector",
    "Figure",
    "File",
    "Histogram",
    "Identity",
    "Image",
    "Loggable",
    "LoggerBackend",
    "Run",
    "Text",
    "Value",
    "collecting",
    "identity",
    "log",
]


@dataclass(frozen=True, eq=False)
class Loggable:
    """Base of what can be logged."""


@dataclass(frozen=True, eq=False)
class Value(Loggable):
    """A number.

    Args:
        value: A number, or a tensor with one element.
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Image(Loggable):
    """A picture.

    Args:
        image: A tensor or array of shape (height, width), (channels, height, width) or (height, width, channels), with
            1, 3 or 4 channels; floating values from 0 to 1, or bytes from 0 to 255.
    """

    image: Any


@dataclass(frozen=True, eq=False)
class Text(Loggable):
    """A text; backends that can show Markdown do."""

    text: str


@dataclass(frozen=True, eq=False)
class Histogram(Loggable):
    """How values are distributed.

    Args:
        values: A tensor or array of any shape. NaN and infinite values are left out, and counted where the backend can
            say so.
        bins: How many bins of equal width there are.
    """

    values: Any
    bins: int = 64


@dataclass(frozen=True, eq=False)
class Figure(Loggable):
    """A drawing of matplotlib: a ``matplotlib.figure.Figure``, made without pyplot."""

    figure: Any


@dataclass(frozen=True, eq=False)
class File(Loggable):
    """A whole file, kept under the name it is logged with.

    Args:
        path: Where it is now; it is read when it is logged.
    """

    path: str | PathLike[str]


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


class LoggerBackend(ABC):
    """Takes what is logged: a file, or a tracker.

    A constructor only stores its arguments, so that a backend can be copied to another process before and after it is
    opened: the copy encodes and never writes. `open` comes first, before training; then `write` for every record in
    order; `flush` at the end of a fit and for a checkpoint; `close` last. It may be opened again after that.
    `flowtrain.testing.BackendContract` tests an implementation.

    Attributes:
        accepts: The kinds of loggables that `encode` takes.
    """

    accepts: ClassVar[tuple[type[Loggable], ...]] = (Loggable,)

    @property
    @abstractmethod
    def sink(self) -> str:
        """What it writes to, such as the absolute path of a file: two open backends never have the same."""

    @abstractmethod
    def open(self, run: Run) -> None:
        """Begin to take records. Raises what there is to raise before training begins."""

    @abstractmethod
    def encode(self, loggable: Loggable, name: str, step: int, group: str) -> bytes:
        """Return a record of a loggable. A pure function, called where the handler runs.

        Args:
            loggable: One of `accepts`.
            name: What is logged, such as ``"Loss"``.
            step: The step that it belongs to.
            group: The phase and the kind of step, such as ``"TrainingPhase/step"``.
        """

    @abstractmethod
    def write(self, record: bytes) -> None:
        """Take what `encode` returned, here or in another process."""

    @abstractmethod
    def flush(self) -> Any:
        """Bring all that was written to where it stays; return the position, as plain values, for `restore`."""

    @abstractmethod
    def restore(self, position: Any) -> None:
        """Take back what was written after a position. Called after `open`, with what an earlier `flush` returned."""

    @abstractmethod
    def close(self) -> None:
        """Flush, and give back what is held. Does nothing if it is closed."""

    @property
    def resource(self) -> str:
        """The path under which callbacks declare that they use it: ``{backend.resource: Write()}``."""
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
        records: For each record the position of the backend among the callback's, and the bytes.
    """

    identity: Identity
    records: list[tuple[int, bytes]] = field(default_factory=list)


_collector: ContextVar[Collector | None] = ContextVar("flowtrain_collector", default=None)


def log(backends: Sequence[LoggerBackend], loggable: Loggable, name: str, step: int, group: str) -> None:
    """Log something to all backends of a callback that take its kind.

    Args:
        backends: The callback's ``backends``, all of them and in their order.
        loggable: What to log.
        name: What it is called, such as ``"Loss"``.
        step: The step that it belongs to.
        group: The phase and the kind of step, such as ``"TrainingPhase/step"``.
    """
    collector = _collector.get()
    for position, backend in enumerate(backends):
        if not isinstance(loggable, backend.accepts):
            continue
        record = backend.encode(loggable, name, step, group)
        if collector is None:
            backend.write(record)
        else:
            collector.records.append((position, record))


@contextmanager
def collecting(identity: Identity) -> Iterator[Collector]:
    """Keep the records of the handlers that run in this context, in place of writing them."""
    collector = Collector(identity)
    token = _collector.set(collector)
    try:
        yield collector
    finally:
        _collector.reset(token)


def identity() -> Identity | None:
    """Return which event the calling handler is at work on; ``None`` in a handler that runs in place."""
    collector = _collector.get()
    return None if collector is None else collector.identity
