"""Schedules compared with torch's own schedulers, over a whole run and for random arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from flowtrain import UsageError
from flowtrain.callbacks.schedules.curves import constant, cosine, exponential, from_torch, one_cycle, polynomial, step
from flowtrain.callbacks.schedules.schedule import Schedule
from tests.support.examples import examples
from tests.support.untyped import untyped

Make = Callable[[torch.optim.Optimizer], LRScheduler]


def torchs(make: Make, value: float, updates: int, key: str = "lr") -> list[float]:
    """Return the values that a scheduler of torch gives to the updates of a plain loop."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=value, momentum=0.9)
    scheduler = make(optimizer)
    values: list[float] = []
    for number in range(updates):
        values.append(float(optimizer.param_groups[0][key]))
        optimizer.step()
        if number < updates - 1:  # OneCycleLR refuses further steps
            scheduler.step()
    return values


def ours(schedule: Schedule, updates: int) -> list[float]:
    return [schedule(n) for n in range(1, updates + 1)]


def near(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-12, abs=1e-12)


counts = st.integers(1, 60)
rates = st.floats(1e-4, 1.0)


@settings(max_examples=examples(40))
@given(value=rates, end=st.floats(0, 0.1), length=counts)
def test_cosine(value: float, end: float, length: int) -> None:
    make = partial(CosineAnnealingLR, T_max=length, eta_min=end)
    assert ours(cosine(value, end=end, length=length), length) == near(torchs(make, value, length))


@settings(max_examples=examples(40))
@given(value=rates, power=st.floats(0.5, 3.0), length=counts)
def test_polynomial(value: float, power: float, length: int) -> None:
    make = partial(PolynomialLR, total_iters=length, power=power)
    schedule = polynomial(value, power=power, length=length)
    assert ours(schedule, length + 5) == near(torchs(make, value, length + 5))


@settings(max_examples=examples(40))
@given(value=rates, gamma=st.floats(0.5, 1.0))
def test_exponential(value: float, gamma: float) -> None:
    assert ours(exponential(value, gamma), 80) == near(torchs(partial(ExponentialLR, gamma=gamma), value, 80))


@settings(max_examples=examples(40))
@given(value=rates, every=counts, gamma=st.floats(0.1, 1.0))
def test_step(value: float, every: int, gamma: float) -> None:
    make = partial(StepLR, step_size=every, gamma=gamma)
    assert ours(step(value, every, gamma), 80) == near(torchs(make, value, 80))


@settings(max_examples=examples(40))
@given(value=rates, at=st.sets(counts, max_size=5), gamma=st.floats(0.1, 1.0))
def test_step_at(value: float, at: set[int], gamma: float) -> None:
    make = partial(MultiStepLR, milestones=sorted(at), gamma=gamma)
    assert ours(step(value, sorted(at), gamma), 80) == near(torchs(make, value, 80))


@settings(max_examples=examples(60))
@given(value=rates, peak=st.floats(0.05, 0.9), length=st.integers(3, 60), shape=st.sampled_from(["cosine", "linear"]))
def test_one_cycle(value: float, peak: float, length: int, shape: Any) -> None:
    if abs(peak * length - 1) < 1e-9:
        return  # the warm-up has no updates: torch divides by zero
    strategy: Any = "cos" if shape == "cosine" else "linear"
    make = partial(OneCycleLR, max_lr=value, total_steps=length, pct_start=peak, anneal_strategy=strategy)
    schedule = one_cycle(value, peak=peak, shape=shape, length=length)
    assert ours(schedule, length) == near(torchs(make, value, length))
    momentum = one_cycle(0.85, start=0.95, end=0.95, peak=peak, shape=shape, length=length)
    assert ours(momentum, length) == near(torchs(make, value, length, "momentum"))
    assert schedule(length + 10) == schedule(length)


def test_one_cycle_of_few_updates() -> None:
    assert ours(one_cycle(1.0, start=0.1, end=0.0, length=1), 2) == [0.0, 0.0]
    assert one_cycle(1.0, start=0.1, end=0.0, peak=0.5, length=2)(1) == 1.0
    assert ours(one_cycle(1.0, start=0.0, peak=1.0, shape="linear", length=3), 3) == [0.0, 0.5, 1.0]


WRAPPED: dict[str, Make] = {
    "linear": partial(LinearLR, start_factor=0.1, total_iters=7),
    "restarts": partial(CosineAnnealingWarmRestarts, T_0=5, T_mult=2),
    "chained": lambda optimizer: ChainedScheduler([LinearLR(optimizer), ExponentialLR(optimizer, 0.9)]),
    "one cycle": partial(OneCycleLR, max_lr=0.3, total_steps=40),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_schedulers_of_torch(name: str) -> None:
    make = WRAPPED[name]
    schedule = from_torch(make, 0.2)
    assert ours(schedule, 40) == torchs(make, 0.2, 40)
    assert schedule(3) == torchs(make, 0.2, 3)[-1]  # updates may be asked for in any order
    if name == "one cycle":
        wrapped = from_torch(make, 0.9, key="momentum")
        assert ours(wrapped, 40) == torchs(make, 0.2, 40, "momentum")


def test_a_schedule_that_waits_for_the_fit() -> None:
    schedule = one_cycle(1e-3)
    with pytest.raises(UsageError) as caught:
        schedule(1)
    assert str(caught.value) == (
        "one_cycle(0.001) has no length, and only a fit that knows how many batches its loader has can give it one. "
        "Write length=, in updates."
    )
    assert ours(schedule.over(30), 30) == ours(one_cycle(1e-3, length=30), 30)
    assert schedule.is_open  # the object is unchanged
    fixed = cosine(1.0, length=4)
    assert fixed.over(30) is fixed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(float("nan")), "constant(value=nan): value is a finite number, such as 0.1."),
        (lambda: cosine(1.0, length=0), "cosine(): length is a whole number, at least 1, got 0."),
        (lambda: polynomial(1.0, power=float("inf")), "polynomial(power=inf): power is a finite number, such as 0.1."),
        (lambda: step(1.0, 0), "step(): every is a whole number, at least 1, got 0."),
        (
            lambda: step(1.0, [3, 2]),
            "step(every=[3, 2]): every is numbers of updates, in ascending order, none twice.",
        ),
        (lambda: one_cycle(1.0, peak=2), "one_cycle(peak=2): peak is a share of the length, from 0 to 1, such as 0.3."),
        (lambda: one_cycle(True), "one_cycle(max_value=True): max_value is a finite number, such as 0.1."),
        (
            lambda: one_cycle(1.0, shape=untyped("square")),
            'one_cycle(shape=\'square\'): shape is "cosine" or "linear".',
        ),
        (
            lambda: from_torch(lambda optimizer: ReduceLROnPlateau(optimizer), 0.1),
            "from_torch() got a ReduceLROnPlateau, which needs a metric. Use reduce_on_plateau(0.1, ...).",
        ),
        (
            lambda: from_torch(untyped(0.1), 0.2),
            "from_torch(0.1, 0.2) takes a function that makes the scheduler first, then the value. Write "
            "from_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=100), 0.1).",
        ),
        (
            lambda: from_torch(untyped(lambda optimizer: None), 0.1),
            "from_torch(make, value): make(optimizer) returned None, which is no scheduler of torch. Write "
            "from_torch(lambda optimizer: CosineAnnealingLR(optimizer, T_max=100), 0.1).",
        ),
    ],
)
def test_arguments_that_mean_nothing(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message
