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

What steers training rather than reports a mistake (`CancelException` and its kin) lives in `flowtrain.errors`.
The values that a message shows are also fields of the exception.

Control flow by exception: how a handler ends a batch, an epoch or a fit, and which of several failures counts.

A handler raises a `CancelException`; the loop closes what the exception names and goes on behind it. When several
handlers of one event fail, one exception is raised and carries the others: an error before any cancel, the wider
cancel before the narrower, and the earlier handler before the later (`merge`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, cast

import torch

__all__ = [
    "AccessError",
    "AmbiguousHandlerError",
    "CallbackError",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFittingException",
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
    "describe",
    "is_a",
    "is_positive",
    "is_type",
    "is_whole",
    "merge",
    "nearest",
    "raise_worst",
    "whole_number",
    "without_frames",
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


def is_whole(value: object) -> bool:
    """Tell whether what a user passed is a whole number: also one of NumPy, but neither ``True`` nor ``2.0``."""
    return type(value) is int or (is_a(value, Integral) and not is_a(value, bool))


def whole_number(what: str, value: object, least: int = 1, error: type[FlowtrainError] = UsageError) -> int:
    """Return what a user passed as an ``int``, if it is a whole number (`is_whole`) that is large enough.

    Args:
        what: What it was passed as, for the message.
        value: What was passed.
        least: The smallest number that is allowed.
        error: The type of the error.

    Raises:
        FlowtrainError: It is no whole number, or below `least`.

    >>> whole_number("Every(): n", 2.0)
    Traceback (most recent call last):
    flowtrain.errors.UsageError: Every(): n is a whole number, at least 1, got 2.0.
    """
    if not is_whole(value) or (number := int(cast("int", value))) < least:
        raise error(f"{what} is a whole number, at least {least}, got {value!r}.")
    return number


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


class CancelException(Exception):
    """Base of the exceptions that end a part of training on purpose.

    Raise one of the three below, with a message that says why: ``raise CancelFittingException("loss is flat")``.
    """

    scope: ClassVar[str] = ""
    """What it ends: ``"batch"``, ``"epoch"`` or ``"fit"``."""


class CancelBatchException(CancelException):
    """Skip the rest of this batch. `BatchCancelled` fires in place of `BatchEnd`."""

    scope = "batch"


class CancelEpochException(CancelException):
    """End this epoch now. An open batch is cancelled first, then `EpochEnd` fires."""

    scope = "epoch"


class CancelFittingException(CancelException):
    """End training now. `fit` returns normally and `Learner.stopped` holds the exception."""

    scope = "fit"


_CANCELS = (CancelFittingException, CancelEpochException, CancelBatchException)


def _rank(failure: BaseException) -> int:
    for rank, kind in enumerate(_CANCELS, start=1):
        if isinstance(failure, kind):
            return rank
    return 0 if isinstance(failure, Exception) else -1  # an interrupt comes before everything


def without_frames(failure: BaseException) -> BaseException:
    """Return an exception of the same type, arguments and notes that holds no frames, and with them no batch or model.

    A copy, since who caught the exception itself may still print where it came from.
    """
    bare = type(failure).__new__(type(failure), *failure.args)
    others = tuple(without_frames(other) for other in getattr(failure, "others", ()))
    vars(bare).update(vars(failure), **({"others": others} if others else {}))
    return bare


def merge(failures: Sequence[BaseException]) -> BaseException:
    """Choose the exception to raise among several, and attach the others to it.

    Args:
        failures: At least one exception, in serial order of the handlers that raised them.

    Returns:
        The worst one: errors come before cancels, then `CancelFittingException`, `CancelEpochException` and
        `CancelBatchException`, then serial order. Its attribute ``others`` is the tuple of the rest, and each of
        these is also a note on it.

    >>> merge([CancelBatchException("skip"), ValueError("broken")])
    ValueError('broken')
    """
    distinct = list({id(failure): failure for failure in failures}.values())
    worst, *others = sorted(distinct, key=_rank)
    known: tuple[BaseException, ...] = getattr(worst, "others", ())
    others = [other for other in others if all(other is not each for each in known)]
    if others:
        worst.others = (*known, *others)  # type: ignore[attr-defined]  # any exception may carry them
        for other in others:
            worst.add_note(f"also raised: {type(other).__name__}: {other}")
    return worst


def raise_worst(failures: list[BaseException], *ends: type[BaseException]) -> None:
    """Raise what `merge` chooses, unless it is one of `ends`; the list is emptied.

    An exception holds the frames that it went through. If one of them, or a list in one of them, held the exception in
    turn, the batch in those frames, graph and all, would live until the garbage collector comes. So nothing keeps it.
    """
    worst = merge(failures)
    failures.clear()
    try:
        if not isinstance(worst, ends):
            raise worst
    finally:
        del worst


def describe(value: Any) -> str:
    """Say in a few words what a piece of data is: type, shape and dtype, or length and first parts.

    >>> import torch
    >>> describe(torch.zeros(2, 3))
    'Tensor of shape (2, 3), float32'
    """
    if isinstance(value, torch.Tensor) or all(hasattr(value, name) for name in ("__array__", "shape", "dtype")):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(repr(key) for key in list(value)[:6])}"
    if isinstance(value, (tuple, list)):
        parts = [describe(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"{type(value).__name__} of {len(value)}" + (f": {', '.join(parts)}" if parts else "")
    return f"{type(value).__name__} {value!r:.60}"
