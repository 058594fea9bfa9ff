"""Control flow by exception: how a handler ends a batch, an epoch or a fit, and which of several failures counts.

A handler raises a `CancelException`; the loop closes what the exception names and goes on behind it. When several
handlers of one event fail, one exception is raised and carries the others: an error before any cancel, the wider
cancel before the narrower, and the earlier handler before the later (`merge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFittingException",
    "merge",
    "raise_worst",
    "without_frames",
]


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
