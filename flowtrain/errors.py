"""The errors a user can cause, each with what is wrong, why, and what to write instead.

::

    FlowtrainError
    ├── AccessError                a declaration that cannot be read: unknown path, `Read` without parentheses
    ├── ProtectedException         a handler touched state that it does not declare
    ├── UndeclaredWriteError       strict mode: state changed behind a handler that does not declare to write it
    ├── HandlerError               a handler that does not fit: stacked `on`, wrong arity, can never run
    │   └── AmbiguousHandlerError  two handlers of one callback fit an event equally well
    ├── CallbackError              a list of callbacks that does not fit: a class, a duplicate, an unknown name
    ├── WriteConflictError         two writers of one path without an order
    ├── CycleError                 declarations that ask for a circular order
    ├── ResolutionError            answers to a conflict that contradict each other
    ├── MissingStateError          state that is read and that nobody has made (also an ``AttributeError``)
    ├── DataError                  data that a phase cannot use
    ├── LossError                  a loss function that does not fit the model's outputs
    ├── CoreError                  a device, precision or optimizer that does not fit
    ├── ExecutorError              an executor that is unknown, closed or in use
    ├── LoggingError               a logging backend that cannot do what it is asked to
    ├── CheckpointError            a checkpoint that cannot be written, read, or does not fit
    ├── DeferredCancelError        a cancel raised off the training thread, where nothing is left to cancel
    ├── SanityCheckError           what a look at data, model, loss and optimizer found wrong, all of it
    └── UsageError                 a call at the wrong moment or with a value that means nothing

What steers training rather than reports a mistake (`CancelException` and its kin) lives in `flowtrain.signals`.
The values that a message shows are also fields of the exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from numbers import Real

__all__ = [
    "AccessError",
    "AmbiguousHandlerError",
    "CallbackError",
    "CheckpointError",
    "CoreError",
    "CycleError",
    "DataError",
    "DeferredCancelError",
    "ExecutorError",
    "FlowtrainError",
    "HandlerError",
    "LoggingError",
    "LossError",
    "MissingStateError",
    "ProtectedException",
    "ResolutionError",
    "SanityCheckError",
    "UndeclaredWriteError",
    "UsageError",
    "WriteConflictError",
    "is_a",
    "is_positive",
    "is_type",
    "nearest",
]


class FlowtrainError(Exception):
    """Base of every error that flowtrain raises about the way it is used."""

    def __reduce__(self) -> tuple[Callable[..., FlowtrainError], tuple[object, ...]]:
        # Pickled by its fields: an error may come from another process, and constructors here take more than a text.
        return _restore, (type(self), self.args, dict(vars(self)))


class AccessError(FlowtrainError):
    """A declaration of state access that flowtrain cannot read."""


class ProtectedException(FlowtrainError):
    """A handler read or wrote state outside its declaration.

    Attributes:
        path: The dotted path that was touched, such as ``"batch.loss"``.
        access: ``"Read"`` or ``"Write"``.
    """

    def __init__(self, access: str, path: str, remedy: str = "") -> None:
        self.access = access
        self.path = path
        text = f"{access} access to Learner.{path} disallowed."
        super().__init__(f"{text}\n{remedy}" if remedy else text)


class UndeclaredWriteError(FlowtrainError):
    """Strict mode found state changed by a handler that does not declare to write it.

    Attributes:
        handler: Callback and method, such as ``"Printer.show"``.
        paths: The dotted paths that changed.
    """

    def __init__(self, handler: str, paths: tuple[str, ...], message: str) -> None:
        self.handler = handler
        self.paths = paths
        super().__init__(message)


class HandlerError(FlowtrainError):
    """A handler that cannot be registered or can never run."""


class AmbiguousHandlerError(HandlerError):
    """Two handlers of one callback fit an event and phase equally well."""


class CallbackError(FlowtrainError):
    """Callbacks that do not make a list: a class for an instance, a duplicate, a name that is not there."""


class WriteConflictError(FlowtrainError):
    """Two callbacks write state that overlaps, and nothing says which goes first.

    Attributes:
        callbacks: The names of the two callbacks.
        paths: What each of them declares to write.
        event: The event at which they meet, as ``"BatchEnd, TrainingPhase"``.
    """

    def __init__(self, callbacks: tuple[str, str], paths: tuple[str, str], event: str, message: str) -> None:
        self.callbacks = callbacks
        self.paths = paths
        self.event = event
        super().__init__(message)


class CycleError(FlowtrainError):
    """The declarations ask for an order that goes in a circle.

    Attributes:
        cycle: The names along the circle, the first one not repeated at the end.
        event: The event at which they meet.
    """

    def __init__(self, cycle: tuple[str, ...], event: str, message: str) -> None:
        self.cycle = cycle
        self.event = event
        super().__init__(message)


class ResolutionError(FlowtrainError):
    """A conflict was declared unresolvable, or its resolutions contradict each other."""


class MissingStateError(FlowtrainError, AttributeError):
    """State is read that nobody has made.

    Attributes:
        path: The dotted path that is missing.
    """

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        super().__init__(message)


class DataError(FlowtrainError):
    """Data that a phase cannot use: no pairs, a bare tensor, an empty loader."""


class LossError(FlowtrainError):
    """The loss function does not fit the model's outputs, or returned no scalar tensor."""


class CoreError(FlowtrainError):
    """A device, precision, model or optimizer that the training core cannot use."""


class ExecutorError(FlowtrainError):
    """An executor that is unknown, closed, or bound to another learner."""


class LoggingError(FlowtrainError):
    """A logging backend cannot do what it is asked to."""


class CheckpointError(FlowtrainError):
    """A checkpoint cannot be written, read, or does not fit."""


class DeferredCancelError(FlowtrainError):
    """A handler that runs off the training thread raised a cancel, and what it wanted to end has gone on."""


class SanityCheckError(FlowtrainError):
    """Data, model, loss or optimizer cannot be trained with.

    Attributes:
        problems: Each with where it is, what is wrong, and what to do.
    """

    def __init__(self, problems: tuple[tuple[str, str, str], ...], message: str) -> None:
        self.problems = problems
        super().__init__(message)


class UsageError(FlowtrainError):
    """A call at the wrong moment, or with an argument that means nothing."""


def is_a(value: object, kind: type | tuple[type, ...]) -> bool:
    """Tell whether what a user passed is what its annotation promises.

    The same as ``isinstance``, for values whose annotation is no proof: a type checker may not have been run.
    """
    return isinstance(value, kind)


def is_positive(value: object) -> bool:
    """Tell whether what a user passed is a number above zero."""
    return not is_a(value, bool) and isinstance(value, Real) and float(value) > 0


def is_type(value: object, base: type) -> bool:
    """Tell whether what a user passed is a type, and `base` or a subclass of it."""
    return isinstance(value, type) and issubclass(value, base)


def _restore(kind: type[FlowtrainError], args: tuple[object, ...], fields: dict[str, object]) -> FlowtrainError:
    error = kind.__new__(kind, *args)
    vars(error).update(fields)
    return error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to `name`, or an empty string.

    >>> nearest("outptus", ["inputs", "outputs"])
    " Did you mean 'outputs'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
