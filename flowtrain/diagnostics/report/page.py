"""The page: one HTML file with everything in it, for a browser on a desk or a phone, in light and dark mode.

Names and texts of the run may hold any characters: each is escaped where it is put into the page.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import cycle
from pathlib import Path

from flowtrain.diagnostics.report.charts import COLOURS, Charts, need_bokeh
from flowtrain.diagnostics.report.findings import (
    Findings,
    Picture,
    Points,
    Spans,
    epochs,
    of_learner,
    parts_of_step,
    text_of,
)
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.graph.executor import Executor
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.reading import own_version

__all__ = ["MARK", "page", "write_learner", "write_page"]

MARK = '<meta name="generator" content="flowtrain report">'
"""Stands in every report, by which one is recognized before it is replaced."""

_MOST_CHARTS = 40
"""The most charts on a page."""

_MOST_ROWS = 200
"""The most lines in the table of epochs: the newest ones."""

_CSS = """
:root{color-scheme:light dark;--paper:#fff;--card:#f5f6f9;--ink:#1f2430;--dim:#5b6270;--rule:#dfe3ea;--note:#fff4e5;
--edge:#c2410c;--shade:#1f243038}
@media(prefers-color-scheme:dark){:root{--paper:#14171f;--card:#1c202b;--ink:#e6e8ee;--dim:#a3a9b7;--rule:#2f3545;
--note:#2d2317;--edge:#fb923c;--shade:#000c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:76rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem}footer{padding-bottom:3rem;color:var(--dim);font-size:.875rem}
h1{font-size:1.75rem;line-height:1.2;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.4rem 0}.dim{color:var(--dim)}.kind{color:var(--dim);font-size:.8rem;letter-spacing:.06em}
a{color:inherit}
.notes{background:var(--note);border-left:4px solid var(--edge);padding:.6rem 1rem;margin:1rem 0;border-radius:4px}
.notes ul{margin:0;padding-left:1.1rem;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem;margin:1.25rem 0;padding:0}
.tile{background:var(--card);border-radius:8px;padding:.7rem .9rem;margin:0}
.tile dt{color:var(--dim);font-size:.8rem;overflow-wrap:anywhere}
.tile dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums}
.tile small{display:block;font-size:.8rem;font-weight:400;color:var(--dim)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.25rem 1.5rem}
.charts+.charts{margin-top:1.25rem}
figure{margin:0;min-width:0}figcaption{font-size:.9rem;color:var(--dim);overflow-wrap:anywhere}
figcaption b{color:var(--ink);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.25rem 0 .75rem;padding:0;list-style:none;font-size:.9rem}
.legend i{display:inline-block;width:1.1rem;height:.28rem;border-radius:2px;margin-right:.45rem;vertical-align:middle}
.wide{--under:var(--paper);overflow-x:auto;max-width:100%;margin:.75rem 0 1.25rem;background:
linear-gradient(90deg,var(--under) 40%,transparent) 0 0/3rem 100% no-repeat local,
linear-gradient(270deg,var(--under) 40%,transparent) 100% 0/3rem 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) 0 0/.9rem 100% no-repeat scroll,
linear-gradient(270deg,var(--shade),transparent) 100% 0/.9rem 100% no-repeat scroll,var(--under)}
.wide:focus-visible{outline:2px solid var(--edge)}.card{--under:var(--card);border-radius:8px}
.tall{max-height:26rem;overflow-y:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--dim);padding-bottom:.3rem}
caption span{display:inline-block;position:sticky;left:0;max-width:calc(100vw - 2.5rem)}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600}thead th{position:sticky;top:0;background:var(--paper)}td.number,th.number{text-align:right}
td.text{white-space:normal;overflow-wrap:anywhere;min-width:12rem}
pre{font:.8rem/1.5 ui-monospace,Menlo,Consolas,monospace;padding:.75rem 1rem;margin:0;width:max-content;min-width:100%}
details{border-bottom:1px solid var(--rule)}summary{cursor:pointer;padding:.5rem 0;overflow-wrap:anywhere}
.wide img{display:block;max-width:none;height:auto}
.chart{--bk-major-label-text-color:var(--dim);--bk-axis-label-text-color:var(--dim);--bk-axis-line-color:var(--rule);
--bk-major-tick-line-color:var(--rule);--bk-minor-tick-line-color:transparent;--bk-grid-line-color:var(--rule);
min-height:230px}
@media print{.tall{max-height:none}}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{mark}<meta name="color-scheme" content="light dark"><title>{title}</title>
<link rel="icon" href="data:,"><style>{css}</style></head>
<body>
<header><div class="kind">flowtrain report</div><h1>{title}</h1>{head}</header>
<main>{body}</main>
<footer><p>Written by flowtrain {version} on {when} UTC.</p>{foot}</footer>
{scripts}
</body></html>
"""

# The charts ask for the colours when they are drawn, so another mode needs them drawn again.
_RELOAD = """<script>
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload())
</script>"""


def write_learner(state: LearnerState, executor: Executor, to: str | os.PathLike[str]) -> None:
    """Write the report of a learner to a file, as `write_page` does. Of several ranks the main one writes.

    Raises:
        UsageError: As for `write_page`.
    """
    if state.rank == 0:
        write_page([of_learner(state, executor)], to)


def write_page(runs: Sequence[Findings], to: str | os.PathLike[str]) -> None:
    """Write the report of some runs to a file. Missing folders are made.

    Raises:
        UsageError: `to` is no path, bokeh is not installed, or the file cannot be written.
    """
    if not is_a(to, (str, os.PathLike)) or to == "":
        raise UsageError(f"report({to!r}) takes the path of the file to write: write report('report.html').")
    need_bokeh()
    path, text = Path(to), page(runs)
    beside = path.with_name(f".{path.name}.tmp")  # a report that is open in a browser is replaced as a whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text, "utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        # A folder that cannot be made because a file has its path: the file is named.
        where = f": {error.filename}" if error.filename not in (None, str(path), str(beside)) else ""
        raise UsageError(
            f"The report cannot be written to {os.fspath(path)!r}: {error.strerror or error}{where}. Choose a path in "
            f"a folder that you may write to."
        ) from error


def page(runs: Sequence[Findings]) -> str:
    """Return the report of some runs as a page of HTML."""
    charts = Charts(sum(len(run.series) for run in runs))
    sections = [_run(run, charts, alone=len(runs) == 1, number=number) for number, run in enumerate(runs)]
    title = runs[0].title if len(runs) == 1 else f"{len(runs)} runs"
    links = "".join(f'<li><a href="#run-{number}">{escape(run.title)}</a></li>' for number, run in enumerate(runs))
    head = f"<p>The newest run comes first.</p><ul>{links}</ul>" if len(runs) > 1 else ""
    scripts, elements = charts.parts()
    body = "".join(sections)
    for key, element in elements.items():
        body = body.replace(_place(key), element)
    foot = ""
    if charts:
        left = ", ".join(map(escape, charts.left))
        left = left and f"<p>A page has at most {_MOST_CHARTS} charts. Left out: {left}.</p>"
        foot = (
            f"<p>A chart of more than {charts.columns} values shows them in {charts.columns} columns: the line is the "
            f"mean of a column, and the band reaches from its smallest to its largest value. Values that are NaN or "
            f"infinite are left out.</p>{left}<noscript><p>The charts need JavaScript.</p></noscript>"
        )
        scripts += _RELOAD
    return _PAGE.format(
        mark=MARK, title=escape(title), css=_CSS, head=head, body=body, version=escape(own_version()),
        when=f"{datetime.now(UTC):%Y-%m-%d %H:%M}", foot=foot, scripts=scripts,
    )  # fmt: skip


def _place(key: str) -> str:
    return f"<!--{key}-->"


def _run(run: Findings, charts: Charts, *, alone: bool, number: int) -> str:
    """Return the sections of one run."""
    parts = [f'<section id="run-{number}" aria-label="{escape(run.title)}">']
    if not alone:
        parts.append(f"<h1>{escape(run.title)}</h1>")
    if run.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(run.notes))
        parts.append(f'<div class="notes" role="note"><ul>{items}</ul></div>')
    parts += [_tiles(run), *_metrics(run, charts), *_epochs(run), *_settings(run, charts), *_times(run, charts)]
    parts += [*_graph(run), *_others(run, charts), *_origin(run), "</section>"]
    return "\n".join(parts)


# --- the parts of a run


def _tiles(run: Findings) -> str:
    """Return the numbers that a reader looks for first."""
    tiles: list[tuple[str, str, str]] = []
    for phase, (done, batches, updates) in run.counts.items():
        if batches:
            also = f"{batches:,} batches" + (f", {updates:,} updates" if updates else "")
            tiles.append((f"{phase}: epochs", f"{done:,}", also))
    times = [time for points in run.series.values() for time in points.times]
    if times:
        begun = f"from {datetime.fromtimestamp(min(times), UTC):%Y-%m-%d %H:%M} UTC"
        tiles.append(("First to last record", _lasted(max(times) - min(times)), begun))
    for (group, name), points in run.series.items():
        if group.startswith("Epoch/") and len(tiles) < 12:
            finite = [(value, step) for step, value in zip(points.steps, points.values, strict=True)
                      if math.isfinite(value)]  # fmt: skip
            if finite:
                (low, at), (high, top) = min(finite), max(finite, key=lambda each: each[0])
                range_ = f"lowest {text_of(_shorter(low))} in epoch {at}, highest {text_of(_shorter(high))} in {top}"
                tiles.append((f"{name}, {group[6:]}", text_of(_shorter(points.values[-1])), range_))
    inside = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>'
        for name, value, more in tiles
    )
    return f'<dl class="tiles">{inside}</dl>' if tiles else ""


def _metrics(run: Findings, charts: Charts) -> Iterator[str]:
    names = dict.fromkeys(name for group, name in run.series if group.startswith("Epoch/"))
    names |= dict.fromkeys(name for group, name in run.series if group.startswith("Step/") and not _is_time(name))
    if not names:
        return
    yield "<h2>Metrics</h2>"
    yield _legend(run)
    for name in names:
        yield _grid(_figure(run, charts, name, unit) for unit in ("Epoch", "Step"))


def _figure(run: Findings, charts: Charts, name: str, unit: str) -> str:
    """Return the chart of one name with a line for each phase; nothing if no phase has values in that unit of steps."""
    series = {group.partition("/")[2]: points for (group, each), points in run.series.items()
              if each == name and group.startswith(f"{unit}/")}  # fmt: skip
    return _chart(charts, name, {"Epoch": "epoch", "Step": "batch"}[unit], series, _colours(run)) if series else ""


def _chart(charts: Charts, name: str, over: str, series: Mapping[str, Points], colours: Mapping[str, str]) -> str:
    """Return a chart with its caption; nothing if the page has as many charts as it may have."""
    if len(charts) >= _MOST_CHARTS:
        charts.left.append(f"{name} by {over}")
        return ""
    lost = sum(not math.isfinite(value) for points in series.values() for value in points.values)
    note = f"; values that are NaN or infinite: {lost:,}" if lost else ""
    place = _place(charts.add(name, over, series, colours))
    unit = ", in seconds," if _is_time(name) else ""
    caption = f"<figcaption><b>{escape(name)}</b>{unit} by {over}{note}</figcaption>"
    return f'<figure>{caption}<div class="chart">{place}</div></figure>'


def _grid(figures: Iterable[str]) -> str:
    inside = "".join(figures)
    return f'<div class="charts">{inside}</div>' if inside else ""


def _legend(run: Findings) -> str:
    items = "".join(f'<li><i style="background:{colour}"></i>{escape(phase)}</li>'
                    for phase, colour in _colours(run).items())  # fmt: skip
    return f'<ul class="legend" aria-label="The colours of the phases">{items}</ul>'


def _colours(run: Findings) -> dict[str, str]:
    phases = dict.fromkeys(group.partition("/")[2] for group, _ in run.series if group.startswith(("Step/", "Epoch/")))
    return dict(zip(phases, cycle(COLOURS), strict=False))


def _epochs(run: Findings) -> Iterator[str]:
    rows = epochs(run)
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    times = [row.ended for row in rows if row.ended is not None]
    head = ["epoch", "phase", *names, *(["time since the first"] if times else [])]
    lines = [
        [
            str(row.number),
            row.phase,
            *(text_of(_shorter(row.values[name])) if name in row.values else "" for name in names),
            *([] if not times else [_lasted(row.ended - min(times)) if row.ended is not None else ""]),
        ]
        for row in rows[-_MOST_ROWS:]
    ]
    note = f"The newest {_MOST_ROWS} of {len(rows):,} lines" if len(rows) > _MOST_ROWS else f"{len(rows):,} lines"
    yield "<h2>Epochs</h2>"
    yield _table(head, lines, note, texts=(1,), tall=True)


def _settings(run: Findings, charts: Charts) -> Iterator[str]:
    names = [name for group, name in run.series if group == "HyperParams"]
    if not (run.settings or names or run.callbacks):
        return
    yield "<h2>Settings and hyperparameters</h2>"
    for heading, values in run.settings.items():
        yield _table(["name", "value"], [[name, value] for name, value in values.items()], heading, texts=(0, 1))
    if run.callbacks:
        yield f"<h3>Callbacks</h3><p>{escape(', '.join(run.callbacks))}</p>"
    if names:
        one = {"HyperParams": COLOURS[0]}
        yield "<h3>Scheduled</h3>"
        yield _grid(
            _chart(charts, name, "batch", {"HyperParams": run.series["HyperParams", name]}, one) for name in names
        )


def _times(run: Findings, charts: Charts) -> Iterator[str]:
    parts = parts_of_step(run)
    yield "<h2>Time</h2>"
    if parts:
        yield _table(parts[0], parts[1:], "Parts of a batch, by the callback Timer", texts=(0, 1))
    for heading, (head, *lines) in run.times.items():
        yield _table(head, lines, heading, texts=(0, 1), tall=True)
    for heading, text in run.texts.items():
        yield f"<h3>{escape(heading)}</h3>{_pre(text, heading)}"
    for spans in run.spans:
        yield _spans(spans)
    if run.spans:
        yield '<p class="dim">One span of a trace may lie in another, so the times of a table need not add up.</p>'
    timed = sorted({name for _, name in run.series if _is_time(name)})
    yield _grid(_figure(run, charts, name, "Step") for name in timed)
    if not (parts or run.times or run.spans or run.texts):
        yield (
            '<p class="dim">Nothing has measured times in this run. The callback <code>Timeline</code> measures the '
            "parts of a batch, each handler and the waits of training, and <code>Timer</code> the wait for data and "
            "the step.</p>"
        )


def _spans(spans: Spans) -> str:
    lines = [[name, f"{count:,}", f"{seconds * 1e3:,.2f}", f"{seconds / count * 1e3:,.3f}"]
             for name, count, seconds in spans.rows]  # fmt: skip
    more = f"; {spans.left_out:,} shorter ones are left out" if spans.left_out else ""
    note = f"{spans.title}, from {spans.source}{more}"
    return _table(["name", "times", "ms in all", "ms each"], lines, note, texts=(0,), tall=True)


def _graph(run: Findings) -> Iterator[str]:
    yield "<h2>The order of callbacks</h2>"
    if not run.pictures:
        yield (
            '<p class="dim">The files of a run do not hold its callbacks. <code>learner.report(path)</code> shows '
            "their order, and so does a drawing in the folder of the run, which <code>learner.callbacks.draw(event, "
            "to=...)</code> writes.</p>"
        )
    largest = max(run.pictures, key=lambda picture: len(picture.svg), default=None)
    for picture in run.pictures:
        yield f"<details{' open' if picture is largest else ''}><summary>{escape(picture.title)}</summary>"
        yield f"{_picture(picture)}{_pre(picture.text, picture.title) if picture.text else ''}</details>"


def _picture(picture: Picture) -> str:
    # As an image: neither its styles nor, in a file of others, its scripts reach the page.
    data = base64.b64encode(picture.svg).decode()
    below = ", which stands below as text" if picture.text else ""
    alt = escape(f"The order of the handlers of {picture.title}{below}")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(picture.title)}"><img loading="lazy" '
        f'alt="{alt}" src="data:image/svg+xml;base64,{data}"></div>'
    )


def _others(run: Findings, charts: Charts) -> Iterator[str]:
    others = [(group, name) for group, name in run.series if not group.startswith(("Step/", "Epoch/", "HyperParams"))]
    if not others:
        return
    yield "<h2>Other values</h2>"
    yield _grid(
        _chart(charts, f"{group}/{name}".strip("/"), "step", {group: run.series[group, name]}, {group: COLOURS[0]})
        for group, name in others
    )


def _origin(run: Findings) -> Iterator[str]:
    yield "<h2>Versions and files</h2>"
    if run.versions:
        yield _table(["package", "version"], [list(each) for each in run.versions.items()], "Versions", texts=(0, 1))
    else:
        yield '<p class="dim">Logs do not say which versions they were written with; a checkpoint does.</p>'
    if run.run:
        yield f"<p>The run has the identifier <code>{escape(run.run)}</code>.</p>"
    if run.files:
        lines = [[file.name, file.kind, file.note] for file in run.files]
        yield _table(["file", "kind", "what was read"], lines, "Files", texts=(0, 1, 2))


# --- elements


def _table(
    head: Sequence[str], lines: Iterable[Sequence[str]], caption: str, *, texts: Sequence[int], tall: bool = False
) -> str:
    """Return a table that scrolls within itself where it is too wide.

    Args:
        head: The names of the columns.
        lines: The cells of each line.
        caption: A description of the table.
        texts: The columns that hold texts; the others hold numbers, which stand at the right.
        tall: Whether the table scrolls where it is too tall.
    """

    def kind(column: int) -> str:
        """Return the class of a cell."""
        return (' class="text"' if column == len(head) - 1 else "") if column in texts else ' class="number"'

    top = "".join(f'<th scope="col"{kind(column)}>{escape(cell)}</th>' for column, cell in enumerate(head))
    rows = "".join(
        f"<tr>{''.join(f'<td{kind(column)}>{escape(cell)}</td>' for column, cell in enumerate(line))}</tr>\n"
        for line in lines
    )
    return (
        f'<div class="wide{" tall" if tall else ""}" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _pre(text: str, label: str) -> str:
    inside = f"<pre>{escape(text)}</pre>"
    return f'<div class="wide card" tabindex="0" role="region" aria-label="{escape(label)}">{inside}</div>'


def _is_time(name: str) -> bool:
    return name.startswith("Time.")


def _shorter(value: float) -> float:
    """Return a value with the four digits that a table shows."""
    return float(f"{value:.4g}")


def _lasted(seconds: float) -> str:
    """Return a length of time.

    >>> _lasted(3.21), _lasted(3725)
    ('3.2 s', '1:02:05')
    """
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
