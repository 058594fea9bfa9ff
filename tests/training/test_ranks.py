"""The sync points of several ranks, as threads of this process: flags, sums, and the failures that each rank raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import CancelBatchException, CancelEpochException, CancelFittingException
from flowtrain.core.data_parallel import FLAGS, LEAVES
from flowtrain.errors import RankError, RemoteError
from flowtrain.training.ranks import END, FIT_END, INTERRUPT, NO_BATCH, Ranks
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


def on_ranks(size: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """Call a function on every rank, with the sync points of that rank, and return the results."""
    meeting = Meeting(size, timeout=20.0)
    found = meeting.each(lambda rank: function(Ranks(MetWorld(meeting, rank))))
    broken = [each for each in found if isinstance(each, BaseException)]
    assert not broken, broken
    return found


def alone() -> Ranks:
    """Return the sync points of a rank that has no others, for what it does without a message."""
    return Ranks(MetWorld(Meeting(1), 0))


# --- flags


@pytest.mark.parametrize("place", range(len(KINDS)))
def test_a_failure_is_one_flag(place: int) -> None:
    wanted = [0] * FLAGS
    wanted[LEAVES + place] = 1
    assert alone().flags(KINDS[place]("why")) == wanted


def test_an_interrupt_and_a_late_cancel_are_flags_too() -> None:
    ranks = alone()
    ranks.leave, ranks.late_cancel = (lambda: None), CancelBatchException("late")
    both = [0] * FLAGS
    both[INTERRUPT] = both[LEAVES] = 1
    assert ranks.flags() == both
    both[LEAVES] = 0
    assert ranks.flags(batch=False) == both, "a cancel of a batch waits for the sync point of a batch"
    ranks.late_cancel = CancelEpochException("late")
    both[LEAVES + 1] = 1
    assert ranks.flags(batch=False) == both
    both[LEAVES + 1], both[LEAVES + ERROR] = 0, 1
    assert ranks.flags(ValueError()) == both, "a failure of this batch goes before"


def test_the_flags_have_places_of_their_own() -> None:
    assert len({NO_BATCH, INTERRUPT, END, *range(LEAVES, LEAVES + len(KINDS))}) == 3 + len(KINDS) <= FLAGS


# --- sync points outside of batches


def met(point: str, failure: Callable[[int], BaseException | None] = lambda rank: None) -> Callable[[Ranks], Any]:
    """Return a function that meets at a point, and gives the values, the failures and the state of the sync points."""

    def meet(ranks: Ranks) -> Any:
        """Meet with the failure of this rank, and tell its rank times ten."""
        own = failure(ranks.world.rank)
        failures = [] if own is None else [own]
        values = ranks.meet(point, failures, ranks.world.rank * 10)
        return values, [repr(each) for each in failures], (ranks.fit_ends, ranks.failed)

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
    def meet(ranks: Ranks) -> Any:
        """Meet with a late cancel of the main rank."""
        ranks.late_cancel = CancelEpochException("late") if ranks.world.main else None
        failures: list[BaseException] = []
        ranks.meet("the end of the batches", failures)
        return [type(each) for each in failures], ranks.late_cancel

    assert on_ranks(2, meet) == [([CancelEpochException], None)] * 2


def test_ranks_at_different_points_are_told_with_the_remedy() -> None:
    def meet(ranks: Ranks) -> Any:
        """Meet at a point that depends on the rank."""
        failures: list[BaseException] = []
        assert ranks.meet("EpochEnd" if ranks.world.main else "the plans", failures) == []
        [error] = failures
        return type(error), str(error), ranks.fit_ends

    text = (
        "The ranks have gone different ways: rank 0 is at EpochEnd, rank 1 is at the plans. Call fit, epoch, step and "
        "evaluate in the same order and with the same arguments on every rank: a condition such as `if learner.rank == "
        "0:` must not decide about these calls."
    )
    assert on_ranks(2, meet) == [(RankError, text, True)] * 2


def test_a_rank_that_exchanges_values_for_a_handler_meanwhile_is_at_another_point() -> None:
    def meet(ranks: Ranks) -> str:
        """Meet on the main rank; the other one gives a value of a handler."""
        if not ranks.world.main:
            ranks.world.exchange(3.0)
            return ""
        failures: list[BaseException] = []
        ranks.meet("EpochEnd", failures)
        return str(failures[0])

    assert on_ranks(2, meet)[0].startswith(
        "The ranks have gone different ways: rank 0 is at EpochEnd, rank 1 is at an exchange of values for a handler."
    )


def test_a_rank_is_not_awaited_at_the_last_point_if_it_has_passed_it() -> None:
    """The main rank ends its fit with an error while the other one is still in the epoch."""

    def meet(ranks: Ranks) -> Any:
        """Meet at the last point on the main rank, and at an earlier one on the other, which then ends too."""
        failures: list[BaseException] = [ValueError("broken")] if ranks.world.main else []
        ranks.meet(FIT_END if ranks.world.main else "EpochEnd", failures)
        again: list[BaseException] = []
        return [type(each) for each in failures], ranks.ended_elsewhere, ranks.meet(FIT_END, again), again

    main, other = on_ranks(2, lambda ranks: meet(ranks) if not ranks.world.main else _once(ranks))
    assert main == [ValueError]
    assert other == ([RemoteError], True, [], []), "no message, which nobody would answer"


def _once(ranks: Ranks) -> list[type[BaseException]]:
    """Meet at the last point of the fit with an error."""
    failures: list[BaseException] = [ValueError("broken")]
    ranks.meet(FIT_END, failures)
    return [type(each) for each in failures]


def test_a_lost_rank_is_told_once_and_asked_no_more() -> None:
    meeting = Meeting(2, timeout=20.0)

    def meet(rank: int) -> Any:
        """End on the other rank; meet twice on the main rank."""
        if rank:
            raise ValueError("killed")
        ranks = Ranks(MetWorld(meeting, rank))
        failures: list[BaseException] = []
        assert ranks.meet("EpochBegin", failures) == ranks.meet("EpochEnd", failures) == []
        return [type(each) for each in failures], ranks.failed, ranks.knows(ValueError())

    main, other = meeting.each(meet)
    assert main == ([RemoteError], True, True)
    assert isinstance(other, ValueError)


# --- sync points of batches


def test_sums_without_a_failure_need_no_further_message() -> None:
    def batch(ranks: Ranks) -> Any:
        """Run one batch; rank 1 is interrupted."""
        ranks.leave = (lambda: None) if ranks.world.rank == 1 else None
        ranks.begin_batch("flags")
        ranks.join(ranks.world.sum(ranks.flags()), None)
        return ranks.next_sync, ranks.interrupted, ranks.known_failure

    assert on_ranks(2, batch) == [("", True, 0)] * 2


def test_what_all_ranks_know_of() -> None:
    def batch(ranks: Ranks) -> Any:
        """Run one batch, in which rank 1 cancels the epoch."""
        ranks.begin_batch("gradients")
        own = CancelEpochException("enough") if ranks.world.rank else None
        with pytest.raises(CancelEpochException):
            ranks.join(ranks.world.sum(ranks.flags(own)), own)
        return [ranks.knows(kind("why")) for kind in KINDS]

    assert on_ranks(2, batch) == [[True, True, False, False]] * 2


def test_nothing_is_left_when_a_fit_or_a_batch_begins() -> None:
    ranks = alone()
    ranks.next_sync, ranks.known_failure, ranks.late_cancel = "flags", LEAVES, CancelBatchException()
    ranks.begin_batch("forward")
    assert (ranks.next_sync, ranks.known_failure, type(ranks.late_cancel)) == ("forward", 0, CancelBatchException)
    ranks.interrupted = ranks.fit_ends = ranks.ended_elsewhere = True
    ranks.leave = lambda: None
    ranks.begin()
    fresh = alone()
    assert {**vars(ranks), "world": None} == {**vars(fresh), "world": None}


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
        on_ranks(size, lambda ranks: _trained(ranks, [batch[ranks.world.rank] for batch in epoch]))
        == [_expected(epoch)] * size
    )


def _trained(ranks: Ranks, batches: Sequence[Act]) -> list[tuple[int, bool]]:
    """Run the batches of a rank as the loop does: return why each one ended, and whether the rank is interrupted."""
    ended: list[tuple[int, bool]] = []
    ranks.begin()
    for act in batches:
        ranks.begin_batch("flags")
        if act.signal:
            ranks.leave = lambda: None
        failure = KINDS[act.before]("now") if act.before >= 0 else None
        reason: BaseException | None = None
        try:
            ranks.join(ranks.world.sum(ranks.flags(failure)), failure)
        except Exception as raised:
            reason = raised
        ended.append((severity(reason), ranks.interrupted))
        assert reason is None or ranks.knows(reason)
        if reason is not None and not isinstance(reason, CancelBatchException):
            break
        if reason is None and act.late >= 0:
            ranks.late_cancel = KINDS[act.late]("late")
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
