"""Plain values: numbers and settings in a form that every sink can keep, and the check of backends."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, Histogram, Image, JsonlBackend, Value
from flowtrain.logging.values import checked_backends, flat, loggable, newest, number, real, refused, settings
from flowtrain.state.series import SeriesMap


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, 1),
        (3, 3),
        (Fraction(1, 2), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor([[2.0]]), 2.0),
        (torch.tensor(True), 1),
        (math.inf, math.inf),
        (2**64, 2**64),
        pytest.param(10**400, 10**400, id="long"),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (np.bool_(1), 1),
        (np.array(1.5), 1.5),
    ],
)
def test_numbers(value: Any, wanted: float) -> None:
    found = number(value)
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2), r"holds one number, and got a Tensor of shape \(2,\)\. Log Histogram"),
        (np.zeros((0,)), r"holds one number, and got a ndarray of shape \(0,\)"),
        ("0.5", r"Value\('0\.5'\) is no real number\. Log a text as Text"),
        (1j, r"Value\(1j\) is no real number"),
        (None, r"Value\(None\) is no real number"),
        (Fraction(10**400, 3), r"^Value\(\.\.\.\) got a Fraction that is larger than any float"),
        (torch.empty((), device="meta"), r"got a tensor on the device 'meta', which has no value\. Give it one first"),
    ],
)
def test_no_numbers(value: Any, text: str) -> None:
    with pytest.raises(LoggingError, match=text):
        number(value)


def test_a_number_for_a_backend_that_takes_only_floats() -> None:
    assert [real(value) for value in (3, torch.tensor(0.5), True)] == [3.0, 0.5, 1.0]
    with pytest.raises(
        LoggingError, match=r"^Value\(\.\.\.\) got a int that is larger than any float, .* its logarithm"
    ):
        real(10**400)


def test_settings_become_plain() -> None:
    given = {"path": PurePosixPath("a/b"), "sizes": (1, 2), "names": {"b", "a"}, "deep": {"rate": torch.tensor(0.5)}}
    assert settings(given) == {"path": "a/b", "sizes": [1, 2], "names": ["a", "b"], "deep": {"rate": 0.5}}
    assert settings({"a\udc80": ["ü\udc80", PurePosixPath("b\udc80")]}) == {"a?": ["ü?", "b?"]}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([1], r"Settings\(\.\.\.\) takes a mapping from names to values, and got \[1\]\. Write \{'lr': 0\.1\}"),
        ({1: 2}, r"Settings\(\.\.\.\) has the name 1; names are texts"),
        ({"a": {"": 2}}, r"Settings\(\.\.\.\)\['a'\] has the name ''; names are texts"),
        (
            {"a": [0, {"b": print}]},
            r"Settings\(\.\.\.\)\['a'\]\[1\]\['b'\] is <built-in function print>\. Settings are",
        ),
    ],
)
def test_what_is_no_setting_is_named_with_its_place(given: Any, text: str) -> None:
    with pytest.raises(LoggingError, match=text):
        settings(given)


def test_settings_that_hold_themselves_are_refused() -> None:
    lists: dict[str, Any] = {"a": [1]}
    lists["a"].append(lists["a"])
    with pytest.raises(
        LoggingError, match=r"^Settings\(\.\.\.\)\['a'\]\[1\] holds itself: \[1, \[\.\.\.\]\]\. Leave it out"
    ):
        settings(lists)
    mappings: dict[str, Any] = {"a": {}}
    mappings["a"]["b"] = mappings
    with pytest.raises(LoggingError, match=r"^Settings\(\.\.\.\)\['a'\]\['b'\] holds itself: "):
        settings(mappings)


NAMES = st.text("abc", min_size=1, max_size=3)


def dicts(inner: st.SearchStrategy[Any], least: int = 1) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(NAMES, inner, min_size=least, max_size=4)


@given(dicts(st.recursive(st.integers(), dicts, max_leaves=8), 0))
def test_flat_names_lead_to_the_values(nested: dict[str, Any]) -> None:
    for path, value in flat(nested).items():
        at: Any = nested
        for name in path.split("."):
            at = at[name]
        assert at == value
    assert all(not isinstance(value, dict) for value in flat(nested).values())


def test_a_flat_name_that_is_there_already_hides_no_value() -> None:
    nested = {"a": {"b": 1, "b_": 2}, "a.b": 3, "c": {}}
    assert flat(nested) == {"a.b": 1, "a.b_": 2, "a.b__": 3, "c": {}}


def test_backends_are_checked_for_what_is_logged() -> None:
    table, lines = CsvBackend("table"), JsonlBackend("log")
    assert checked_backends("LogMetrics", [table, lines], Value) == (table, lines)
    with pytest.raises(
        LoggingError, match=r"^Mine logs Image, and CsvBackend\('.*table'\) takes Value\. Give Mine another"
    ):
        checked_backends("Mine", [lines, table], Image)
    assert "takes Value, and got a Image." in str(refused(table, Image(torch.ones(2, 2))))


# --- the new values of series, and the names under which they are logged


STEP, EPOCH = ("Step", "TrainingPhase"), ("Epoch", "TrainingPhase")


def test_backends_in_a_list_are_to_be_passed_one_by_one() -> None:
    with pytest.raises(
        LoggingError, match=r"which is no LoggerBackend\. Pass the backends one by one: LogMetrics\(\*ba"
    ):
        checked_backends("LogMetrics", [[JsonlBackend("log")]], Value)


def test_only_series_that_have_grown_and_only_their_newest_entry() -> None:
    series, seen = SeriesMap("cbstate.metrics_step"), dict[str, int]()
    series.push("Loss", 0.5, 1)
    series.push("Loss", 0.25, 2)
    series.push("Accuracy", 1.0, 2)
    series.series("Empty")
    assert list(newest(series, STEP, seen)) == [("Loss", 2, 0.25), ("Accuracy", 2, 1.0)]
    assert list(newest(series, STEP, seen)) == []
    series.push("Accuracy", 0.5, 3)
    assert list(newest(series, STEP, seen)) == [("Accuracy", 3, 0.5)]
    assert [name for name, *_ in newest(series, EPOCH, seen)] == ["Loss", "Accuracy"]  # each group has names of its own
    assert seen == {"Step/TrainingPhase/Loss": 2, "Step/TrainingPhase/Accuracy": 2,
                    "Epoch/TrainingPhase/Loss": 2, "Epoch/TrainingPhase/Accuracy": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "kind"), [(0.5, Value), (torch.tensor(1.0), Value), (torch.ones(1, 1), Value), (torch.ones(2), Histogram)]
)
def test_a_tensor_of_several_elements_is_a_distribution(value: Any, kind: type) -> None:
    assert type(loggable(value)) is kind
