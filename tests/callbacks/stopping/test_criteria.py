"""The stopping criteria that are not Prechelt's, compared with values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowtrain.callbacks.stopping
from flowtrain import UsageError
from flowtrain.callbacks.monitoring import Mode
from flowtrain.callbacks.stopping import (
    UP,
    InvalidValue,
    NumberLimit,
    NumberSinceBest,
    Patience,
    Threshold,
    TimeLimit,
    Warmup,
)
from flowtrain.callbacks.stopping.criterion import Criterion
from tests.support.clock import Clock
from tests.support.criteria import stops_at

NAN, INF = math.nan, math.inf

# epochs since the best one: 0 0 1 2 0 1 2 3 4
VALUES = [9.0, 5.0, 6.0, 5.0, 4.0, 4.0, 7.0, 6.0, 5.0]


@pytest.mark.parametrize(("n", "stop"), [(1, 3), (2, 4), (3, 8), (4, 9), (5, None)])
def test_number_since_best(n: int, stop: int | None) -> None:
    assert stops_at(NumberSinceBest(n), VALUES) == stop
    assert stops_at(NumberSinceBest(n), [-value for value in VALUES], "max") == stop
    assert stops_at(Patience(n), VALUES) == stop


@given(st.lists(st.floats(-8.0, 8.0), max_size=12), st.integers(1, 4))
def test_number_since_best_stops_where_the_definition_says(values: list[float], n: int) -> None:
    since = [t - values.index(min(values[: t + 1])) for t in range(len(values))]
    assert stops_at(NumberSinceBest(n), values) == (since.index(n) + 1 if n in since else None)


def test_patience_asks_for_more_than_min_delta() -> None:
    """The best value falls by more than 0.5 to 4, to 3.25 (by 0.75) and to 2.5 (by 0.75); 3.0 and 2.75 do not count."""
    values = [4.0, 3.75, 3.25, 3.0, 2.75, 2.5, 2.25, 2.0, 2.0]
    assert stops_at(Patience(1, min_delta=0.5), values) == 2
    assert stops_at(Patience(2, min_delta=0.5), values) == 5
    assert stops_at(Patience(3, min_delta=0.5), values) == 9
    assert stops_at(Patience(4, min_delta=0.5), values) is None
    assert stops_at(Patience(2, min_delta=0.5), [-value for value in values], "max") == 5


def test_nan_is_no_improvement_and_no_best_value() -> None:
    assert stops_at(Patience(2), [NAN, 3.0, NAN, 2.0, NAN, NAN]) == 6
    assert stops_at(Patience(2), [NAN, 3.0, 4.0, 4.0]) == 4, "the first number counts as an improvement over NaN"
    assert stops_at(Patience(4, min_delta=0.5), [NAN, NAN, NAN, 3.0, NAN, 2.6, 2.6, NAN]) == 8


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("make", [Patience, NumberSinceBest, UP], ids=lambda make: make.__name__)
def test_what_is_nan_from_the_first_value_on_stops(make: Callable[[int], Criterion], mode: Mode) -> None:
    for n in (1, 3):
        assert stops_at(make(n), [NAN] * 9, mode) == n
    assert stops_at(Warmup(make(2), 3), [NAN] * 9, mode) == 5
    again = make(3)
    again.load_state_dict({**make(3).state_dict(), **({} if make is UP else {"best": NAN, "count": 0})})
    assert stops_at(again, [NAN] * 9, mode) == 3, "earlier versions saved NaN as the best value"


def test_that_reason_names_nan() -> None:
    assert Patience(1).update(NAN) == "Patience(1): the value is NaN for 1 epoch"
    criterion = UP(2)
    answers = [criterion.update(value) for value in (1.0, 2.0, NAN)]
    assert answers == [None, None, "UP(2): the value became worse 2 times in a row, from 1 to nan"]


def test_reasons_name_the_best_value_in_the_metrics_own_sign() -> None:
    criterion = NumberSinceBest(1)
    criterion.begin("max")
    assert criterion.update(0.75) is None
    assert criterion.update(0.5) == "NumberSinceBest(1): no improvement on 0.75 for 1 epoch"


def test_number_limit() -> None:
    assert [stops_at(NumberLimit(n), VALUES) for n in (1, 4, 9, 10)] == [1, 4, 9, None]


@pytest.mark.parametrize(
    ("value", "values", "mode", "stop"),
    [
        (4.5, VALUES, "min", 5),
        (4.0, VALUES, "min", None),  # equal, so not below
        (0.9, [0.5, 0.9, 0.91], "max", 3),
        (-1.0, [0.0, -2.0], "min", 2),
        (1.0, [NAN, INF, -INF], "min", 3),
    ],
)
def test_threshold(value: float, values: list[float], mode: Mode, stop: int | None) -> None:
    assert stops_at(Threshold(value), values, mode) == stop


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_invalid_value(bad: float) -> None:
    assert stops_at(InvalidValue(), [1.0, 0.0, bad, 1.0]) == 3
    assert InvalidValue().update(1.0, [2.0, bad]) == f"InvalidValue(): there is a value of {bad:g}"
    assert stops_at(InvalidValue(), VALUES) is None


def test_the_time_limit_counts_from_the_beginning_of_the_fit() -> None:
    """Epochs take 4 seconds, the limit is 10: training continues at 4 and 8 seconds and stops at 12."""
    clock = Clock()
    criterion = TimeLimit(10, clock=clock)
    clock.now += 100.0  # time before the fit does not count
    criterion.begin()
    answers = []
    for _ in range(3):
        clock.now += 4.0
        answers.append(criterion.update(1.0))
    assert answers == [None, None, "TimeLimit(10): 12 seconds have gone by"]


def test_the_time_limit_counts_from_the_first_value_where_no_fit_begins() -> None:
    """Training continues at exactly the limit."""
    clock = Clock()
    criterion = TimeLimit(timedelta(minutes=1), clock=clock)
    answers = []
    for clock.now in (50.0, 100.0, 110.0, 110.5):
        answers.append(criterion.update(1.0))
    assert answers == [None, None, None, "TimeLimit(60): 60.5 seconds have gone by"]


def test_time_between_two_fits_and_after_a_checkpoint_does_not_count() -> None:
    clock = Clock(0.0)
    first = TimeLimit(10, clock=clock)
    first.begin()
    clock.now = 6.0
    assert first.update(1.0) is None
    state = first.state_dict()
    assert state == {"spent": 6.0}
    clock.now = 500.0
    for criterion in (first, TimeLimit(10, clock=clock)):
        clock.now = 500.0
        criterion.load_state_dict(state)
        criterion.begin()
        clock.now = 504.0
        assert criterion.update(1.0) is None  # 6 seconds of this fit and 4 before
        clock.now = 504.5
        assert criterion.update(1.0) == "TimeLimit(10): 10.5 seconds have gone by"


def test_every_criterion_has_a_state_that_goes_on_and_can_be_forgotten() -> None:
    makers: list[Callable[[], Criterion]] = [
        lambda: InvalidValue(),
        lambda: NumberLimit(4),
        lambda: NumberSinceBest(2),
        lambda: Patience(2, min_delta=0.5),
        lambda: Threshold(4.5),
        lambda: TimeLimit(3, clock=Clock()),
    ]
    for make in makers:
        whole, first, second = make(), make(), make()
        answers = [whole.update(value) for value in VALUES]
        begun = [first.update(value) for value in VALUES[:3]]
        second.load_state_dict(first.state_dict())
        assert begun + [second.update(value) for value in VALUES[3:]] == answers
        second.reset()
        assert [second.update(value) for value in VALUES] == answers


def test_the_table_names_every_criterion() -> None:
    said = flowtrain.callbacks.stopping.__doc__ or ""
    assert [name for name in flowtrain.callbacks.stopping.__all__ if f"`{name}`  " not in said] == ["Criterion"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Patience, {"n": 0}, r"^Patience\(\): n is a whole number, at least 1, got 0\."),
        (Patience, {"n": True}, r"^Patience\(\): n is a whole number, at least 1, got True\."),
        (Patience, {"min_delta": -1}, r"^Patience\(min_delta=-1\): min_delta is a number, at least 0, such as 0\."),
        (Patience, {"min_delta": NAN}, r"^Patience\(min_delta=nan\)"),
        (NumberSinceBest, {"n": 1.5}, r"^NumberSinceBest\(\): n is .* got 1\.5\."),
        (NumberLimit, {"n": -1}, r"^NumberLimit\(\): n is .* got -1\."),
        (Threshold, {"value": "low"}, r"^Threshold\(value='low'\): value is a number, such as 0\.1\."),
        (Threshold, {"value": NAN}, r"^Threshold\(value=nan\)"),
        (TimeLimit, {"limit": 0}, r"^TimeLimit\(limit=0\): limit is a number above zero, such as 3600, in seconds\."),
        (TimeLimit, {"limit": timedelta(0)}, r"^TimeLimit\(limit=0\.0\)"),
        (TimeLimit, {"limit": "1h"}, r"^TimeLimit\(limit='1h'\)"),
    ],
)
def test_mistakes(make: Callable[..., Criterion], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**arguments)
