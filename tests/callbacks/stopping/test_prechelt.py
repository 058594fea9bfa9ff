"""Prechelt's criteria against values worked out by hand; the arithmetic stands beside each value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import UsageError
from flowtrain.callbacks.monitoring import Mode
from flowtrain.callbacks.stopping.criterion import Criterion
from flowtrain.callbacks.stopping.prechelt import GL, PQ, UP
from tests.support.criteria import stops_at

NAN, INF = math.nan, math.inf


# E:        4.0   3.2        3.0   3.3         3.6         3.9
# E_opt:    4.0   3.2        3.0   3.0         3.0         3.0
# GL:       0     0          0     0.3/3=10 %  0.6/3=20 %  0.9/3=30 %
ERRORS = [4.0, 3.2, 3.0, 3.3, 3.6, 3.9]


@pytest.mark.parametrize(("alpha", "stop"), [(9.9, 4), (10.1, 5), (19.9, 5), (20.1, 6), (29.9, 6), (30.1, None)])
def test_gl_exceeds_alpha(alpha: float, stop: int | None) -> None:
    assert stops_at(GL(alpha), ERRORS) == stop


@pytest.mark.parametrize(
    ("values", "mode", "alpha", "stop"),
    [
        # best 0.8; (0.8 - 0.7) / 0.8 = 12.5 %, (0.8 - 0.6) / 0.8 = 25 %
        ([0.5, 0.8, 0.7, 0.6], "max", 12.0, 3),
        ([0.5, 0.8, 0.7, 0.6], "max", 13.0, 4),
        ([0.5, 0.8, 0.7, 0.6], "max", 26.0, None),
        # a log-likelihood: best -4; (-3 + 4) / |-4| = 25 %
        ([-2.0, -4.0, -3.0], "min", 24.0, 3),
        ([-2.0, -4.0, -3.0], "min", 26.0, None),
        # GL equal to alpha does not stop, only GL above alpha: (2.5 - 2) / 2 = 25 %
        ([2.0, 2.5], "min", 25.0, None),
        # the best value is almost zero, so any higher value is infinitely worse
        ([1.0, 0.0, 0.0, 1e-9], "min", 1e9, 4),
        # NaN never becomes the best value; it is infinitely worse than a best value, and ignored before there is one
        ([NAN, NAN, 2.0, 2.5], "min", 24.0, 4),
        ([NAN, 2.0, NAN, 2.5], "min", 1e9, 3),
        ([NAN, 2.0, NAN, 2.5], "max", 1e9, 3),
        ([NAN, NAN, NAN], "min", 1.0, None),
        ([2.0, INF], "min", 1e9, 2),
        ([INF, 2.0, 2.0], "min", 1.0, None),
    ],
)
def test_gl_of_other_values(values: list[float], mode: Mode, alpha: float, stop: int | None) -> None:
    assert stops_at(GL(alpha), values, mode) == stop


def test_pq_divides_gl_by_the_progress_of_training() -> None:
    """With k = 3::

    t    E     GL                    training   last 3       mean  min  P = 1000 (mean / min - 1)  PQ = GL / P
    1    2.0   0                     6                                                             (too few)
    2    1.0   0                     4                                                             (too few)
    3    1.2   100 * 0.2 / 1 = 20    2          6, 4, 2      4     2    1000 (4 / 2 - 1) = 1000    0.02
    4    1.5   100 * 0.5 / 1 = 50    3          4, 2, 3      3     2    1000 (3 / 2 - 1) = 500     0.1
    5    1.5   50                    2.5        2, 3, 2.5    2.5   2    1000 (2.5 / 2 - 1) = 250   0.2
    """
    rows = [(2.0, 6.0), (1.0, 4.0), (1.2, 2.0), (1.5, 3.0), (1.5, 2.5)]

    def stop(alpha: float) -> int | None:
        criterion = PQ(alpha, k=3)
        answers = [criterion.update(value, [training]) for value, training in rows]
        return next((number for number, why in enumerate(answers, start=1) if why), None)

    assert [stop(alpha) for alpha in (0.019, 0.021, 0.099, 0.101, 0.199, 0.201)] == [3, 4, 4, 5, 5, None]
    criterion = PQ(0.15, k=3)
    assert [criterion.update(value, [training]) for value, training in rows][-1] == (
        "PQ(0.15, k=3): the value 1.5 is 50 percent worse than the best, 1, and training makes 250 per mille of "
        "progress in 3 values, so PQ is 0.2"
    )


def test_pq_takes_several_values_of_training_at_once_and_keeps_the_last_k() -> None:
    """Only the last 3 of 9, 4, 2, 3 count: P = 500, as above; GL = 100 * (1.5 - 1) / 1 = 50; PQ = 0.1."""
    criterion = PQ(0.099, k=3)
    assert criterion.update(1.0) is None
    assert criterion.update(1.5, [9.0, 4.0, 2.0, 3.0]) is not None
    assert criterion.training == [4.0, 2.0, 3.0]
    criterion = PQ(0.101, k=3)
    assert criterion.update(1.0) is None
    assert criterion.update(1.5, [9.0, 4.0, 2.0, 3.0]) is None


def test_pq_stops_when_training_makes_no_progress() -> None:
    criterion = PQ(10, k=2)
    assert criterion.update(1.0, [3.0]) is None
    assert criterion.update(0.5, [3.0]) == "PQ(10, k=2): training makes no progress: its last 2 values are 3"
    # P = 1000 (1.00005 / 1 - 1) = 0.05, above the default tolerance and below a tolerance of 0.1
    assert PQ(10, k=2).update(0.5, [1.0001, 1.0]) is None
    assert PQ(10, k=2, tol=0.1).update(0.5, [1.0001, 1.0]) is not None


def test_pq_where_large_values_are_good() -> None:
    """Best 0.8, now 0.6: GL = 25. Training 0.5, 1.0: mean 0.75, best 1, P = 1000 (1 - 0.75) / 1 = 250. PQ = 0.1."""
    for alpha, stops in ((0.099, True), (0.101, False)):
        criterion = PQ(alpha, k=2)
        criterion.begin("max")
        assert criterion.update(0.8, [0.5]) is None
        assert (criterion.update(0.6, [1.0]) is not None) is stops


def test_pq_leaves_nan_to_others() -> None:
    assert PQ(1, k=2).update(1.0, [NAN, 1.0]) is None
    assert PQ(1, k=2).update(1.0, [1.0, NAN]) is None
    assert PQ(1, k=2).update(NAN, [1.0, 2.0]) is None, "NaN is ignored before the first number"


def test_pq_of_nan() -> None:
    criterion = PQ(1, k=2)
    assert criterion.update(1.0, [3.0]) is None
    assert str(criterion.update(NAN, [2.0])).startswith(
        "PQ(1, k=2): the value nan is inf percent worse than the best, 1"
    )
    stopped = PQ(1, k=2).update(1.0, [NAN, NAN])
    assert stopped == "PQ(1, k=2): training makes no progress: its last 2 values are nan"


# changes between values: - + - + + = + + +
RISES = [5.0, 6.0, 4.0, 4.5, 4.6, 4.6, 4.7, 4.8, 4.9]


@pytest.mark.parametrize(("s", "stop"), [(1, 2), (2, 5), (3, 9), (4, None)])
def test_up_counts_rises_in_a_row(s: int, stop: int | None) -> None:
    assert stops_at(UP(s), RISES) == stop
    assert stops_at(UP(s), [-value for value in RISES], "max") == stop


def test_up_takes_nan_for_worse() -> None:
    assert stops_at(UP(2), [1.0, 2.0, NAN, 3.0]) == 3
    assert stops_at(UP(3), [1.0, 2.0, NAN, 3.0, 4.0, NAN, NAN]) == 7
    assert stops_at(UP(2), [NAN, 1.0, NAN, 1.0, NAN, 1.0]) is None


def test_up_says_from_where_to_where_in_the_metrics_own_sign() -> None:
    criterion = UP(2)
    criterion.begin("max")
    answers = [criterion.update(value) for value in (0.5, 0.75, 0.625, 0.25)]
    assert answers == [None, None, None, "UP(2): the value became worse 2 times in a row, from 0.75 to 0.25"]


@given(st.lists(st.floats(0.125, 8.0), max_size=12), st.integers(1, 4))
def test_up_stops_where_the_definition_says(values: list[float], s: int) -> None:
    rising = [all(values[t - i] > values[t - i - 1] for i in range(s)) if t >= s else False for t in range(len(values))]
    assert stops_at(UP(s), values) == (rising.index(True) + 1 if True in rising else None)


@given(st.lists(st.tuples(st.floats(0.125, 8.0), st.floats(0.125, 8.0)), max_size=12), st.integers(0, 12))
def test_a_state_that_is_taken_and_given_back_goes_on_as_if_nothing_was(
    rows: list[tuple[float, float]], cut: int
) -> None:
    for make in (lambda: GL(5), lambda: PQ(0.1, k=3), lambda: UP(2)):
        whole, first, second = make(), make(), make()
        answers = [whole.update(value, [training]) for value, training in rows]
        begun = [first.update(value, [training]) for value, training in rows[:cut]]
        second.load_state_dict(first.state_dict())
        assert answers == begun + [second.update(value, [training]) for value, training in rows[cut:]]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (GL, {"alpha": 0}, r"^GL\(alpha=0\): alpha is a number above zero, such as 2\.0\."),
        (GL, {"alpha": NAN}, r"^GL\(alpha=nan\)"),
        (PQ, {"alpha": -1}, r"^PQ\(alpha=-1\): alpha is a number above zero, such as 0\.75\."),
        (PQ, {"k": 1}, r"^PQ\(\): k is a whole number, at least 2, got 1\."),
        (PQ, {"k": 2.5}, r"^PQ\(\): k is .* got 2\.5\."),
        (PQ, {"tol": 0}, r"^PQ\(tol=0\): tol is a number above zero, such as 2e-16\."),
        (UP, {"s": 0}, r"^UP\(\): s is a whole number, at least 1, got 0\."),
        (UP, {"s": "3"}, r"^UP\(\): s is .* got '3'\."),
    ],
)
def test_mistakes(make: Callable[..., Criterion], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**arguments)
