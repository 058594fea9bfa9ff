"""Drawings of a plan: the handlers of one event, which of them run first, and why, as text for Mermaid, SVG or HTML.

A drawing shows the edges that no others imply, each with a number; below the picture the reasons stand under these
numbers. A handler is a box, lower than all that must run before it. The boxes of a layer are ordered so that few edges
cross, and an edge that spans several layers passes between their boxes (Sugiyama, Tagawa, Toda: Methods for Visual
Understanding of Hierarchical System Structures, 1981).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from textwrap import TextWrapper

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_type
from flowtrain.graph.nodes import Edge
from flowtrain.graph.plan import Plan

__all__ = ["Drawing", "check_drawn", "draw_plan"]

_CHAR, _LINE = 7.4, 18.0
"""The width of a character and the height of a line, in the font of the picture, which is 12 pixels high."""

_BOX, _GAP, _LAYER, _MARGIN = 34.0, 28.0, 84.0, 16.0
"""The height of a box, the distance of two boxes, the distance of two layers, and the margin, in pixels."""

_LEAST_LINE = 48
"""The least number of characters after which lines of text are broken, which a phone shows without scrolling."""

_SWEEPS = 4
"""How often the layers are put in order, by the layer above and by the one below in turns."""

_STYLE = """
text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1f2430}
.title{font-weight:bold}.dim{fill:#5b6270}.paper{fill:#fff}
.box{fill:#fff;stroke:#5b6270}
.edge{fill:none;stroke:#5b6270}.tip{fill:#5b6270}.mark{fill:#fff;stroke:#5b6270}
.critical .box,.critical.edge,.critical .mark{stroke:#c2410c;stroke-width:2}.critical.tip{fill:#c2410c}
@media(prefers-color-scheme:dark){.paper{fill:#14171f}text{fill:#e6e8ee}.dim{fill:#a3a9b7}.box,.mark{fill:#1f2430;stroke:#a3a9b7}
.edge{stroke:#a3a9b7}.tip{fill:#a3a9b7}
.critical .box,.critical.edge,.critical .mark{stroke:#fb923c}.critical.tip{fill:#fb923c}}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>body{{margin:0;background:#fff}}@media(prefers-color-scheme:dark){{body{{background:#14171f}}}}</style></head>
<body>{svg}</body></html>
"""


@dataclass(frozen=True)
class Drawing:
    """A picture of a plan. In a notebook it is shown as the last line of a cell; ``str(drawing)`` is text for Mermaid.

    Attributes:
        title: The event and the phase.
        labels: The names of the handlers, in serial order.
        edges: All edges, by positions in `labels`.
        notes: Lines of the executor about the plan.
        times: The measured seconds of handlers by position; empty if none were measured.
    """

    title: str
    labels: Sequence[str]
    edges: Sequence[Edge]
    notes: Sequence[str] = ()
    times: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def shown(self) -> list[Edge]:
        """The edges that no others imply, in the order of their numbers."""
        before: list[set[int]] = [set() for _ in self.labels]
        shown: list[Edge] = []
        for after in range(len(self.labels)):
            own = sorted((edge for edge in self.edges if edge.after == after), key=lambda edge: -edge.before)
            for edge in own:
                if edge.before not in before[after]:
                    shown.append(edge)
                    before[after] |= {edge.before, *before[edge.before]}
        return sorted(shown, key=lambda edge: (edge.before, edge.after))

    @cached_property
    def critical(self) -> list[int]:
        """The positions of the handlers that decide how long the event takes at least; empty without times."""
        if not self.times:
            return []
        ends: list[float] = []
        last: list[int | None] = []
        for position in range(len(self.labels)):
            earlier = [edge.before for edge in self.edges if edge.after == position]
            slowest = max(earlier, key=ends.__getitem__, default=None)
            last.append(slowest)
            ends.append(self.times.get(position, 0.0) + (0.0 if slowest is None else ends[slowest]))
        place: int | None = max(range(len(ends)), key=ends.__getitem__, default=None)
        path: list[int] = []
        while place is not None:
            path.append(place)
            place = last[place]
        return path[::-1]

    def _is_critical(self, edge: Edge) -> bool:
        return (edge.before, edge.after) in pairwise(self.critical)

    def _reasons(self) -> Iterator[str]:
        """Yield the lines below the picture: the reasons of the edges by number, and of those that others imply."""
        for number, edge in enumerate(self.shown, 1):
            yield from (f"{number}  {reason}" for reason in edge.reasons)
        implied = [edge for edge in self.edges if edge not in self.shown]
        if implied:
            yield "Implied by these:"
        for edge in implied:
            yield from (f"   {reason}" for reason in edge.reasons)

    def _time(self, position: int) -> str:
        seconds = self.times.get(position)
        if seconds is None:
            return ""
        return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"

    # --- text for Mermaid

    def __str__(self) -> str:
        """Return the drawing as a flowchart of Mermaid (https://mermaid.js.org), which GitHub and notebooks show."""
        lines = ["---", f"title: {self.title}", "---", "flowchart TD"]
        for position, label in enumerate(self.labels):
            text = "<br/>".join(filter(None, (_for_mermaid(label), self._time(position))))
            lines.append(f'    h{position}["{text}"]')
        for edge in self.shown:
            reasons = "<br/>".join(_for_mermaid(str(reason)) for reason in edge.reasons)
            lines.append(f'    h{edge.before} -->|"{reasons}"| h{edge.after}')
        if self.critical:
            lines.append("    classDef critical stroke:#c2410c,stroke-width:2px")
            lines.append(f"    class {','.join(f'h{position}' for position in self.critical)} critical")
        return "\n".join(lines) + "\n"

    # --- SVG and HTML

    @property
    def svg(self) -> str:
        """The drawing as an SVG document, in the colours of the reader's light or dark mode."""
        layout = _Layout(self)
        most = max(_LEAST_LINE, int(layout.width / _CHAR))  # a long line would push the boxes out of a narrow window
        notes = [*self.notes, *([] if self.labels else ["No callback has a handler."])]
        head = [self.title, *_filled(notes, most, "  ")]
        reasons = _filled(self._reasons(), most, "   ")
        top = _MARGIN + _LINE * len(head) + 10
        bottom = top + layout.height + (_LINE if reasons else 0)
        width = max(layout.width, *(_CHAR * len(line) for line in [*head, *reasons])) + 2 * _MARGIN
        height = bottom + _LINE * len(reasons) + _MARGIN
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}"><title>{escape(self.title)}</title><style>{_STYLE}</style>'
            f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>'
        ]
        for number, line in enumerate(head):
            kind = "dim" if number else "title"
            parts.append(_text(_MARGIN, _MARGIN + _LINE * (number + 0.7), line, kind))
        parts.append(f'<g transform="translate({(width - layout.width) / 2:.1f} {top:.1f})">')
        parts += self._edges(layout)
        parts += self._boxes(layout)
        parts.append("</g>")
        for number, line in enumerate(reasons):
            parts.append(_text(_MARGIN, bottom + _LINE * (number + 0.7), line, "dim"))
        return "".join([*parts, "</svg>\n"])

    def _boxes(self, layout: _Layout) -> Iterator[str]:
        for position, label in enumerate(self.labels):
            x, y = layout.points[position]
            kinds = "critical" if position in self.critical else ""
            time = self._time(position)
            yield f'<g class="{kinds}"><rect class="box" x="{x - _width(label) / 2:.1f}" y="{y:.1f}" rx="5" '
            yield f'width="{_width(label):.1f}" height="{_BOX:.0f}"/>'
            yield _text(x, y + (15 if time else 21), label, "", middle=True)
            yield (_text(x, y + 28, time, "dim", middle=True) if time else "") + "</g>"

    def _edges(self, layout: _Layout) -> Iterator[str]:
        for number, edge in enumerate(self.shown, 1):
            kind = "critical " if self._is_critical(edge) else ""
            points = layout.path(edge)
            curve = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
            for (x, y), (to_x, to_y) in pairwise(points):
                half = (y + to_y) / 2
                curve += f"C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"
            (x, y), (next_x, next_y), (end_x, end_y) = points[0], points[1], points[-1]
            reasons = escape("\n".join(map(str, edge.reasons)))
            yield f'<path class="{kind}edge" d="{curve}"/>'
            yield f'<path class="{kind}tip" d="M{end_x:.1f} {end_y:.1f}l-4 -8h8z"/>'
            yield f'<g class="{kind}"><title>{reasons}</title><circle class="mark" '
            yield f'cx="{(x + next_x) / 2:.1f}" cy="{(y + next_y) / 2:.1f}" r="9"/>'
            yield _text((x + next_x) / 2, (y + next_y) / 2 + 4, str(number), "", middle=True) + "</g>"

    @property
    def html(self) -> str:
        """The drawing as a page of its own, which needs no network."""
        return _PAGE.format(title=escape(self.title), svg=self.svg)

    def _repr_html_(self) -> str:
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the drawing to a file: SVG, a page of HTML, or text for Mermaid, by the ending of its name.

        Args:
            path: A path that ends with ``.svg``, ``.html`` or ``.mmd``. Folders are made where they are missing.

        Raises:
            UsageError: The path has another ending, or cannot be written.
        """
        target = Path(path)
        kinds = {".svg": lambda: self.svg, ".html": lambda: self.html, ".mmd": lambda: str(self)}
        if target.suffix not in kinds:
            raise UsageError(
                f"A drawing cannot be written to {str(path)!r}: the name ends with .svg, .html or .mmd (text for "
                f"Mermaid). Write draw(..., to={str(target.with_suffix('.svg'))!r})."
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(kinds[target.suffix](), "utf-8")
        except OSError as error:
            raise UsageError(f"The drawing cannot be written to {str(path)!r}: {error}.") from error


def check_drawn(event: object, phase: object) -> None:
    """Check the arguments of `Callbacks.draw`.

    Raises:
        UsageError: The event is no event type, or the phase is neither ``None`` nor a phase type.
    """
    if not (is_type(event, Event) and (phase is None or is_type(phase, Phase))):
        raise UsageError(
            f"draw({event!r}, {phase!r}) takes the type of an event, and that of a phase. "
            f"Write draw(BatchEnd, TrainingPhase)."
        )


def draw_plan(
    plan: Plan,
    notes: Sequence[str] = (),
    times: Mapping[int, float] | None = None,
    to: str | os.PathLike[str] | None = None,
) -> Drawing:
    """Return the drawing of a plan.

    Args:
        plan: The plan.
        notes: Lines of the executor about the plan.
        times: The measured seconds of handlers, by their positions in the plan.
        to: A file to which the drawing is written, as by `Drawing.save`.

    Raises:
        UsageError: The file cannot be written.
    """
    title = f"{plan.event_type.__name__}, {plan.phase_type.__name__}"
    labels = [planned.label for planned in plan.handlers]
    drawing = Drawing(title, labels, plan.edges, tuple(notes), dict(times or {}))
    if to is not None:
        drawing.save(to)
    return drawing


def _for_mermaid(text: str) -> str:
    """Return a text that Mermaid shows as it is, within quotes."""
    return text.replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")


def _text(x: float, y: float, text: str, kind: str, *, middle: bool = False) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{anchor} xml:space="preserve">{escape(text)}</text>'


def _filled(texts: Iterable[str], most: int, indent: str) -> list[str]:
    """Return texts in lines of at most so many characters, of which all but the first of a text are indented."""
    fill = TextWrapper(most, subsequent_indent=indent, break_on_hyphens=False)
    return [line for text in texts for line in (fill.wrap(text) if len(text) > most else [text])]


def _width(label: str) -> float:
    return _CHAR * len(label) + 20


class _Layout:
    """Where the boxes and edges of a drawing stand.

    Attributes:
        points: The middle of the upper side of each box, by the position of its handler.
        width: The width of the picture, in pixels.
        height: Its height.
    """

    def __init__(self, drawing: Drawing) -> None:
        layer: list[int] = []
        for position in range(len(drawing.labels)):
            above = [layer[edge.before] for edge in drawing.shown if edge.after == position]
            layer.append(max(above, default=-1) + 1)
        self._layers: list[list[int]] = [[] for _ in range(max(layer, default=0) + 1)]
        self._widths = dict(enumerate(map(_width, drawing.labels)))
        for position, number in enumerate(layer):
            self._layers[number].append(position)
        self._chains = {(edge.before, edge.after): self._chain(edge, layer) for edge in drawing.shown}
        for _ in range(_SWEEPS):
            self._order(down=True)
            self._order(down=False)
        rows = [sum(self._widths[each] + _GAP for each in row) - _GAP for row in self._layers]
        self.width = max(rows, default=0.0)
        self.height = _LAYER * (len(self._layers) - 1) + _BOX
        self.points: dict[int, tuple[float, float]] = {}
        for number, (row, taken) in enumerate(zip(self._layers, rows, strict=True)):
            x = (self.width - taken) / 2
            for each in row:
                self.points[each] = (x + self._widths[each] / 2, number * _LAYER)
                x += self._widths[each] + _GAP

    def _chain(self, edge: Edge, layer: Sequence[int]) -> list[int]:
        """Return the boxes of an edge, with a point of its own in each layer between them."""
        between: list[int] = []
        for number in range(layer[edge.before] + 1, layer[edge.after]):
            point = len(self._widths)
            self._widths[point] = 0.0
            self._layers[number].append(point)
            between.append(point)
        return [edge.before, *between, edge.after]

    def _order(self, *, down: bool) -> None:
        """Put each layer in the order of the mean places of its neighbours in the layer before."""
        pairs = [pair for chain in self._chains.values() for pair in pairwise(chain)]
        rows = self._layers if down else self._layers[::-1]
        for row, following in pairwise(rows):
            place = {each: (index + 0.5) / len(row) for index, each in enumerate(row)}

            def mean(each: int, place: Mapping[int, float] = place, row: Sequence[int] = following) -> float:
                """Return the mean place of the neighbours of a point; its own place if it has none."""
                found = [place[one if down else other] for one, other in pairs if (other if down else one) == each]
                return sum(found) / len(found) if found else (row.index(each) + 0.5) / len(row)

            following[:] = sorted(following, key={each: mean(each) for each in following}.__getitem__)

    def path(self, edge: Edge) -> list[tuple[float, float]]:
        """Return the points of an edge, from the lower side of one box to the upper side of the other."""
        first, *between, last = (self.points[each] for each in self._chains[edge.before, edge.after])
        points = [(first[0], first[1] + _BOX)]
        for x, y in between:
            points += [(x, y), (x, y + _BOX)]
        return [*points, last]
