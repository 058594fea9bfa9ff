"""Cancels, and which of several exceptions is raised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    FlowtrainError,
    UsageError,
)
from flowtrain.errors import merge

# Kinds of exceptions, in the order in which they are raised.
KINDS: list[tuple[type[BaseException], ...]] = [
    (KeyboardInterrupt, SystemExit),
    (ValueError, RuntimeError, UsageError, CancelException),
    (CancelFittingException,),
    (CancelEpochException,),
    (CancelBatchException,),
]
RANK = {kind: rank for rank, kinds in enumerate(KINDS) for kind in kinds}

failures = st.lists(st.sampled_from(list(RANK)).map(lambda kind: kind("why")), min_size=1, max_size=8)


def others(failure: BaseException) -> tuple[BaseException, ...]:
    found: tuple[BaseException, ...] = getattr(failure, "others", ())
    return found


@given(failures)
def test_merge_orders_all_that_failed(raised: list[BaseException]) -> None:
    """Rule 15: errors before cancels, Fitting before Epoch before Batch, then serial order; every exception is kept."""
    worst = merge(raised)
    expected = sorted(raised, key=lambda failure: RANK[type(failure)])  # stable: one kind stays in serial order
    assert [worst, *others(worst)] == expected
    notes = getattr(worst, "__notes__", [])
    assert notes == [f"also raised: {type(other).__name__}: why" for other in expected[1:]]


@given(failures, st.data())
def test_merge_counts_an_exception_once(raised: list[BaseException], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(raised), max_size=4))
    worst = merge([*raised, *again])
    assert len({id(each) for each in others(worst)}) == len(others(worst)) == len(raised) - 1
    assert worst not in others(worst)


@given(failures)
def test_merging_again_changes_nothing(raised: list[BaseException]) -> None:
    worst = merge(raised)
    before, notes = others(worst), list(getattr(worst, "__notes__", []))
    assert merge([worst, *before]) is worst
    assert others(worst) == before
    assert getattr(worst, "__notes__", []) == notes


def test_later_failures_are_added_to_earlier_ones() -> None:
    """Rule 17: the first error is raised, and failures while closing are attached to it."""
    first, skipped, late = ValueError("first"), CancelBatchException("skip"), RuntimeError("late")
    assert merge([merge([first, skipped]), late]) is first
    assert others(first) == (skipped, late)


def test_a_single_failure_stays_as_it_is() -> None:
    failure = ValueError("alone")
    assert merge([failure]) is failure
    assert not hasattr(failure, "others")
    assert not hasattr(failure, "__notes__")


@pytest.mark.parametrize(
    ("kind", "scope"),
    [(CancelBatchException, "batch"), (CancelEpochException, "epoch"), (CancelFittingException, "fit")],
)
def test_a_cancel_names_what_it_ends(kind: type[CancelException], scope: str) -> None:
    class Mine(kind):  # type: ignore[valid-type,misc]  # a base that is a parameter of the test
        """A user's own exception that stops training."""

    assert kind.scope == scope
    assert Mine("why").scope == scope
    assert merge([CancelException("?"), Mine("why")]).args == ("?",)


def test_cancels_are_control_flow_and_no_errors() -> None:
    assert not issubclass(CancelException, FlowtrainError)
    assert issubclass(CancelException, Exception)
