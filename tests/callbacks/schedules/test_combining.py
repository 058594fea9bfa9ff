"""Schedules that combine other schedules, compared with torch's SequentialLR."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR, StepLR
from torch.optim.swa_utils import SWALR

from flowtrain import UsageError
from flowtrain.callbacks.schedules.combining import per_epoch, sequence, swa_lr, warmup
from flowtrain.callbacks.schedules.curves import constant, cosine, exponential, from_torch, polynomial, step
from flowtrain.callbacks.schedules.schedule import Schedule
from tests.support.examples import examples
from tests.support.untyped import untyped


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR of torch 2.6 passes it itself
@settings(max_examples=examples(30))
@given(updates=st.integers(1, 20), rest=st.integers(1, 40), start=st.floats(0.01, 1.0), value=st.floats(1e-3, 1.0))
def test_warmup_then_cosine(updates: int, rest: int, start: float, value: float) -> None:
    theirs = from_torch(
        lambda optimizer: SequentialLR(
            optimizer,
            [LinearLR(optimizer, start, total_iters=updates), CosineAnnealingLR(optimizer, T_max=rest)],
            [updates],
        ),
        value,
    )
    total = updates + rest
    for schedule in (
        warmup(cosine(value, length=rest), updates, start=start),
        warmup(cosine(value), updates, start=start).over(total),  # stretched over the updates that the warm-up leaves
    ):
        assert [schedule(n) for n in range(1, total + 1)] == pytest.approx(
            [theirs(n) for n in range(1, total + 1)], rel=1e-12, abs=1e-12
        )


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR of torch 2.6 passes it itself
def test_sequence_is_torchs() -> None:
    theirs = from_torch(
        lambda optimizer: SequentialLR(
            optimizer, [StepLR(optimizer, 3), ExponentialLR(optimizer, 0.9), StepLR(optimizer, 4, 0.5)], [10, 25]
        ),
        0.5,
    )
    schedule = sequence([step(0.5, 3), exponential(0.5, 0.9), step(0.5, 4, 0.5)], at=[10, 25])
    assert [schedule(n) for n in range(1, 61)] == pytest.approx([theirs(n) for n in range(1, 61)], rel=1e-12)


def test_open_parts_are_stretched_over_their_turns() -> None:
    schedule = sequence([polynomial(1.0), 0.5, polynomial(0.5)], at=[4, 6])
    assert schedule.is_open
    assert [schedule.over(8)(n) for n in range(1, 10)] == [1.0, 0.75, 0.5, 0.25, 0.5, 0.5, 0.5, 0.25, 0.0]
    closed = sequence([polynomial(1.0), 0.5], at=[4])
    assert not closed.is_open
    assert closed(4) == 0.25


def test_a_fit_that_is_shorter_than_the_warmup() -> None:
    assert [warmup(cosine(1.0), 10, start=0.0).over(5)(n) for n in (1, 6, 11)] == [0.0, 0.5, 1.0]


def test_functions_and_numbers_are_schedules_too() -> None:
    schedule = warmup(lambda n: 1 / n, 2, start=0.0)
    assert [schedule(n) for n in range(1, 5)] == [0.0, 0.5, 1.0, 0.5]
    assert repr(sequence([0.1, constant(0.2)], at=[5])) == "sequence([0.1, constant(0.2)], at=[5])"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: warmup(per_epoch(cosine(1.0)), 5),
            "warmup() got per_epoch(cosine(1.0, end=0.0)), which counts epochs, and counts updates itself. "
            "Put per_epoch around the whole: per_epoch(warmup(...)).",
        ),
        (lambda: warmup(1.0, 0), "warmup(): updates is a whole number, at least 1, got 0."),
        (
            lambda: sequence(untyped(0.1), at=[5]),
            "sequence(0.1, ...) takes a list of schedules: sequence([a, b, c], at=[100, 200]).",
        ),
        (
            lambda: sequence([1.0, 2.0], at=untyped(5)),
            "sequence(at=5): at is a list of numbers of updates, such as [100, 200].",
        ),
        (
            lambda: sequence([1.0, 2.0], at=[]),
            "sequence() got 2 schedules and 0 numbers in at=[]: after each schedule but the last there is one, as "
            "sequence([a, b, c], at=[100, 200]).",
        ),
        (
            lambda: swa_lr(per_epoch(cosine(1.0)), 0.1, start=2),
            "swa_lr() got per_epoch(cosine(1.0, end=0.0)), which counts epochs, and counts updates itself. "
            "Put per_epoch around the whole: per_epoch(swa_lr(...)).",
        ),
        (lambda: swa_lr(1.0, float("inf"), start=2), "swa_lr(value=inf): value is a finite number, such as 0.1."),
        (lambda: swa_lr(1.0, 0.1, start=0), "swa_lr(): start is a whole number, at least 1, got 0."),
        (lambda: swa_lr(1.0, 0.1, start=1, length=-1), "swa_lr(): length is a whole number, at least 0, got -1."),
        (lambda: swa_lr(1.0, 0.1, start=1, shape=untyped("sine")), "swa_lr(shape='sine'): shape is 'cos' or 'linear'."),
        (
            lambda: sequence([1.0, untyped("x")], at=[1]),
            "A schedule is a function schedule(n) of the coming update, from 1, or a number; got 'x'. "
            "Write one_cycle(1e-3), or lambda n: 1e-3 / n.",
        ),
    ],
)
def test_arguments_that_mean_nothing(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", ["cos", "linear"])
@pytest.mark.parametrize("length", [0, 1, 7])
def test_swa_lr_is_torchs(shape: Literal["cos", "linear"], length: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = SWALR(optimizer, swa_lr=0.05, anneal_epochs=length, anneal_strategy=shape)
    ours = swa_lr(0.3, 0.05, start=4, length=length, shape=shape)
    assert [ours(n) for n in range(1, 5)] == [0.3] * 4
    for n in range(5, 15):
        optimizer.step()
        theirs.step()
        assert ours(n) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)


def test_swa_lr_follows_the_schedule_before_it() -> None:
    ours = swa_lr(cosine(1.0, end=0.5), 0.25, start=4, length=2, shape="linear")
    first = cosine(1.0, end=0.5, length=4)
    assert [ours(n) for n in range(1, 5)] == [first(n) for n in range(1, 5)]
    assert [ours(n) for n in (5, 6, 7)] == pytest.approx([(first(4) + 0.25) / 2, 0.25, 0.25])
    assert repr(per_epoch(ours)) == "per_epoch(swa_lr(cosine(1.0, end=0.5), 0.25, start=4, length=2))"


def test_torch_leaves_no_warning_behind() -> None:
    """Torch warns if a scheduler steps before its optimizer; warnings are errors here, so no wrapped scheduler does."""
    schedule = from_torch(partial(CosineAnnealingLR, T_max=3), 1.0)
    assert schedule(4) == pytest.approx(0.0)
    assert isinstance(torch.optim.lr_scheduler.LRScheduler, type)
