"""The charts of a report: how long series are thinned, and how many charts and columns a page has."""

from __future__ import annotations

import math
import random

import pytest

from flowtrain.diagnostics.report.charts import COLOURS, Charts, Column, columns_of
from flowtrain.diagnostics.report.findings import Points
from flowtrain.errors import UsageError


def points(values: list[float], steps: list[int] | None = None) -> Points:
    return Points(steps or [*range(1, len(values) + 1)], values)


def test_few_values_stay_as_they_are() -> None:
    assert columns_of(points([2.0, 1.0]), 2) == [Column(1, 1, 2.0, 2.0, 2.0), Column(2, 2, 1.0, 1.0, 1.0)]


def test_a_column_has_the_smallest_the_mean_and_the_largest_value() -> None:
    assert columns_of(points([1.0, 3.0, 8.0, 5.0, 5.0, 6.0]), 2) == [
        Column(1, 3, 1.0, 4.0, 8.0),
        Column(4, 6, 5.0, 16 / 3, 6.0),
    ]


def test_columns_have_equal_width_in_steps_and_empty_ones_are_left_out() -> None:
    found = columns_of(points([1.0, 2.0, 3.0, 4.0], [1, 2, 99, 100]), 3)
    assert [(column.step, column.last, column.mean) for column in found] == [(1, 2, 1.5), (99, 100, 3.5)]


@pytest.mark.parametrize("seed", range(20))
def test_no_spike_is_lost(seed: int) -> None:
    drawn = random.Random(seed)
    values = [drawn.gauss(0, 1) for _ in range(drawn.randrange(1, 3000))]
    most = drawn.randrange(1, 700)
    found = columns_of(points(values), most)
    assert len(found) <= max(most, 1)
    assert (min(column.low for column in found), max(column.high for column in found)) == (min(values), max(values))
    assert all(column.low <= column.mean <= column.high for column in found)


def test_values_that_are_not_finite_are_left_out_and_make_a_gap_where_there_are_no_others() -> None:
    few = columns_of(points([math.nan, math.inf, 1.0]), 3)
    assert [math.isnan(column.mean) for column in few] == [True, True, False]
    many = columns_of(points([math.nan, 1.0, math.inf, math.nan]), 2)
    assert many[0] == Column(1, 2, 1.0, 1.0, 1.0)
    assert math.isnan(many[1].mean)


def test_series_share_the_columns_of_a_page() -> None:
    assert [Charts(count).columns for count in (0, 1, 40, 100, 10_000)] == [600, 600, 600, 240, 60]


def test_a_page_without_charts_has_no_script() -> None:
    assert Charts(0).parts() == ("", {})


def test_each_chart_has_an_element_and_the_script_needs_no_network() -> None:
    charts = Charts(1)
    keys = [charts.add("Loss", "batch", {"TrainingPhase": points([1.0])}, {"TrainingPhase": COLOURS[0]})
            for _ in range(2)]  # fmt: skip
    script, elements = charts.parts()
    assert list(elements) == keys == ["chart-0", "chart-1"]
    assert "src=" not in script[: script.index(">") + 1]
    assert len(script) < 1.5 * 2**20


def test_a_missing_bokeh_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from flowtrain.diagnostics.report.charts import need_bokeh

    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    with pytest.raises(UsageError) as failure:
        need_bokeh()
    assert str(failure.value) == (
        "A report needs bokeh, which cannot be imported (import of bokeh.plotting halted; None in sys.modules). "
        "Install it: pip install 'flowtrain[report]'"
    )
