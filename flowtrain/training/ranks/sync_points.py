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
batch, or for the end of the epoch. The state of a batch is the kind of the sync point that is still to come in it:

=============  ===================================  ==========================================================
next           `passed(sums)`: all ranks came to it  `fail(failure)`: this rank leaves the batch before it
=============  ===================================  ==========================================================
`GRADIENTS`    then `NONE`, or what `expect` says   sends zeros with its flags (`Replica.leave`), then `passed`
`MESSAGE`      the same                             sends a message with its flags, then `passed`
`FORWARD`      no flags: `begin` follows            gathers the rest of the forward pass, then `NONE`; or a
                                                    message, if the other ranks are at a point before or in it
`NONE`         no flags: `begin` follows            nothing: `late` keeps a cancel for the next batch, and an
                                                    error is told there (`begin`, then `fail`)
=============  ===================================  ==========================================================

`passed` raises the worst failure of all ranks, and all of them know of it from then on (`knows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypeVar, cast

from flowtrain.core.replica import FIRST_FAILURE, FLAGS, Replica
from flowtrain.core.world import World
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    RankError,
    RemoteError,
    merge,
    text_of,
)
from flowtrain.training.failures import Failures

__all__ = [
    "END", "FIT_END", "FORWARD", "GRADIENTS", "INTERRUPT", "MESSAGE", "NONE", "NO_BATCH", "NextSync", "SyncPoints",
]  # fmt: skip

T = TypeVar("T")

# Each flag is one number in the message of a sync point, here by its index. A rank sets at most one of the last four:
# the worst failure that it has.
NO_BATCH: Final = 0
INTERRUPT: Final = 1
END: Final = 2
_UPDATES: Final = 3
_BATCH: Final = FIRST_FAILURE
_EPOCH: Final = 5
_FIT: Final = 6
_ERROR: Final = 7

_CANCELS: dict[int, type[CancelException]] = {
    _BATCH: CancelBatchException,
    _EPOCH: CancelEpochException,
    _FIT: CancelFittingException,
}

NextSync: TypeAlias = Literal["gradients", "message", "forward", ""]
"""The sync point that is still to come in a batch."""

GRADIENTS: Final = "gradients"
"""In the backward pass, or right before that of a sharded model."""

MESSAGE: Final = "message"
"""By a message of its own."""

FORWARD: Final = "forward"
"""No sync point, but the rest of a forward pass in which all ranks take part, in the evaluation of a sharded model."""

NONE: Final = ""
"""The present batch has no further sync point."""

FIT_END: Final = "FitEnd"
"""The last point of a fit."""


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


class SyncPoints:
    """The sync points of one learner, on one rank.

    Args:
        world: The ranks.
        replica: The models of this rank, with which it takes part in the sync point of a batch that it has left.

    Attributes:
        world: The ranks.
        next: The sync point that is still to come in the present batch.
        known: The place of the worst failure of the present batch that all ranks know of; 0 without one.
        interrupted: Whether a signal to any rank ends the fit at the end of this batch.
        fit_ends: Whether all ranks know of a failure that ends the fit, so that the next sync point is the last one.
    """

    def __init__(self, world: World, replica: Replica) -> None:
        self.world = world
        self.next: NextSync = NONE
        self.known = 0
        self.interrupted = self.fit_ends = self._ended_elsewhere = False
        self._late: BaseException | None = None  # a cancel from behind a sync point; it takes effect at the next one
        self._leave: Callable[[], None] | None = None  # ends the fit for a signal to this process
        self._replica = replica

    def reset(self) -> None:
        """Begin a fit, an epoch or a step that a user has called: nothing is left from before."""
        self.next, self.known = NONE, 0
        self.interrupted = self.fit_ends = self._ended_elsewhere = False
        self._late = self._leave = None

    def knows(self, failure: BaseException) -> bool:
        """Tell whether all ranks know of a failure of the present batch, or of one that is at least as bad."""
        return self.known >= _place(failure) or self.fit_ends or self.world.lost

    @property
    def failed(self) -> bool:
        """Whether an error of a rank was told at the last sync point, or a rank is lost."""
        return self.known == _ERROR or self.world.lost

    @property
    def signalled(self) -> bool:
        """Whether this process has got a signal that ends the fit."""
        return self._leave is not None

    def flags(
        self,
        failure: BaseException | None = None,
        *,
        batch: bool = True,
        ended: bool = False,
        unable: bool = False,
        updates: bool = False,
    ) -> list[int]:
        """Return the flags of this rank.

        Args:
            failure: The failure of this rank that the others do not know of yet.
            batch: Whether a late cancel of a batch is among them; it must wait for the sync point of a batch.
            ended: Whether this rank has no further batch.
            unable: Whether it cannot take part in the batches of other ranks without one of its own.
            updates: Whether it makes an update next, whose gradients are averaged after this message.
        """
        found = [0] * FLAGS
        found[NO_BATCH], found[INTERRUPT], found[END] = int(unable), int(self.signalled), int(ended)
        found[_UPDATES] = int(updates)
        if failure is None and (batch or not isinstance(self._late, CancelBatchException)):
            failure = self._late
        if failure is not None:
            found[_place(failure)] = 1
        return found

    # --- sync points of batches

    def begin(self, sync: NextSync) -> None:
        """Begin a batch, whose sync point is of this kind."""
        self.next, self.known = sync, 0

    def expect(self, sync: NextSync) -> None:
        """Say that there is a further sync point in this batch, of this kind; or none."""
        self.next = sync

    def passed(self, sums: Sequence[int], failure: BaseException | None = None) -> None:
        """Act on the sums of the flags of a batch: raise the worst failure of all ranks, if there is one.

        Args:
            sums: The sums.
            failure: The failure of this rank, which was among the flags.

        Raises:
            BaseException: The failure of this rank, or one that names the rank that has failed.
            RankError: Some ranks make an update, and others do not.
        """
        self.next, self.known = NONE, _worst(sums)
        self.interrupted = self.interrupted or sums[INTERRUPT] > 0
        if not self.known and 0 < sums[_UPDATES] < self.world.size:  # all ranks see it, so nobody must be told
            self.known, self.fit_ends = _ERROR, True
            raise RankError(
                f"{sums[_UPDATES]} of {self.world.size} ranks make an update, and the others do not: they would wait "
                f"for each other, and the models would differ. Let a step call learner.update in the same batches on "
                f"all ranks: not by its own loss, data, clock or random numbers."
            )
        if not self.known:
            return
        own, self._late = failure or self._late, None  # `flags` has told the same one of the two
        failures = Failures() if own is None else Failures(own)
        self._add(sums, self.world.exchange("" if own is None else _text(own)), failures)
        del own, failure  # see `flowtrain.errors.raise_worst`
        failures.raise_worst()

    def ask(self, failure: BaseException | None = None, **given: bool) -> list[int]:
        """Exchange flags by a message, and act on them as `passed` does; return the sums.

        The arguments are those of `flags`.
        """
        sums = self.world.sum(self.flags(failure, **given))
        self.passed(sums, failure)
        return sums

    def fail(self, failure: BaseException) -> BaseException:
        """Take part in the next sync point with a failure of this rank; return the worst failure of all ranks."""
        if self.world.lost:  # nobody answers any more
            return failure
        try:
            if self.next == GRADIENTS:
                self.passed(self._replica.leave(self.flags(failure)), failure)
            elif self.next == FORWARD and self._replica.finish_forward():
                self.next = NONE
            else:
                self.ask(failure)
        except BaseException as worst:
            if worst is not failure and not self.known:
                # This rank cannot tell the others, as in the middle of a backward pass. They notice when its process
                # ends, so it must not wait for them.
                self.world.give_up()
                return merge([failure, worst])
            return worst
        return failure

    def late(self, cancel: BaseException) -> None:
        """Keep a cancel that was raised after the sync point of its batch, for the next sync point."""
        self._late = cancel if self._late is None else merge([self._late, cancel])

    # --- sync points outside of batches

    def meet(self, point: str, failures: Failures, value: T) -> list[T]:
        """Exchange flags and a value with all ranks at a sync point.

        Args:
            point: The name of the point.
            failures: The failures of this rank, to which those of other ranks are added.
            value: The value of this rank, which is pickled.

        Returns:
            The values of all ranks in their order; an empty list if a rank has failed, or if the ranks do not meet any
            more, because one is lost or all know that the fit ends.
        """
        # The others do not come here: they have ended, go to the last point at once, or have passed that one already.
        if self.world.lost or (self.fit_ends and point != FIT_END) or (self._ended_elsewhere and point == FIT_END):
            return []
        if self._late is not None:
            failures.add(self._late)
            self._late = None
        mine = failures.worst
        try:
            found = self.world.exchange(_Report(point, self.flags(mine), "" if mine is None else _text(mine), value))
        except RemoteError as lost:
            failures.add(lost)
            return []
        reports = [each if isinstance(each, _Report) else _ELSEWHERE for each in found]
        sums = [sum(each) for each in zip(*(report.flags for report in reports), strict=True)]
        points = {report.point for report in reports}
        self._ended_elsewhere = point != FIT_END and FIT_END in points
        self.known = _worst(sums)
        if len(points) > 1 and not self.known:
            shown = ", ".join(f"rank {rank} is at {report.point}" for rank, report in enumerate(reports))
            failures.add(
                RankError(
                    f"The ranks have gone different ways: {shown}. Call fit, epoch, step and evaluate in the same "
                    f"order and with the same arguments on every rank: a condition such as `if learner.rank == 0:` "
                    f"must not decide about these calls."
                )
            )
            self.fit_ends = True
        self._add(sums, [report.reason for report in reports], failures)
        return [] if failures else [report.value for report in reports]

    def share(self, point: str, make: Callable[[], T]) -> list[T]:
        """Call a function on every rank, and return the results of all ranks; raise the worst failure of any."""
        failures = Failures()
        made = failures.attempt(make)
        found = self.meet(point, failures, cast("T", made))  # without a result there is a failure, and no value
        failures.raise_worst()
        return found

    def _add(self, sums: Sequence[int], reasons: Sequence[str], failures: Failures) -> None:
        """Add the failure of other ranks to those of this rank, if it is worse than them; note how the fit ends."""
        worst = _worst(sums)
        self.interrupted = self.interrupted or sums[INTERRUPT] > 0
        if worst in (_FIT, _ERROR):
            self.fit_ends = True
        mine = failures.worst
        # A failure of this rank that is as bad says more, with its traceback, than the text of another one.
        if not worst or (mine is not None and _place(mine) >= worst):
            return
        others = {rank: text for rank, text in enumerate(reasons) if text and rank != self.world.rank}
        text = "; ".join(f"rank {rank}: {reason}" for rank, reason in others.items())
        cancel = _CANCELS.get(worst)
        failures.add(RemoteError(text, tuple(others)) if cancel is None else cancel(text))

    # --- signals

    def hold(self, leave: Callable[[], None]) -> None:
        """Keep the function that ends the fit for a signal to this process until all ranks know of the signal."""
        self._leave = leave

    def interrupt(self, save: Callable[[], None]) -> BaseException:
        """End the fit for a signal to any rank, at a point that all ranks have reached; return what this rank raises.

        Args:
            save: Takes the checkpoints for an interrupt. The function that was held does so too, before it raises.
        """
        self.fit_ends = True
        failures = Failures()
        with failures:
            if self._leave is not None:
                self._leave()
            save()  # a rank without a signal of its own takes part in the checkpoint
        own = failures.first
        try:
            reasons = self.world.exchange("" if own is None else str(own))
        except RemoteError as lost:
            return lost if own is None else own
        others = "; ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
        return KeyboardInterrupt(others) if own is None else own


def _place(failure: BaseException) -> int:
    """Return the place of the flag for a failure."""
    return next((place for place, kind in _CANCELS.items() if isinstance(failure, kind)), _ERROR)


def _worst(sums: Sequence[int]) -> int:
    """Return the place of the worst failure of any rank; 0 without one."""
    return next((place for place in (_ERROR, _FIT, _EPOCH, _BATCH) if sums[place]), 0)


def _text(failure: BaseException) -> str:
    """Return a failure as one line, with where it was raised."""
    notes = "; ".join(getattr(failure, "__notes__", ()))
    text = text_of(failure).removesuffix(": ")  # a failure without a text
    return f"{text} ({notes})" if notes else text
