"""One decision for all ranks: a training continues on all of them, or ends on all of them, with the reason.

Ranks meet at *sync points*, which come in the same order on all of them. At each point every rank gives its *flags*:
whether it has failed, has raised a cancel, was interrupted, or has no further batch. All ranks then see the same sums
and act alike. The points of a fit are `FitBegin`, and for each epoch `EpochBegin`, one for each batch in training, the
end of its batches, and `EpochEnd`; the last one is `FitEnd`. In a training batch the flags travel with the gradients
(`flowtrain.core.data_parallel`); the batches of an evaluation have no sync point. A sharded model is gathered in every
forward pass (`flowtrain.core.sharding`): a training batch then has its sync point before the backward pass, by a
message, and an evaluation has one before each batch.

A rank that fails between two points takes part in the next one, instead of its own computation, and tells there that it
has failed: so no other rank waits for it. What a rank raises after the sync point of a batch waits for that of the next
batch, or for the end of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from flowtrain.core.data_parallel import FLAGS, LEAVES
from flowtrain.core.world import World
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    RankError,
    RemoteError,
    merge,
    raise_worst,
)

__all__ = ["END", "EPOCHS_BROKEN_OFF", "FIT_END", "INTERRUPT", "NO_BATCH", "NextSync", "Ranks"]

# Each flag is one number in the message of a sync point, here by its index. A rank sets at most one of the last four:
# the worst failure that it has.
NO_BATCH: Final = 0
INTERRUPT: Final = 1
END: Final = 2
_BATCH: Final = LEAVES
_EPOCH: Final = 4
_FIT: Final = 5
_ERROR: Final = 6

_CANCELS: dict[int, type[CancelException]] = {
    _BATCH: CancelBatchException,
    _EPOCH: CancelEpochException,
    _FIT: CancelFittingException,
}

EPOCHS_BROKEN_OFF: Final = "a failure that ends its epochs"
"""The point at which a rank tells of a failure that has ended its epochs, whichever point the other ranks are at."""

FIT_END: Final = "FitEnd"
"""The last point of a fit."""

NextSync: TypeAlias = Literal["gradients", "flags", "forward", ""]
"""The next sync point of a batch; `Ranks.next_sync` says what each of these means."""


class _Report(NamedTuple):
    """What a rank tells at a sync point outside of batches.

    Attributes:
        point: The name of the point.
        flags: Its flags.
        reason: Its failure as text; empty without one.
        value: An object that this rank tells the others there, such as its plans.
    """

    point: str
    flags: list[int]
    reason: str
    value: Any


_ELSEWHERE = _Report("an exchange of values for a handler", [0] * FLAGS, "", None)
"""Stands for the message of a rank that is not at a sync point."""


class Ranks:
    """The sync points of one learner, on one rank.

    Args:
        world: The ranks.

    Attributes:
        world: The ranks.
        next_sync: The sync point that is still to come in the present batch: ``"gradients"``, in the backward pass;
            ``"flags"``, by a message of its own; ``"forward"``, only the rest of a forward pass in which all ranks take
            part; or ``""`` if there is none.
        known_failure: The place of the worst failure of the present batch that all ranks know of; 0 without one.
        interrupted: Whether a signal to any rank ends the fit at the end of this batch.
        fit_ends: Whether all ranks know of a failure that ends the fit, so that the next sync point is the last one.
        ended_elsewhere: Whether another rank has passed the last sync point of the fit.
        late_cancel: A cancel that was raised after the sync point of its batch, and takes effect at the next one.
        leave: A function that ends the fit for a signal to this process, at a batch boundary; ``None`` without one.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.next_sync: NextSync = ""
        self.known_failure = 0
        self.interrupted = self.fit_ends = self.ended_elsewhere = False
        self.late_cancel: BaseException | None = None
        self.leave: Callable[[], None] | None = None

    def begin(self) -> None:
        """Begin a fit, an epoch or a step that a user has called: nothing is left from before."""
        self.next_sync, self.known_failure = "", 0
        self.interrupted = self.fit_ends = self.ended_elsewhere = False
        self.late_cancel = self.leave = None

    def begin_batch(self, sync: NextSync) -> None:
        """Begin a batch, whose sync point is of this kind."""
        self.next_sync, self.known_failure = sync, 0

    def knows(self, failure: BaseException) -> bool:
        """Tell whether all ranks know of a failure of the present batch, or of one that is at least as bad."""
        return self.known_failure >= _place(failure) or self.fit_ends or self.world.lost

    @property
    def failed(self) -> bool:
        """Whether an error of a rank was told at the last sync point, or a rank is lost."""
        return self.known_failure == _ERROR or self.world.lost

    def flags(self, failure: BaseException | None = None, *, batch: bool = True) -> list[int]:
        """Return the flags of this rank.

        Args:
            failure: The failure of this rank that the others do not know of yet.
            batch: Whether a late cancel of a batch is among them; it must wait for the sync point of a batch.
        """
        found = [0] * FLAGS
        if self.leave is not None:
            found[INTERRUPT] = 1
        if failure is None and (batch or not isinstance(self.late_cancel, CancelBatchException)):
            failure = self.late_cancel
        if failure is not None:
            found[_place(failure)] = 1
        return found

    # --- sync points outside of batches

    def meet(self, point: str, failures: list[BaseException], value: Any = None) -> list[Any]:
        """Exchange flags and a value with all ranks at a sync point.

        Args:
            point: The name of the point.
            failures: The failures of this rank, to which those of other ranks are added.
            value: The value of this rank, which is pickled.

        Returns:
            The values of all ranks in their order; an empty list if a rank has failed, or if the ranks do not meet any
            more, because one is lost or all know that the fit ends.
        """
        if self.world.lost or (self.fit_ends and point != FIT_END) or (self.ended_elsewhere and point == FIT_END):
            return []
        if self.late_cancel is not None:
            failures.append(self.late_cancel)
            self.late_cancel = None
        mine = merge(failures) if failures else None
        flags = self.flags(mine)
        try:
            found = self.world.exchange(_Report(point, flags, "" if mine is None else _text(mine), value))
        except RemoteError as lost:
            failures.append(lost)
            return []
        reports = [each if isinstance(each, _Report) else _ELSEWHERE for each in found]
        sums = [sum(each) for each in zip(*(report.flags for report in reports), strict=True)]
        points = {report.point for report in reports}
        self.ended_elsewhere = point != FIT_END and FIT_END in points
        if len(points) > 1 and not _worst(sums):
            shown = ", ".join(f"rank {rank} is at {report.point}" for rank, report in enumerate(reports))
            failures.append(
                RankError(
                    f"The ranks have gone different ways: {shown}. Call fit, epoch, step and evaluate in the same "
                    f"order and with the same arguments on every rank: a condition such as `if learner.rank == 0:` "
                    f"must not decide about these calls."
                )
            )
            self.fit_ends = True
        self.known_failure = _worst(sums)
        self._add(sums, [report.reason for report in reports], failures)
        return [report.value for report in reports] if not failures else []

    # --- sync points of batches

    def join(self, sums: Sequence[int], failure: BaseException | None) -> None:
        """Act on the sums of the flags of a batch: raise the worst failure of all ranks, if there is one.

        Args:
            sums: The sums.
            failure: The failure of this rank, which was among the flags.

        Raises:
            BaseException: The failure of this rank, or one that names the rank that has failed.
        """
        self.next_sync = ""
        self.interrupted = self.interrupted or sums[INTERRUPT] > 0
        self.known_failure = _worst(sums)
        if not self.known_failure:
            return
        own, self.late_cancel = failure or self.late_cancel, None
        failures = [own] if own is not None else []
        self._add(sums, self.world.exchange("" if own is None else _text(own)), failures)
        del own, failure
        raise_worst(failures)

    def _add(self, sums: Sequence[int], reasons: Sequence[str], failures: list[BaseException]) -> None:
        """Add the failure of other ranks to those of this rank, if it is worse than them; note how the fit ends."""
        worst = _worst(sums)
        self.interrupted = self.interrupted or sums[INTERRUPT] > 0
        if worst in (_FIT, _ERROR):
            self.fit_ends = True
        mine = merge(failures) if failures else None
        if not worst or (mine is not None and _place(mine) >= worst):
            return
        others = {rank: text for rank, text in enumerate(reasons) if text and rank != self.world.rank}
        text = "; ".join(f"rank {rank}: {reason}" for rank, reason in others.items())
        cancel = _CANCELS.get(worst)
        failures.append(RemoteError(text, tuple(others)) if cancel is None else cancel(text))


def _place(failure: BaseException) -> int:
    """Return the place of the flag for a failure."""
    return next((place for place, kind in _CANCELS.items() if isinstance(failure, kind)), _ERROR)


def _worst(sums: Sequence[int]) -> int:
    """Return the place of the worst failure of any rank; 0 without one."""
    return next((place for place in (_ERROR, _FIT, _EPOCH, _BATCH) if sums[place]), 0)


def _text(failure: BaseException) -> str:
    """Return a failure as one line, with where it was raised."""
    notes = "; ".join(getattr(failure, "__notes__", ()))
    text = f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
    return f"{text} ({notes})" if notes else text
