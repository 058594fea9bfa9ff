"""The tree of errors: drawn in the documentation, exported, picklable; and which of several exceptions is raised."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowtrain
from flowtrain import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    EpochEnd,
    LearnerView,
    Phase,
    SerialExecutor,
    TrainingPhase,
    UsageError,
    errors,
    on,
)
from flowtrain.errors import (
    CycleError,
    DeferredCancelError,
    DivergedError,
    FlowtrainError,
    MissingStateError,
    ProtectedException,
    RemoteError,
    SanityCheckError,
    UndeclaredWriteError,
    WriteConflictError,
    merge,
)
from flowtrain.errors.describing import describe, nearest
from flowtrain.graph.executor import Executor
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.untyped import untyped

CLASSES = [
    each
    for each in vars(errors).values()
    if inspect.isclass(each) and issubclass(each, FlowtrainError) and each.__module__ == errors.__name__
]


def drawn(text: str) -> dict[str, str]:
    """Return the parent of each class in a tree that is drawn with box characters."""
    stack: list[tuple[int, str]] = []
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"^( {4}(?:[│ ] {3})*(?:[├└]── )?)(\w+)(?: {2,}\S.*)?$", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        while stack and stack[-1][0] >= depth:
            stack.pop()
        found[name] = stack[-1][1] if stack else "Exception"
        stack.append((depth, name))
    return found


def test_the_drawn_tree_is_the_real_one() -> None:
    real = {each.__name__: each.__bases__[0].__name__ for each in CLASSES}
    assert drawn(errors.__doc__ or "") == real
    assert len(real) == 23


def test_the_drawing_says_what_each_error_means() -> None:
    for each in CLASSES:
        assert each.__doc__, each
        if each is not FlowtrainError:
            assert re.search(rf"── {each.__name__} +\S", errors.__doc__ or ""), (
                f"{each.__name__} has no description in the tree"
            )


@pytest.mark.parametrize("each", CLASSES, ids=lambda each: each.__name__)
def test_every_error_is_exported(each: type[FlowtrainError]) -> None:
    assert each.__name__ in errors.__all__
    assert each.__name__ in flowtrain.__all__
    assert getattr(flowtrain, each.__name__) is each


def test_a_missing_entry_is_an_attribute_error_too() -> None:
    """`hasattr` and `getattr` with a default work on learner state."""
    assert issubclass(MissingStateError, AttributeError)


def test_a_refusal_says_what_first_and_then_what_to_do() -> None:
    """Rule 3: the first line says which access was refused, the next ones say what to declare."""
    assert str(ProtectedException("Read", "batch.loss")) == "Read access to Learner.batch.loss disallowed."
    assert str(ProtectedException("Write", "cbstate.x", "Do this.")) == (
        "Write access to Learner.cbstate.x disallowed.\nDo this."
    )


SAMPLES: list[FlowtrainError] = [
    ProtectedException("Write", "batch.loss", "Declare it."),
    UndeclaredWriteError("A.h", ("batch.loss",), "changed"),
    WriteConflictError(("A", "B"), ("batch.x", "batch"), "BatchEnd, TrainingPhase", "both write"),
    CycleError(("A", "B"), "BatchEnd, TrainingPhase", "a circle"),
    MissingStateError("cbstate.x", "nobody wrote it"),
    SanityCheckError((("optimizer", "no rate", "give one"),), "found 1 problem"),
    DivergedError(("cbstate.best",), "ranks 0 and 1 differ"),
    RemoteError("rank 1: ValueError: no such column", (1,)),
    *[each("text") for each in CLASSES if "__init__" not in vars(each)],
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_errors_travel_with_their_fields(error: FlowtrainError) -> None:
    """An error from another process or thread keeps its type, text, fields and notes."""
    error.add_note("raised in A.h")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)
        assert other.__notes__ == error.__notes__


def test_the_error_of_another_rank_begins_with_the_rank() -> None:
    assert str(RemoteError("rank 1: ValueError: no such column", (1,))) == "rank 1: ValueError: no such column"


def test_every_error_has_a_sample() -> None:
    assert {type(error) for error in SAMPLES} == set(CLASSES)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("outptus", ["inputs", "outputs"], " Did you mean 'outputs'?"),
        ("zzz", ["inputs", "outputs"], ""),
        ("anything", [], ""),
    ],
)
def test_nearest(name: str, known: list[str], hint: str) -> None:
    assert nearest(name, known) == hint


def test_a_description_of_data_that_holds_itself_ends() -> None:
    value: list[Any] = [1]
    value.append(value)
    assert describe(value) == "list of 2: int 1, list of 2: int 1, list of 2: int 1, list of 2"


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


@given(failures, failures, st.permutations([0, 1]))
def test_what_a_lesser_failure_carries_is_kept(
    first: list[Exception], second: list[Exception], order: list[int]
) -> None:
    """Rule 15: an error that was merged in a batch keeps its company when an error of the epoch is the worse one."""
    merged = [merge(first), merge(second)]
    worst = merge([merged[place] for place in order])
    assert {id(each) for each in (worst, *others(worst))} == {id(each) for each in (*first, *second)}
    assert len(others(worst)) == len(first) + len(second) - 1
    noted = [note for note in worst.__notes__ if note.startswith("also raised: ")]
    assert len(noted) == len(others(worst))


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


class Textless(Exception):
    """An exception of a user whose text fails, as after pickling without its attributes."""

    def __str__(self) -> str:
        raise AttributeError("no text")


class TextlessCancel(Textless, CancelEpochException):
    """A cancel of this kind."""


class Fails(Callback):
    """Raises an exception at the end of an epoch."""

    deferrable = True

    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    @on(EpochEnd, TrainingPhase)
    def fail(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        raise self.kind


@pytest.mark.parametrize("make", [SerialExecutor, partial(DaskExecutor, defer="always")])
def test_an_exception_whose_text_fails_is_raised_and_not_replaced(make: Callable[[], Executor]) -> None:
    learner = tiny_learner(Fails(Textless), Fails(Textless), executor=make())
    with pytest.raises(Textless) as caught:
        learner.fit(1)
    assert [type(other) for other in untyped(caught.value).others] == [Textless]
    assert "also raised: Textless (its text fails with AttributeError)" in caught.value.__notes__
    learner.close()
    assert isinstance(learner.stopped, Textless)


def test_a_deferred_cancel_whose_text_fails_is_explained() -> None:
    learner = tiny_learner(Fails(TextlessCancel), executor=DaskExecutor(defer="always"))
    with pytest.raises(DeferredCancelError, match=r"Fails.fail raised TextlessCancel\(\) at"):
        learner.fit(1)
    learner.close()
