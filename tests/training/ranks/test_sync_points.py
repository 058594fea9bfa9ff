"""The sync points of several ranks, as threads of this process: flags, sums, and the failures that each rank raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import CancelBatchException, CancelEpochException, CancelFittingException
from flowtrain.core.replica import FIRST_FAILURE, FLAGS, Single
from flowtrain.core.world import World
from flowtrain.errors import RankError, RemoteError
from flowtrain.training.failures import Failures
from flowtrain.training.ranks.sync_points import (
    END,
    FIT_END,
    FORWARD,
    GRADIENTS,
    INTERRUPT,
    MESSAGE,
    NO_BATCH,
    NONE,
    NextSync,
    SyncPoints,
)
from tests.support.meeting import Meeting, MetWorld

KINDS: tuple[type[BaseException], ...] = (
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    ValueError,
)
"""The failures in the order of their flags, from the mildest to the worst."""

ERROR = KINDS.index(ValueError)


def severity(failure: BaseException | None) -> int:
    """Return the place of a failure in `KINDS`; -1 for no failure. Another rank's error is a `RemoteError` here."""
    if failure is None:
        return -1
    return next((place for place, kind in enumerate(KINDS) if isinstance(failure, kind)), ERROR)


def on_ranks(size: int, function: Callable[[SyncPoints], Any]) -> list[Any]:
    """Call a function on every rank, with the sync points of that rank, and return the results."""
    meeting = Meeting(size, timeout=20.0)
    found = meeting.each(lambda rank: function(points_of(MetWorld(meeting, rank))))
    broken = [each for each in found if isinstance(each, BaseException)]
    assert not broken, broken
    return found


def points_of(world: World) -> SyncPoints:
    """Return the sync points of a rank whose models need no other rank."""
    return SyncPoints(world, Single(torch.nn.Identity()))


def alone() -> SyncPoints:
    """Return the sync points of a rank that has no others, for what it does without a message."""
    return points_of(MetWorld(Meeting(1), 0))


# --- flags


@pytest.mark.parametrize("place", range(len(KINDS)))
def test_a_failure_is_one_flag(place: int) -> None:
    wanted = [0] * FLAGS
    wanted[FIRST_FAILURE + place] = 1
    assert alone().flags(KINDS[place]("why")) == wanted


def test_an_interrupt_and_a_late_cancel_are_flags_too() -> None:
    points = alone()
    points.hold(lambda: None)
    points.late(CancelBatchException("late"))
    both = [0] * FLAGS
    both[INTERRUPT] = both[FIRST_FAILURE] = 1
    assert points.flags() == both
    both[FIRST_FAILURE] = 0
    assert points.flags(batch=False) == both, "a cancel of a batch waits for the sync point of a batch"
    points.late(CancelEpochException("late"))
    both[FIRST_FAILURE + 1] = 1
    assert points.flags(batch=False) == both
    both[FIRST_FAILURE + 1], both[FIRST_FAILURE + ERROR] = 0, 1
    assert points.flags(ValueError()) == both, "a failure of this batch goes before"


def test_the_flags_have_places_of_their_own() -> None:
    assert len({NO_BATCH, INTERRUPT, END, *range(FIRST_FAILURE, FIRST_FAILURE + len(KINDS))}) == 3 + len(KINDS) <= FLAGS


# --- sync points outside of batches


def met(point: str, failure: Callable[[int], BaseException | None] = lambda rank: None) -> Callable[[SyncPoints], Any]:
    """Return a function that meets at a point, and gives the values, the failures and the state of the sync points."""

    def meet(points: SyncPoints) -> Any:
        """Meet with the failure of this rank, and tell its rank times ten."""
        own = failure(points.world.rank)
        failures = Failures() if own is None else Failures(own)
        values = points.meet(point, failures, points.world.rank * 10)
        return values, [repr(each) for each in failures], (points.fit_ends, points.failed)

    return meet


