"""The entries of ``cbstate`` that the learner makes."""

from __future__ import annotations

import pytest

from flowtrain.callback.phases import Phase
from flowtrain.state.by_phase import CONTAINERS, Counts, PhaseMap
from flowtrain.state.series import Series, SeriesMap


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_containers_that_the_learner_makes(name: str) -> None:
    path = f"cbstate.{name}"
    made = CONTAINERS[name](path)
    assert path in repr(made)
    if isinstance(made, PhaseMap):
        inner = made[Phase]
        assert isinstance(inner, (Counts, Series, SeriesMap))
        if not isinstance(inner, Counts):
            assert path in repr(inner)  # the phase is left out of a path
    else:
        assert isinstance(made, SeriesMap)
