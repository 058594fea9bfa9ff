"""Loggables, and the backends that write them.

A handler logs a *loggable* (a `Value`, an `Image`, ...) with `flowtrain.logging.log`, under a name, with a step and a
group. The group says what the step counts: ``("Step", "TrainingPhase")``, ``("Epoch", "ValidationPhase")``. Backends
show the three parts as one path, ``Step/TrainingPhase/Loss``; TensorBoard has the phase in the name of the run instead.

The backend encodes the loggable as bytes in the thread and process of the handler (`LoggerBackend.encode`). Only the
process that trains writes the bytes to the sink (`LoggerBackend.write`), see `flowtrain.logging.records`. So a sink has
one writer, even if a worker dies or runs a handler twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, TypeAlias

__all__ = [
    "HOLD",
    "Figure",
    "File",
    "Group",
    "Histogram",
    "Image",
    "Loggable",
    "LoggerBackend",
    "Outcome",
    "Run",
    "Settings",
    "Text",
    "Value",
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


HOLD = (
    "A learner opens the backends that its callbacks hold when it is built or its callbacks change. Make all of them "
    "in __init__ and keep them in attributes, as in self.backend = JsonlBackend(path); to use another one later, put "
    "it into the callback between two fits and call learner.set_callbacks(list(learner.callbacks))."
)
"""The remedy in errors about a backend that no learner has opened."""
