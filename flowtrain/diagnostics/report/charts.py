"""The charts of a report, drawn by bokeh, whose script is in the page: it needs no network.

A series of many values is drawn in columns: the values whose steps fall into one column have a band from the smallest
to the largest of them, and the line is their mean. So a chart hides no spike, and its size is that of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowtrain.diagnostics.report.findings import Points
from flowtrain.errors import UsageError
from flowtrain.logging.extras import needed

__all__ = ["COLOURS", "Charts", "Column", "columns_of", "need_bokeh"]

COLOURS = ("#2f7de1", "#e2631e", "#178a57", "#a45bd6", "#d13b77", "#0e8a96")
"""The colours of phases, of which each has a contrast of 3 or more with white and with the dark background."""

_MOST_COLUMNS, _ALL_COLUMNS = 600, 24_000
"""The most columns of a series, and of all series of a page together."""

_FEW = 80
"""The most values of which each has a dot."""


@dataclass(frozen=True)
class Column:
    """The values of a series in one column of a chart.

    Attributes:
        step: The first step of the column.
        last: Its last step.
        low: The smallest value; NaN if no value is finite.
        mean: The mean.
        high: The largest value.
    """

    step: int
    last: int
    low: float
    mean: float
    high: float


def columns_of(points: Points, most: int) -> list[Column]:
    """Return the values of a series in at most so many columns of equal width; each value alone if there are few.

    Values that are NaN or infinite are left out; a column that has no others is a gap.
    """
    steps, values = points.steps, points.values
    if len(steps) <= most:
        return [Column(step, step, *(3 * (value if math.isfinite(value) else math.nan,)))
                for step, value in zip(steps, values, strict=True)]  # fmt: skip
    first, width = steps[0], (max(steps) - steps[0] + 1) / most
    places: dict[int, list[int]] = {}
    for place, step in enumerate(steps):
        places.setdefault(int((step - first) / width), []).append(place)
    found: list[Column] = []
    for inside in places.values():
        finite = [values[place] for place in inside if math.isfinite(values[place])] or [math.nan]
        mean = math.fsum(finite) / len(finite)
        found.append(Column(steps[inside[0]], steps[inside[-1]], min(finite), mean, max(finite)))
    return found


def need_bokeh() -> None:
    """Check that bokeh is installed.

    Raises:
        UsageError: It is not.
    """
    needed("bokeh.plotting", "A report", "report", UsageError)


class Charts:
    """The charts of one page.

    Args:
        count: The number of series that the page will draw, which share the columns.

    Attributes:
        columns: The most columns of each series.
        left: The names of the charts for which the page has no room.
    """

    def __init__(self, count: int) -> None:
        self.columns = max(60, min(_MOST_COLUMNS, _ALL_COLUMNS // max(count, 1)))
        self.left: list[str] = []
        self._figures: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._figures)

    def add(self, label: str, over: str, series: Mapping[str, Points], colours: Mapping[str, str]) -> str:
        """Draw series into one chart, and return the key of it.

        Args:
            label: The name of the values.
            over: The name of the steps.
            series: The series, by the name of its phase.
            colours: The colour of each phase.
        """
        from bokeh.models import NumeralTickFormatter, PrintfTickFormatter, Range1d
        from bokeh.plotting import figure

        plot: Any = figure(
            height=230,
            sizing_mode="stretch_width",
            tools="box_zoom,reset",
            active_drag=None,  # a finger on a chart scrolls the page
            toolbar_location="right",
            x_axis_label=over,
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
            min_border_left=58,
        )
        plot.toolbar.logo = None
        plot.toolbar.autohide = True
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.yaxis.formatter = PrintfTickFormatter(format="%.4g")
        plot.xaxis.ticker.mantissas = [1, 2, 5]
        plot.xaxis.ticker.min_interval = 1  # steps are whole numbers
        plot.xgrid.visible = False
        plot.xaxis.axis_label_text_font_style = "normal"
        for phase, points in series.items():
            columns = columns_of(points, self.columns)
            if len(columns) == 1:
                plot.x_range = Range1d(start=columns[0].step - 1, end=columns[0].step + 1)
            _draw(plot, columns, label, over, phase, colours[phase])
        key = f"chart-{len(self._figures)}"
        self._figures[key] = plot
        return key

    def parts(self) -> tuple[str, dict[str, str]]:
        """Return the scripts of all charts, bokeh's own among them, and the element of each chart by its key."""
        if not self._figures:
            return "", {}
        from bokeh.document import Document
        from bokeh.embed import components
        from bokeh.resources import Resources

        document = Document()
        with document.models.freeze():  # or it would look through all charts after each: 27 s for 40 of them
            for each in self._figures.values():
                document.add_root(each)
        script, elements = components(self._figures)
        library = "".join(f"<script>{each}</script>\n" for each in Resources("inline", components=["bokeh"]).js_raw)
        return library + script, dict(elements)


def _draw(plot: Any, columns: Sequence[Column], label: str, over: str, phase: str, colour: str) -> None:
    """Draw the columns of one series, and show their numbers where the pointer is."""
    from bokeh.models import ColumnDataSource, HoverTool

    means = _short([column.mean for column in columns])
    source = ColumnDataSource({"step": [column.step for column in columns], "mean": means})
    data: Any = source.data
    tooltips = [("", "$name"), (over, "@step{0,0}"), (label, "@mean{%.6g}")]
    if any(column.last > column.step for column in columns):
        data["last"] = [column.last for column in columns]
        data["low"], data["high"] = (_short([getattr(each, name) for each in columns]) for name in ("low", "high"))
        plot.varea("step", "low", "high", source=source, fill_color=colour, fill_alpha=0.22)
        tooltips[1] = f"{over}s", "@step{0,0} to @last{0,0}"
        tooltips += [("from, to", "@low{%.6g}, @high{%.6g}")]
    line = plot.line("step", "mean", source=source, line_color=colour, line_width=1.6, name=phase)
    if len(columns) <= _FEW:
        plot.scatter("step", "mean", source=source, color=colour, size=5)
    formatters: Any = {f"@{name}": "printf" for name in ("mean", "low", "high")}
    plot.add_tools(HoverTool(tooltips=tooltips, formatters=formatters, mode="vline", renderers=[line]))


def _short(values: Sequence[float]) -> Any:
    """Return values as an array of 32 bits, which a page holds in half the bytes; a chart shows fewer digits."""
    import numpy as np

    with np.errstate(over="ignore"):
        return np.asarray(values, dtype="float32")
