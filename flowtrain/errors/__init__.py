"""The errors that a user can cause, and the exceptions with which a handler ends a part of training.

Every error says what is wrong, with names and values, why it is wrong, and what to write instead. An error about
declarations or ranks has the names and values as fields too, for a program that handles it. `arguments` has the checks
of what users pass, and `describing` how messages describe their data.

::

    FlowtrainError
    ├── AccessError                a declaration with an unknown path, `Read` without parentheses, or the like
    ├── ProtectedException         a handler touched state that it does not declare
    ├── UndeclaredWriteError       strict mode: a handler changed state that it does not declare to write
    ├── HandlerError               a handler with two ``on``, with wrong parameters, or that can never run
    │   └── AmbiguousHandlerError  two handlers of one callback fit an event equally well
    ├── CallbackError              a list of callbacks with a class, a duplicate or an unknown name in it
    ├── WriteConflictError         two callbacks write the same state, and nothing orders them
    ├── CycleError                 declarations that ask for a circular order
    ├── ResolutionError            answers to a conflict that contradict each other
    ├── MissingStateError          a handler reads state that does not exist (also an ``AttributeError``)
    ├── DataError                  data that a phase cannot use
    ├── LossError                  a loss function that does not fit the model's outputs
    ├── CoreError                  a device, precision or optimizer that does not fit
    ├── ExecutorError              an executor that is unknown, closed or in use
    ├── LoggingError               a logging backend that cannot do the task that it was given
    ├── CheckpointError            a checkpoint that cannot be written or read, or that does not fit
    ├── DeferredCancelError        a cancel raised by a deferred handler, after its batch has passed
    ├── RankError                  several processes that cannot train together, or would not stay equal
    │   └── DivergedError          state that must be equal on all ranks differs
    ├── RemoteError                an error of another rank, which has ended training on all of them
    ├── SanityCheckError           all problems that a check of data, model, loss and optimizer has found
    └── UsageError                 a call at the wrong moment, or an argument with a wrong value

`CancelException` and its subclasses are no errors: a handler raises one to end a batch, an epoch or a fit, and training
continues after that part. When several handlers of one event fail, one exception is raised and carries the others
(`merge`): an error goes before a cancel, a wider cancel before a narrower one, an earlier handler before a later one.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from typing import ClassVar

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
    "DivergedError",
    "ExecutorError",
    "FlowtrainError",
    "HandlerError",
    "LoggingError",
    "LossError",
    "MissingStateError",
    "ProtectedException",
    "RankError",
    "RemoteError",
    "ResolutionError",
    "SanityCheckError",
    "UndeclaredWriteError",
    "UsageError",
    "WriteConflictError",
    "merge",
    "raise_worst",
    "text_of",
]


class FlowtrainError(Exception):
    """Base of all errors that flowtrain raises about the way it is used."""

    def __reduce__(self) -> tuple[Callable[..., FlowtrainError], tuple[object, ...], dict[str, object]]:
        # Errors come from worker processes too. Pickle would call the constructor with the text as its only argument.
        made = copyreg.__newobj__  # type: ignore[attr-defined]  # not in the stubs
        return made, (type(self), *self.args), dict(vars(self))


class AccessError(FlowtrainError):
    """An access declaration is not valid."""


class ProtectedException(FlowtrainError):
    """A handler read or wrote state outside its declaration.

    Attributes:
        path: The dotted path that was touched, such as ``"batch.loss"``.
        access: The access that is not declared: ``"Read"`` or ``"Write"``.
    """

    def __init__(self, access: str, path: str, remedy: str = "") -> None:
        self.access = access
        self.path = path
        text = f"{access} access to Learner.{path} disallowed."
        super().__init__(f"{text}\n{remedy}" if remedy else text)


class UndeclaredWriteError(FlowtrainError):
    """Strict mode found that a handler changed state that it does not declare to write.

    Attributes:
        handler: The names of the callback and of the handler, such as ``"Printer.show"``.
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
    """A list of callbacks is not valid: a class instead of an instance, a duplicate, or a name that does not exist."""


class WriteConflictError(FlowtrainError):
    """Two callbacks write the same state, and nothing says which of them runs first.

    Attributes:
        callbacks: The names of the two callbacks.
        paths: The dotted paths that the two declare to write.
        event: The event at which they meet, as ``"BatchEnd, TrainingPhase"``.
    """

    def __init__(self, callbacks: tuple[str, str], paths: tuple[str, str], event: str, message: str) -> None:
        self.callbacks = callbacks
        self.paths = paths
        self.event = event
        super().__init__(message)


class CycleError(FlowtrainError):
    """The declarations ask for a circular order.

    Attributes:
        cycle: The names of the callbacks along the cycle; the first one is not repeated at the end.
        event: The event at which the callbacks meet, as ``"BatchEnd, TrainingPhase"``.
    """

    def __init__(self, cycle: tuple[str, ...], event: str, message: str) -> None:
        self.cycle = cycle
        self.event = event
        super().__init__(message)


class ResolutionError(FlowtrainError):
    """An answer to a conflict is `Unresolvable`, or the answers contradict each other."""