def test_ranks_without_a_failure_get_the_values_of_all() -> None:
    assert on_ranks(3, met("EpochBegin")) == [([0, 10, 20], [], (False, False))] * 3


def test_an_error_of_one_rank_ends_the_fit_on_all() -> None:
    found = on_ranks(3, met("EpochBegin", lambda rank: ValueError("broken") if rank == 1 else None))
    other: Any = ([], ["RemoteError('rank 1: ValueError: broken')"], (True, True))
    assert found == [other, ([], ["ValueError('broken')"], (True, True)), other]


def test_the_worst_of_two_cancels_is_raised_on_both() -> None:
    cancels = [CancelEpochException("enough"), CancelFittingException("flat")]
    first, second = on_ranks(2, met("EpochEnd", cancels.__getitem__))
    assert first == (
        [],
        ["CancelEpochException('enough')", "CancelFittingException('rank 1: CancelFittingException: flat')"],
        (True, False),
    )
    assert second == ([], ["CancelFittingException('flat')"], (True, False))


def test_a_cancel_of_the_epoch_does_not_end_the_fit() -> None:
    found = on_ranks(2, met("EpochBegin", lambda rank: CancelEpochException("enough") if rank else None))
    assert [ended for _, _, ended in found] == [(False, False)] * 2


def test_a_late_cancel_is_raised_at_the_next_point() -> None:
    def meet(points: SyncPoints) -> Any:
        """Meet with a late cancel of the main rank."""
        if points.world.main:
            points.late(CancelEpochException("late"))
        failures = Failures()
        points.meet("the end of the batches", failures, None)
        return [type(each) for each in failures], points.flags()

    assert on_ranks(2, meet) == [([CancelEpochException], [0] * FLAGS)] * 2


def test_ranks_at_different_points_are_told_with_the_remedy() -> None:
    def meet(points: SyncPoints) -> Any:
        """Meet at a point that depends on the rank."""
        failures = Failures()
        assert points.meet("EpochEnd" if points.world.main else "the plans", failures, None) == []
        [error] = failures
        return type(error), str(error), points.fit_ends

    text = (
        "The ranks have gone different ways: rank 0 is at EpochEnd, rank 1 is at the plans. Call fit, epoch, step and "
        "evaluate in the same order and with the same arguments on every rank: a condition such as `if learner.rank == "
        "0:` must not decide about these calls."
    )
    assert on_ranks(2, meet) == [(RankError, text, True)] * 2


def test_a_rank_that_exchanges_values_for_a_handler_meanwhile_is_at_another_point() -> None:
    def meet(points: SyncPoints) -> str:
        """Meet on the main rank; the other one gives a value of a handler."""
        if not points.world.main:
            points.world.exchange(3.0)
            return ""
        failures = Failures()
        points.meet("EpochEnd", failures, None)
        return str(failures.first)

    assert on_ranks(2, meet)[0].startswith(
        "The ranks have gone different ways: rank 0 is at EpochEnd, rank 1 is at an exchange of values for a handler."
    )


def test_a_rank_is_not_awaited_at_the_last_point_if_it_has_passed_it() -> None:
    """The main rank ends its fit with an error while the other one is still in the epoch."""

    def meet(points: SyncPoints) -> Any:
        """Meet in the epoch, and then at the last point."""
        failures, again = Failures(), Failures()
        points.meet("EpochEnd", failures, None)
        return [type(each) for each in failures], points.meet(FIT_END, again, None), [*again]

    main, other = on_ranks(2, lambda points: meet(points) if not points.world.main else _once(points))
    assert main == [ValueError]
    assert other == ([RemoteError], [], []), "no message, which nobody would answer"


def _once(points: SyncPoints) -> list[type[BaseException]]:
    """Meet at the last point of the fit with an error."""
    failures = Failures(ValueError("broken"))
    points.meet(FIT_END, failures, None)
    return [type(each) for each in failures]


