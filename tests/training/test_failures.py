"""Failures that are collected: which one is raised, what is kept of the others, and that nothing stays in memory."""

from __future__ import annotations

import gc
import weakref

import pytest

from flowtrain import CancelBatchException, CancelEpochException, CancelException
from flowtrain.training.failures import Failures


class Batch:
    """Something large."""


def test_a_block_ends_with_its_exception_and_the_program_continues() -> None:
    failures = Failures()
    done = []
    with failures:
        done.append("before")
        raise ValueError("broken")
    with failures:
        done.append("behind")
    assert done == ["before", "behind"]
    assert repr(failures) == "Failures(ValueError('broken'))"


def test_an_interrupt_is_collected_too_and_goes_before_errors() -> None:
    failures = Failures(ValueError("broken"))
    assert failures.attempt(int, "7") == 7
    with failures:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt) as found:
        failures.raise_worst()
    assert found.value.__notes__ == ["also raised: ValueError: broken"]
    assert not failures, "what was raised is kept no longer"
    failures.raise_worst()  # nothing is left


def test_kinds() -> None:
    failures = Failures(CancelBatchException("skip"), CancelEpochException("enough"))
    assert (failures.only(CancelException), failures.only(CancelBatchException), Failures().only(OSError)) == (
        True,
        False,
        True,
    )
    assert (str(failures.first), str(failures.worst), Failures().first, Failures().worst) == (
        "skip",
        "enough",
        None,
        None,
    )
    assert failures.only(CancelBatchException, CancelEpochException)
    failures.raise_worst(CancelEpochException)  # a type that ends here
    failures.add(CancelEpochException("enough"))
    failures.drop()
    assert [*failures] == []


def test_a_failure_that_is_raised_keeps_no_frame_alive_by_a_cycle() -> None:
    def fail() -> weakref.ref[Batch]:
        """Raise in a frame that holds a batch."""
        batch, failures = Batch(), Failures()
        with failures:
            raise ValueError(str(batch))
        failures.attempt(int, "one")
        with pytest.raises(ValueError, match="Batch"):
            failures.raise_worst()
        return weakref.ref(batch)

    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()
