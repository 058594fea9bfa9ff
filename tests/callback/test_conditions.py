"""Conditions: which arguments they refuse and how they count; the tests of throttle and of plans cover the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from flowtrain import BatchEnd, Phase, TrainingPhase, UsageError, ValidationPhase
from flowtrain.callback.conditions import After, Before, Condition, Every, EverySeconds, Once, When
from flowtrain.callbacks import CustomCallback
from flowtrain.testing import tiny_learner
from tests.support.untyped import untyped


def test_every_counts_by_phase_and_goes_on_from_its_state() -> None:
    every = Every(BatchEnd, 2)
    asked = [every.ready(TrainingPhase()), every.ready(ValidationPhase()), every.ready(TrainingPhase())]
    assert asked == [False, False, True]
    again = Every(BatchEnd, 2)
    again.load_state_dict(every.state_dict())
    assert (again.ready(ValidationPhase()), again.ready(TrainingPhase())) == (True, False)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_whole_number(every: Any) -> None:
    with pytest.raises(UsageError, match=r"^Every\(\): every is a whole number, at least 1, got "):
        Every(BatchEnd, every)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: After(BatchEnd, untyped("2")), "after(): n is a whole number, at least 1, got '2'."),
        (lambda: After(BatchEnd, -1), "after(): n is a whole number, at least 1, got -1."),
        (lambda: Before(BatchEnd, untyped(2.0)), "before(): n is a whole number, at least 2, got 2.0."),
        (lambda: Before(BatchEnd, 0), "before(): n is a whole number, at least 2, got 0."),
        (
            lambda: EverySeconds(BatchEnd, untyped("3")),
            "EverySeconds(..., '3'): seconds is a number above zero, such as 30.",
        ),
        (
            lambda: EverySeconds(BatchEnd, math.inf),
            "EverySeconds(..., inf): seconds is a number above zero, such as 30.",
        ),
        (
            lambda: EverySeconds(BatchEnd, 10**400),
            f"EverySeconds(..., {10**400}): seconds is a number above zero, such as 30.",
        ),
        (lambda: EverySeconds(BatchEnd, 0), "EverySeconds(..., 0): seconds is a number above zero, such as 30."),
        (
            lambda: When(BatchEnd, untyped(True)),
            "When(..., True): the predicate is a function of the event's number and the phase: "
            "lambda number, phase: number < 10.",
        ),
        (
            lambda: Once(untyped("BatchEnd")),
            "Once('BatchEnd'): a condition is asked at events of a type. Write BatchEnd.",
        ),
    ],
)
def test_conditions_that_cannot_be_asked_are_refused_when_they_are_made(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        make()
    assert str(raised.value) == text


def test_after_and_before_count_by_phase() -> None:
    after, before, phase = After(BatchEnd, 1), Before(BatchEnd, 3), TrainingPhase()
    assert [after.ready(phase) for _ in range(3)] == [False, True, True]
    assert [before.ready(phase) for _ in range(3)] == [True, True, False]


class Forgets(Condition):
    """A condition without a ``return``."""

    def ready(self, phase: Phase) -> Any:
        """Forget to answer."""


@pytest.mark.parametrize("deferrable", [False, True])
def test_a_condition_that_does_not_answer_is_named(deferrable: bool) -> None:
    """It would count as one that is not ready, and its handler would never run."""
    callback = CustomCallback(lambda learner: None, BatchEnd)
    callback.deferrable = deferrable
    callback.conditions = (Every(BatchEnd, 1), Forgets(BatchEnd))
    with pytest.raises(UsageError) as raised:
        tiny_learner(callback, n_batches=1).fit(1)
    assert str(raised.value) == (
        "Forgets.ready(phase) returned None. Its answer decides whether the handler runs: return True or False."
    )