def test_a_lost_rank_is_told_once_and_asked_no_more() -> None:
    meeting = Meeting(2, timeout=20.0)

    def meet(rank: int) -> Any:
        """End on the other rank; meet twice on the main rank."""
        if rank:
            raise ValueError("killed")
        points, failures = points_of(MetWorld(meeting, rank)), Failures()
        assert points.meet("EpochBegin", failures, None) == points.meet("EpochEnd", failures, None) == []
        return [type(each) for each in failures], points.failed, points.knows(ValueError())

    main, other = meeting.each(meet)
    assert main == ([RemoteError], True, True)
    assert isinstance(other, ValueError)


# --- sync points of batches


def test_sums_without_a_failure_need_no_further_message() -> None:
    def batch(points: SyncPoints) -> Any:
        """Run one batch; rank 1 is interrupted."""
        if points.world.rank == 1:
            points.hold(lambda: None)
        points.begin(MESSAGE)
        points.ask()
        return points.next, points.interrupted, points.known

    assert on_ranks(2, batch) == [("", True, 0)] * 2


def test_what_all_ranks_know_of() -> None:
    def batch(points: SyncPoints) -> Any:
        """Run one batch, in which rank 1 cancels the epoch."""
        points.begin(GRADIENTS)
        own = CancelEpochException("enough") if points.world.rank else None
        with pytest.raises(CancelEpochException):
            points.ask(own)
        return [points.knows(kind("why")) for kind in KINDS]

    assert on_ranks(2, batch) == [[True, True, False, False]] * 2


def test_nothing_is_left_when_a_fit_or_a_batch_begins() -> None:
    points = alone()
    points.begin(MESSAGE)
    with pytest.raises(CancelFittingException):
        points.ask(CancelFittingException("flat"))
    points.late(CancelBatchException("late"))
    points.hold(lambda: None)
    points.begin(FORWARD)
    assert (points.next, points.known) == (FORWARD, 0)
    assert points.flags() != [0] * FLAGS
    assert points.fit_ends
    points.reset()
    same = {"world": None, "_replica": None}
    assert {**vars(points), **same} == {**vars(alone()), **same}


# --- the table of the module


class Watched(Single):
    """Models that note what a rank does with them when it leaves a batch."""

    def __init__(self, out: bool) -> None:
        super().__init__(torch.nn.Identity())
        self.out, self.done = out, list[str]()

    def leave(self, flags: Sequence[int]) -> list[int]:
        self.done.append("leave")
        return [*flags]

    def finish_forward(self) -> bool:
        self.done.append("finish_forward")
        return self.out


class WatchedWorld(MetWorld):
    """A world that notes its messages."""

    def __init__(self, replica: Watched) -> None:
        super().__init__(Meeting(1), 0)
        self.replica = replica

    def sum(self, numbers: Sequence[int]) -> list[int]:
        self.replica.done.append("message")
        return [*numbers]


@pytest.mark.parametrize(
    ("sync", "out", "done", "told"),
    [
        (GRADIENTS, True, ["leave"], True),
        (MESSAGE, True, ["message"], True),
        (FORWARD, True, ["finish_forward"], False),
        (FORWARD, False, ["finish_forward", "message"], True),
    ],
)
def test_a_rank_leaves_a_batch_by_the_sync_point_that_is_still_to_come(
    sync: NextSync, out: bool, done: list[str], told: bool
) -> None:
    replica = Watched(out)
    points = SyncPoints(WatchedWorld(replica), replica)
    points.begin(sync)
    failure = ValueError("broken")
    assert points.fail(failure) is failure
    assert (replica.done, points.next, points.knows(failure)) == (done, NONE, told)


class Broken(Watched):
    """Models that a rank cannot leave, as in the middle of a backward pass."""

    def leave(self, flags: Sequence[int]) -> list[int]:
        raise RuntimeError("in the middle")


def test_a_rank_that_cannot_tell_gives_up_all_exchanges() -> None:
    points = SyncPoints(MetWorld(Meeting(1), 0), Broken(out=True))
    points.begin(GRADIENTS)
    failure = ValueError("broken")
    assert points.fail(failure) is failure
    assert failure.__notes__ == ["also raised: RuntimeError: in the middle"]
    assert points.world.lost
    points.begin(MESSAGE)
    assert points.fail(failure) is failure, "no message, for which the other ranks do not wait"