class MissingStateError(FlowtrainError, AttributeError):
    """A handler reads state that does not exist.

    Attributes:
        path: The dotted path that is missing.
    """

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        super().__init__(message)


class DataError(FlowtrainError):
    """A phase cannot use the data: items that are no pairs, a bare tensor, or an empty loader."""


class LossError(FlowtrainError):
    """The loss function does not fit the model's outputs, or did not return a tensor with one element."""


class CoreError(FlowtrainError):
    """The training core cannot use a device, precision, model or optimizer."""


class ExecutorError(FlowtrainError):
    """An executor is unknown, closed, or bound to another learner."""


class LoggingError(FlowtrainError):
    """A logging backend cannot do the task that it was given."""


class CheckpointError(FlowtrainError):
    """A checkpoint cannot be written or read, or does not fit the learner."""


class DeferredCancelError(FlowtrainError):
    """A deferred handler raised a cancel, which comes too late: training is past the batch or epoch it should end."""


class RankError(FlowtrainError):
    """Several processes cannot train together, or would not stay equal: a declaration, data or versions do not fit."""


class DivergedError(RankError):
    """State that must be equal on all ranks differs.

    Attributes:
        paths: The dotted paths that differ, such as ``"cbstate.best"``.
    """

    def __init__(self, paths: tuple[str, ...], message: str) -> None:
        self.paths = paths
        super().__init__(message)


class RemoteError(FlowtrainError):
    """Another rank has ended training on this rank too: with an error, or because it does not answer any more.

    Attributes:
        ranks: The ranks that have raised an error; empty if a rank has ended without a word, or stands still.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        self.ranks = ranks
        super().__init__(message)


class SanityCheckError(FlowtrainError):
    """Data, model, loss or optimizer cannot be trained with.

    Attributes:
        problems: For each problem its place, what is wrong, and the remedy.
    """

    def __init__(self, problems: tuple[tuple[str, str, str], ...], message: str) -> None:
        self.problems = problems
        super().__init__(message)


class UsageError(FlowtrainError):
    """A call comes at the wrong moment, or has an argument with a wrong value."""


class CancelException(Exception):
    """Base of the exceptions that end a part of training on purpose.

    Raise one of its three subclasses, with a message that says why: ``raise CancelFittingException("loss is flat")``.
    """

    scope: ClassVar[str] = ""
    """The part of training that the exception ends: ``"batch"``, ``"epoch"`` or ``"fit"``."""


class CancelBatchException(CancelException):
    """Skip the rest of this batch. `BatchCancelled` fires instead of `BatchEnd`."""

    scope = "batch"


class CancelEpochException(CancelException):
    """End this epoch now. An open batch is cancelled first, then `EpochEnd` fires."""

    scope = "epoch"


class CancelFittingException(CancelException):
    """End training now. `fit` returns normally and `Learner.stopped` holds the exception; `epoch` raises it."""

    scope = "fit"


_CANCELS = (CancelFittingException, CancelEpochException, CancelBatchException)


def _rank(failure: BaseException) -> int:
    """Return the rank of a failure in `merge`; the smallest rank is raised."""
    error = 0 if isinstance(failure, Exception) else -1  # an interrupt goes before every error
    return next((rank for rank, kind in enumerate(_CANCELS, start=1) if isinstance(failure, kind)), error)


def merge(failures: Sequence[BaseException]) -> BaseException:
    """Choose the exception to raise among several, and attach the others to it.

    Args:
        failures: At least one exception, in serial order of the handlers that raised them.

    Returns:
        The worst exception, in the order that this module describes. Its attribute ``others`` is a tuple of the other
        exceptions, and of those that they carry from an earlier merge; its notes name each of them.

    >>> merge([CancelBatchException("skip"), ValueError("broken")])
    ValueError('broken')
    """
    # Each may carry others already, from the event in which it was first raised, and one exception may come twice.
    carried: list[BaseException] = [each for failure in failures for each in (failure, *getattr(failure, "others", ()))]
    distinct = list({id(failure): failure for failure in carried}.values())
    worst, *others = sorted(distinct, key=_rank)
    known: tuple[BaseException, ...] = getattr(worst, "others", ())
    others = [other for other in others if all(other is not listed for listed in known)]
    if others:
        worst.others = (*known, *others)  # type: ignore[attr-defined]  # any exception may carry them
        for other in others:
            worst.add_note(f"also raised: {text_of(other)}")
    return worst


def text_of(failure: BaseException) -> str:
    """Return the type and the text of an exception, also of one of a user whose own ``__str__`` fails."""
    try:
        return f"{type(failure).__name__}: {failure}"
    except Exception as why:
        return f"{type(failure).__name__} (its text fails with {type(why).__name__})"


def raise_worst(failures: list[BaseException], *ends: type[BaseException]) -> None:
    """Raise the exception that `merge` chooses, unless it has one of the types `ends`, and empty the list.

    An exception holds the frames that it went through. A variable or a list in one of them that held the exception
    would be a reference cycle, which keeps the batch in memory until the garbage collector runs. So none is left here.
    """
    worst = merge(failures)
    failures.clear()
    try:
        if not isinstance(worst, ends):
            raise worst
    finally:
        del worst
