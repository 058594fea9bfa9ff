"""Criteria that are combined, warmed up or saved, and a criterion that a user writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import or_
from typing import Any, ClassVar

import pytest

from flowtrain import UsageError
from flowtrain.callbacks.stopping import PQ, UP, InvalidValue, NumberLimit, NumberSinceBest, Threshold
from flowtrain.callbacks.stopping.criterion import Criterion, Disjunction, Never, Warmup
from flowtrain.errors import CheckpointError


class Flat(Criterion):
    """Stops when a value equals the one before."""

    initial: ClassVar[Mapping[str, Any]] = {"seen": []}
    seen: list[float]

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        again = loss in self.seen
        self.seen.append(loss)
        return f"{self.shown(loss)} again" if again else None

    def __repr__(self) -> str:
        return "Flat()"


def test_never() -> None:
    criterion = Never()
    assert [criterion.update(value) for value in (1.0, float("nan"), 2.0, 3.0)] == [None] * 4


def test_a_criterion_of_ones_own() -> None:
    criterion = Flat()
    criterion.begin("max")
    assert [criterion.update(value) for value in (0.5, 0.25, 0.5)] == [None, None, "Flat(): 0.5 again"]
    other = Flat()
    other.load_state_dict(criterion.state_dict())
    assert other.update(-0.25) is not None  # `judge` saw the negated values
    assert len(criterion.seen) == 3, "the saved state is a copy"
    criterion.reset()
    assert (criterion.seen, Flat().seen) == ([], [])


def test_a_criterion_without_judge_says_so() -> None:
    class Empty(Criterion):
        """A criterion without `judge`."""

    with pytest.raises(NotImplementedError, match=r"Empty does not define judge\(loss, training\)\. Define it: it"):
        Empty().update(1.0)


def test_a_disjunction_stops_with_any_and_feeds_all() -> None:
    """In the fifth value both criteria hold: 3 values (2, 2, 2) since the best one (1), and a value above 2.5."""
    criterion = UP(1) | Disjunction(NumberSinceBest(3), NumberLimit(5))
    values = (3.0, 1.0, 1.0, 1.0, 1.0)
    assert [criterion.update(value) for value in values[:4]] == [None] * 4
    assert criterion.update(1.0) == (
        "NumberSinceBest(3): no improvement on 1 for 3 epochs; NumberLimit(5): 5 values were given"
    )
    assert criterion.update(2.0) == (
        "UP(1): the value became worse 1 time in a row, from 1 to 2; "
        "NumberSinceBest(3): no improvement on 1 for 4 epochs; NumberLimit(5): 6 values were given"
    )


def test_begin_and_reset_reach_what_is_inside() -> None:
    criterion = Disjunction(Warmup(Threshold(0.75), 1))
    criterion.begin("max")
    assert criterion.update(0.9) is None
    assert criterion.update(0.5) is None
    assert criterion.update(0.8) == "Threshold(0.75): the value 0.8 is better than 0.75"
    criterion.reset()
    assert criterion.update(0.9) is None


@pytest.mark.parametrize(("n", "stop"), [(1, 4), (2, 5), (3, 6)])
def test_a_warm_up_hides_the_first_values(n: int, stop: int) -> None:
    """All values rise. UP(2) needs 3 values, the first and two worse ones: after a warm-up of n it stops at n + 3."""
    criterion = Warmup(UP(2), n)
    answers = [criterion.update(float(value)) for value in range(7)]
    assert next(number for number, why in enumerate(answers, start=1) if why) == stop


def test_what_is_inside_says_whether_training_is_needed() -> None:
    assert Disjunction(UP(3), Warmup(PQ())).needs_training
    assert not Disjunction(UP(3), InvalidValue()).needs_training


def test_the_state_of_several_goes_on() -> None:
    def make() -> Criterion:
        return Disjunction(Warmup(UP(2), 1), NumberLimit(9))

    first, second = make(), make()
    for value in (9.0, 1.0, 2.0):
        assert first.update(value) is None
    state = first.state_dict()
    assert state == {
        "criteria": [
            {
                "type": "Warmup",
                "state": {
                    "count": 3,
                    "criteria": [{"type": "UP", "state": {"before": 2.0, "since": 1.0, "count": 1}}],
                },
            },
            {"type": "NumberLimit", "state": {"count": 3}},
        ]
    }
    second.load_state_dict(state)
    assert second.update(3.0) == "UP(2): the value became worse 2 times in a row, from 1 to 3"


def test_the_state_of_other_criteria_is_refused() -> None:
    state = Disjunction(UP(2), Never()).state_dict()
    with pytest.raises(
        CheckpointError,
        match=r"^Disjunction\(UP\(2\)\) has the criteria UP, and got the state of UP, Never\. Go on with the criteria",
    ):
        Disjunction(UP(2)).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"^UP\(2\) remembers before, since, count, and got a state with count\."):
        UP(2).load_state_dict(NumberLimit(3).state_dict())


NO_CRITERION = r"^3 is no criterion\. flowtrain\.callbacks\.stopping has some, such as Patience\(5\) or GL\(2\)\.$"


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Disjunction, (), r"^Disjunction\(\) has no criterion\. Write Disjunction\(Patience\(5\)"),
        (Disjunction, (3,), NO_CRITERION),
        (Warmup, (UP,), r"^<class .*UP'> is no criterion.* Write UP\(\.\.\.\), an instance\."),
        (Warmup, (UP(2), 0), r"^Warmup\(\): n is a whole number, at least 1, got 0\."),
        (or_, (UP(2), 3), NO_CRITERION),
    ],
)
def test_mistakes(make: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(*arguments)