def test_a_sync_point_may_be_followed_by_another_one() -> None:
    points = alone()
    points.begin(GRADIENTS)
    points.passed([0] * FLAGS)
    assert points.next == NONE
    points.expect(MESSAGE)
    with pytest.raises(CancelEpochException):
        points.ask(CancelEpochException("enough"))
    assert points.next == NONE


def test_of_two_late_cancels_the_worse_one_is_kept() -> None:
    points = alone()
    for cancel in (CancelEpochException("enough"), CancelBatchException("skip")):
        points.late(cancel)
    points.begin(MESSAGE)
    with pytest.raises(CancelEpochException, match="enough"):
        points.ask()


def test_a_value_is_shared_or_the_worst_failure_of_any_rank_is_raised() -> None:
    assert on_ranks(2, lambda points: points.share("the plan", lambda: points.world.rank * 10)) == [[0, 10]] * 2

    def share(points: SyncPoints) -> str:
        """Fail on rank 1."""
        with pytest.raises((ZeroDivisionError, RemoteError)) as found:
            points.share("the plan", lambda: 1 / (1 - points.world.rank))
        return type(found.value).__name__

    assert on_ranks(2, share) == ["RemoteError", "ZeroDivisionError"]


# --- any sequence of batches


class Act(NamedTuple):
    """What one rank does in one batch.

    Attributes:
        before: The failure before the sync point, by its place in `KINDS`; -1 for no failure.
        late: The cancel after it.
        signal: Whether a signal comes in this batch.
    """

    before: int
    late: int
    signal: bool


acts = st.builds(
    Act,
    st.sampled_from([-1, -1, -1, 0, 1, 2, 3]),
    st.sampled_from([-1, -1, -1, 0, 1, 2]),
    st.sampled_from([False, False, True]),
)
epochs = st.integers(1, 3).flatmap(
    lambda size: st.lists(st.lists(acts, min_size=size, max_size=size), min_size=1, max_size=5)
)


@given(epochs)
def test_all_ranks_leave_the_same_batch_for_the_worst_reason_of_any(epoch: Sequence[Sequence[Act]]) -> None:
    size = len(epoch[0])
    assert (
        on_ranks(size, lambda points: _trained(points, [batch[points.world.rank] for batch in epoch]))
        == [_expected(epoch)] * size
    )


def _trained(points: SyncPoints, batches: Sequence[Act]) -> list[tuple[int, bool]]:
    """Run the batches of a rank as the loop does: return why each one ended, and whether the rank is interrupted."""
    ended: list[tuple[int, bool]] = []
    points.reset()
    for act in batches:
        points.begin(MESSAGE)
        if act.signal:
            points.hold(lambda: None)
        failure = KINDS[act.before]("now") if act.before >= 0 else None
        reason: BaseException | None = None
        try:
            points.ask(failure)
        except Exception as raised:
            reason = raised
        ended.append((severity(reason), points.interrupted))
        assert reason is None or points.knows(reason)
        if reason is not None and not isinstance(reason, CancelBatchException):
            break
        if reason is None and act.late >= 0:
            points.late(KINDS[act.late]("late"))
    return ended


def _expected(epoch: Sequence[Sequence[Act]]) -> list[tuple[int, bool]]:
    """Return the same for all ranks: in each batch the worst failure of any rank, with its late cancel from before."""
    ended: list[tuple[int, bool]] = []
    late, interrupted = [-1] * len(epoch[0]), False
    for batch in epoch:
        worst = max(act.before if act.before >= 0 else earlier for act, earlier in zip(batch, late, strict=True))
        interrupted = interrupted or any(act.signal for act in batch)
        ended.append((worst, interrupted))
        if worst > 0:
            break
        late = [act.late if worst < 0 else -1 for act in batch]
    return ended
