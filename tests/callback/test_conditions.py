"""Conditions: which arguments they refuse and how they count; the tests of throttle and of plans cover the rest."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain import BatchEnd, TrainingPhase, UsageError, ValidationPhase
from flowtrain.callback.conditions import Every


def test_every_counts_by_phase_and_goes_on_from_its_state() -> None:
    every = Every(BatchEnd, 2)
    asked = [every.ready(TrainingPhase()), every.ready(ValidationPhase()), every.ready(TrainingPhase())]
    assert asked == [False, False, True]
    again = Every(BatchEnd, 2)
    again.load_state_dict(every.state_dict())
    assert (again.ready(ValidationPhase()), again.ready(TrainingPhase())) == (True, False)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_whole_number(every: Any) -> None:
    with pytest.raises(UsageError, match=r"^every is a whole number, at least 1, got "):
        Every(BatchEnd, every)
