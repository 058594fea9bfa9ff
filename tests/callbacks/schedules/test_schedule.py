"""Which objects are accepted as schedules, and how a schedule is stretched over a number of updates."""

from __future__ import annotations

import pytest

from flowtrain.callbacks.schedules.schedule import Schedule, as_schedule
from flowtrain.errors import UsageError
from tests.support.untyped import untyped


def test_numbers_functions_and_schedules() -> None:
    def halves(n: int) -> float:
        return 1 / n

    own = Schedule("own", lambda n, _: n)
    assert as_schedule(own) is own
    assert [as_schedule(halves)(n) for n in (1, 2, 4)] == [1.0, 0.5, 0.25]
    assert repr(as_schedule(halves)).endswith("halves")
    assert (as_schedule(3)(9), repr(as_schedule(0.5))) == (3, "0.5")


def test_over_gives_a_length_to_what_has_none() -> None:
    line = Schedule("line", lambda n, total: n / total, stretched=True)
    assert line.over(4)(2) == 0.5
    assert line.value(2, 8) == 0.25
    assert line.over(0)(1) == 1.0  # a fit without updates
    fixed = Schedule("fixed", lambda n, total: n / total, 10, stretched=True)
    assert fixed.over(4) is fixed
    assert fixed.value(2, 8) == 0.2
    plain = Schedule("plain", lambda n, total: n)
    assert not plain.is_open
    assert plain.over(4) is plain


@pytest.mark.parametrize("given", ["0.1", None, True, float("nan")])
def test_what_is_no_schedule(given: object) -> None:
    with pytest.raises(UsageError):
        as_schedule(untyped(given))
