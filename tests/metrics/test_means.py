"""The weighted means of an epoch: exact, however often the values so far are added up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain.metrics.means import EpochMeans, mean
from flowtrain.state.series import SeriesMap

NUMBERS = st.floats(-1e12, 1e12)


@given(st.lists(st.tuples(NUMBERS, st.sampled_from([0, 1, 3, 0.1]), st.booleans(), st.booleans())))
def test_adding_up_changes_no_bit_of_a_mean(batches: list[tuple[float, float, bool, bool]]) -> None:
    """The series keeps three values or more, and a checkpoint is loaded in between: the mean is that of one sum."""
    means, steps = EpochMeans("TrainingPhase"), SeriesMap("cbstate.metrics_step")
    for step, (value, weight, adds, loads) in enumerate(batches):
        steps.push("Loss", value, step)
        means.weights["Loss"].append(weight)
        if adds:
            means.add_up(steps)
            steps["Loss"].shorten(3)
            assert means.weights == {"Loss": []}
        if loads:
            means = EpochMeans.loaded(means.state_dict())
            assert means.phase == "TrainingPhase"
    assert means.begun is bool(batches)
    if not batches:
        assert means.sums(steps) == {}
        return
    found = means.sums(steps)["Loss"]
    counted = [(value * weight, weight) for value, weight, _, _ in batches if weight]
    expected = mean([product for product, _ in counted], [weight for _, weight in counted])
    assert mean(*found) == expected or (math.isnan(expected) and math.isnan(mean(*found)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, math.inf, 2.0], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([1e308, 1e308], math.inf),
        ([math.nan, 1.0], math.nan),
    ],
)
def test_special_values_stay_what_they_are(values: list[float], expected: float) -> None:
    means, steps = EpochMeans(), SeriesMap("cbstate.metrics_step")
    for value in values:
        steps.push("Loss", value, 1)
        means.weights["Loss"].append(1)
        means.add_up(steps)
    assert repr(mean(*means.sums(steps)["Loss"])) == repr(expected)


def test_the_sums_of_any_number_of_batches_are_a_few_numbers() -> None:
    means, steps = EpochMeans(), SeriesMap("cbstate.metrics_step")
    for step in range(10_000):
        steps.push("Loss", math.sin(step), step)
        means.weights["Loss"].append(8)
        if step % 100 == 0:
            means.add_up(steps)
    means.add_up(steps)
    state = means.state_dict()
    assert state["weights"] == {"Loss": []}
    assert max(map(len, state["sums"]["Loss"])) <= 4


def test_an_early_checkpoint_has_the_weights_alone() -> None:
    means = EpochMeans.loaded({"sizes": {"Loss": [8, 3], "Accuracy": [8, 3]}, "held": []})
    assert (means.phase, means.weights) == ("", {"Loss": [8, 3], "Accuracy": [8, 3]})
