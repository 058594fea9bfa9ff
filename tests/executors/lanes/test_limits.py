"""Limits of what waits in a lane, and who may not lose events (rule 24)."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain import Callback
from flowtrain.errors import ExecutorError
from flowtrain_dask.lanes.limits import Limits, check_droppable


class Stub(Callback):
    """Does nothing."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pending": 0}, r"Limits\(\): pending is a whole number, at least 1, got 0\."),
        ({"bytes": 1.5}, r"Limits\(\): bytes is a whole number, at least 1, got 1\.5\."),
        ({"when_full": "blok"}, r"Limits\(when_full='blok'\) is neither .* Did you mean 'block'\?"),
    ],
)
def test_limits_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        Limits(**values)


def test_who_may_not_lose_events_is_refused() -> None:
    """Rule 24: not with a durable callback, and not with a reader of series."""
    callback = Stub()
    drop = Limits(when_full="drop")
    check_droppable(callback, False, drop)
    check_droppable(callback, True, Limits())
    with pytest.raises(ExecutorError, match=r'Stub reads a series.* Write Limits\(when_full="block"\)'):
        check_droppable(callback, True, drop)
    callback.durable = True
    with pytest.raises(ExecutorError, match="Stub is durable, so no event of it may be dropped"):
        check_droppable(callback, False, drop)
