"""Races between two ways: when a call is costly, the order of the rounds, and when they are decided."""

from __future__ import annotations

import pytest

from flowtrain import BatchEnd, TrainingPhase
from flowtrain_dask.deferred.race import CallTimes, Race

PLAN = (BatchEnd, TrainingPhase)


@pytest.mark.parametrize(
    ("seconds", "costly"),
    [
        ([0.003], False),  # it may have imported a module
        ([0.003, 0.003], True),
        ([0.003, 0.0], False),
        ([0.0, 0.003], False),  # one long call
        ([0.0, 0.003, 0.003], True),
        ([0.003, 0.0, 0.0, 0.0003], False),  # 0.1 ms on average without the first
    ],
)
def test_two_long_calls_are_costly_and_one_is_not(seconds: list[float], costly: bool) -> None:
    times = CallTimes(PLAN)
    for each in seconds:
        times.add(each)
    assert times.are_costly is costly
    assert times.shortest == min(seconds)
    assert times.cost == pytest.approx(sum(seconds[1:]) / max(1, len(seconds) - 1))
    times.begin()
    assert times == CallTimes(PLAN)


def rounds(race: Race, here: list[float], there: list[float]) -> str:
    """Run rounds with these seconds until the race is decided; return where they were, as letters."""
    places, left = "", {False: list(here), True: list(there)}
    while race.verdict is None:
        race.begin(0.0)
        places += "B" if race.deferred else "A"
        race.end(left[race.deferred].pop(0))
        assert race.began is None
    assert race.spent == pytest.approx(sum(race.here) + sum(race.there))
    return places


@pytest.mark.parametrize(
    ("least", "here", "there", "places", "verdict"),
    [
        (0.0, [0.020] * 2, [0.010] * 2, "ABBA", True),  # each round of one way is clearly longer
        (0.0, [0.010] * 2, [0.020] * 2, "ABBA", False),
        (0.0, [0.020, 0.010, *[0.020] * 3], [0.010] * 5, "ABBAABBAAB", True),  # one round is not: the medians decide
        (0.0, [0.010] * 5, [0.0096] * 5, "ABBAABBAAB", False),  # the difference is too small to move
        (0.016, [0.014], [0.010] * 2, "ABB", True),  # a round in place cannot be as short as those in the lanes
        (0.016, [0.017] * 2, [0.010, 0.011], "ABBA", True),  # this is not sure of the second one
    ],
)
def test_a_race_ends_as_soon_as_it_is_clear(
    least: float, here: list[float], there: list[float], places: str, verdict: bool
) -> None:
    race = Race(least=least)
    assert rounds(race, here, there) == places
    assert race.verdict is verdict
