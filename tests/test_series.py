"""Series and series by name, each with its read-only twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain.errors import ProtectedException
from flowtrain.phases import AbstractValidationPhase
from flowtrain.readonly import readonly
from flowtrain.series import Series, SeriesMap


class OODPhase(AbstractValidationPhase):
    """A user's own phase."""


# --- one series


def test_a_series_gives_values_with_their_steps() -> None:
    series = Series("cbstate.smooth_loss")
    for step, value in enumerate("abc", start=1):
        series.push(value, step * 10)
    assert series.last() == (30, "c")
    assert list(series) == [(10, "a"), (20, "b"), (30, "c")]
    assert len(series) == 3
    assert series.since(1) == ["b", "c"]
    assert series.since(3) == []
    assert repr(series) == "<Series cbstate.smooth_loss: 3 values>"


def test_an_empty_series_has_no_last_value() -> None:
    with pytest.raises(LookupError) as caught:
        Series("cbstate.smooth_loss").last()
    assert str(caught.value) == "cbstate.smooth_loss is empty: nothing has been recorded yet. Test len() first."


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(0.5),
        torch.nn.Parameter(torch.tensor(0.5)),
        torch.tensor([[0.5]]) * torch.nn.Parameter(torch.ones(1)),
    ],
    ids=["tensor", "parameter", "result"],
)
def test_a_tensor_is_recorded_as_the_number_it_is_now(value: torch.Tensor) -> None:
    series = Series("s")
    series.push(value, step=1)
    value.detach().add_(1)
    assert series.last() == (1, 0.5)
    assert type(series.last()[1]) is float


def test_a_larger_tensor_is_copied() -> None:
    value = torch.nn.Parameter(torch.zeros(3))
    series = Series("s")
    series.push(value, step=1)
    value.detach().add_(1)
    found = series.last()[1]
    assert found.tolist() == [0, 0, 0]
    assert not found.requires_grad
    assert next(iter(series))[1] is found


def test_what_is_pushed_while_iterating_comes_with_the_next_iteration() -> None:
    series = Series("s")
    series.push(1, 1)
    seen = []
    for step, value in series:
        series.push(value + 1, step + 1)
        seen.append(value)
    assert seen == [1]
    assert len(series) == 2


@settings(deadline=None)
@given(st.lists(st.integers()), st.data())
def test_a_snapshot_comes_back(values: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    series = Series("s")
    for value in values[:cut]:
        series.push(value, value)
    snapshot = series.snapshot()
    for value in values[cut:]:
        series.push(value, value)
    series.restore(snapshot)
    assert list(series) == [(value, value) for value in values[:cut]]


def test_the_twin_of_a_series_is_live_and_refuses_to_push() -> None:
    series = Series("cbstate.smooth_loss")
    twin = readonly(series, "ignored")
    series.push(1.0, 1)
    assert list(twin) == [(1, 1.0)]
    assert twin.last() == (1, 1.0)
    assert isinstance(twin, Series)
    refusals: list[Callable[[], Any]] = [lambda: twin.push(2.0, 2), lambda: twin.restore(0)]
    for refused in refusals:
        with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.smooth_loss disallowed"):
            refused()
    assert len(series) == 1


# --- by name


def test_series_by_name() -> None:
    metrics = SeriesMap("cbstate.metrics_step")
    metrics.push("Loss", 0.5, 1)
    metrics.push("Loss", 0.25, 2)
    assert metrics["Loss"].last() == (2, 0.25)
    assert metrics.series("Accuracy") is metrics["Accuracy"]
    assert dict(metrics) == {"Loss": metrics["Loss"], "Accuracy": metrics["Accuracy"]}
    assert repr(metrics) == "<SeriesMap cbstate.metrics_step: Loss, Accuracy>"
    with pytest.raises(KeyError):
        metrics["loss"]


def test_the_twin_of_series_by_name_is_live_and_protected() -> None:
    metrics = SeriesMap("cbstate.metrics_step")
    twin = readonly(metrics, "ignored")
    metrics.push("Loss", 0.5, 1)
    assert list(twin) == ["Loss"]
    assert twin["Loss"].last() == (1, 0.5)
    refusals: dict[str, list[Callable[[], Any]]] = {
        "cbstate.metrics_step.Loss": [
            lambda: twin.push("Loss", 1.0, 2),
            lambda: twin["Loss"].push(1.0, 2),
            lambda: next(iter(twin.values())).push(1.0, 2),
            lambda: twin.get("Loss").push(1.0, 2),
            lambda: twin.series("Loss").push(1.0, 2),
        ],
        "cbstate.metrics_step": [lambda: twin.restore({})],
    }
    for path, statements in refusals.items():
        for refused in statements:
            with pytest.raises(ProtectedException) as caught:
                refused()
            assert caught.value.path == path
    with pytest.raises(KeyError):
        twin.series("new")
    assert list(metrics) == ["Loss"]
    assert len(metrics["Loss"]) == 1


def test_a_name_that_is_not_there_is_named() -> None:
    series = SeriesMap("cbstate.metrics_epoch")
    series.push("Loss", 1.0, 1)
    for each in (series, readonly(series, "cbstate.metrics_epoch")):
        with pytest.raises(KeyError, match=r"cbstate\.metrics_epoch has no series 'Los'; it has: Loss\. Did you mean"):
            _ = each["Los"]
