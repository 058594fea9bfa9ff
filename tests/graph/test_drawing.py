"""Drawings of plans: every edge that no others imply is shown, with its reason, and nothing covers anything else."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import BatchEnd, EpochEnd, Event, FitBegin, Phase, TrainingPhase, UpdateEnd, ValidationPhase
from flowtrain.callbacks import EarlyStopping, LogMetrics
from flowtrain.errors import UsageError
from flowtrain.graph.drawing import Drawing, draw_plan
from flowtrain.graph.nodes import Edge, Reason
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner

SVG = "{http://www.w3.org/2000/svg}"


@st.composite
def drawings(draw: st.DrawFn) -> Drawing:
    """Return a drawing of up to 12 handlers with any edges from earlier to later ones, and with times or without."""
    count = draw(st.integers(0, 12))
    pairs = list(combinations(range(count), 2))
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    labels = [draw(st.text(st.sampled_from('ab_.<>&"'), min_size=1, max_size=30)) for _ in range(count)]
    edges = [Edge(one, other, (Reason("access", f"{one} <before> {other}"),)) for one, other in sorted(chosen)]
    times = {at: draw(st.floats(1e-7, 1.0)) for at in range(count)} if draw(st.booleans()) else {}
    return Drawing("BatchEnd, TrainingPhase", labels, edges, ["a note"], times)


def ancestors(count: int, pairs: list[tuple[int, int]]) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(count)]
    for one, other in sorted(pairs, key=lambda pair: pair[1]):
        found[other] |= {one, *found[one]}
    return found


@given(drawings())
def test_the_edges_shown_imply_all_others_and_none_of_each_other(drawing: Drawing) -> None:
    count = len(drawing.labels)
    shown = [(edge.before, edge.after) for edge in drawing.shown]
    assert ancestors(count, shown) == ancestors(count, [(edge.before, edge.after) for edge in drawing.edges])
    for pair in shown:
        assert pair[0] not in ancestors(count, [other for other in shown if other != pair])[pair[1]]


@given(drawings())
def test_the_critical_path_is_the_longest_of_all(drawing: Drawing) -> None:
    paths: list[list[int]] = [[at] for at in range(len(drawing.labels))]
    for path in paths:  # the list grows meanwhile
        paths += [[*path, edge.after] for edge in drawing.edges if edge.before == path[-1]][: 2000 - len(paths)]
    if not drawing.times or len(paths) >= 2000:
        return
    own = drawing.critical
    known = {(edge.before, edge.after) for edge in drawing.edges}
    assert set(pairwise(own)) <= known
    longest = max((sum(drawing.times[at] for at in path) for path in paths), default=0.0)
    assert sum(drawing.times[at] for at in own) == pytest.approx(longest)


def boxes(root: Any) -> list[tuple[float, float, float, float]]:
    """Return left, top, right and bottom of each box."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("class") == "box":
            x, y, width, height = (float(rect.get(name)) for name in ("x", "y", "width", "height"))
            found.append((x, y, x + width, y + height))
    return found


@given(drawings())
def test_the_picture_has_every_handler_and_reason_and_no_box_covers_another(drawing: Drawing) -> None:
    root = ElementTree.fromstring(drawing.svg)
    found = boxes(root)
    assert len(found) == len(drawing.labels)
    for one, other in combinations(found, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for edge in drawing.edges:
        assert found[edge.before][3] < found[edge.after][1]
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert texts[:2] == ["BatchEnd, TrainingPhase", "a note"]
    assert set(drawing.labels) <= set(texts)
    for edge in drawing.edges:
        assert any(text.endswith(f"  {edge.reasons[0]}") for text in texts)
    width, height = (float(root.get(name) or 0) for name in ("width", "height"))
    assert all(box[0] >= 0 and box[2] <= width and box[3] <= height for box in found)
    assert len([path for path in root.iter(f"{SVG}path") if "edge" in (path.get("class") or "")]) == len(drawing.shown)
    inside = ElementTree.tostring(ElementTree.fromstring(drawing.html.partition("<body>")[2].partition("</body>")[0]))
    assert len(inside) == len(ElementTree.tostring(root))
    shown = drawing._repr_html_()  # pyright: ignore[reportPrivateUsage]  # a notebook calls it
    assert shown == drawing.svg


def test_text_for_mermaid() -> None:
    edges = [Edge(0, 1, (Reason("access", 'A writes x, "B" reads <it>'), Reason("run_after", "B names A")))]
    times = {0: 0.0000021, 1: 0.0123}
    assert str(Drawing("BatchEnd, TrainingPhase", ["A.a", "B.b"], edges, times=times)) == (
        "---\n"
        "title: BatchEnd, TrainingPhase\n"
        "---\n"
        "flowchart TD\n"
        '    h0["A.a<br/>2.1 µs"]\n'
        '    h1["B.b<br/>12.3 ms"]\n'
        '    h0 -->|"A writes x, #quot;B#quot; reads #lt;it#gt;<br/>B names A"| h1\n'
        "    classDef critical stroke:#c2410c,stroke-width:2px\n"
        "    class h0,h1 critical\n"
    )


def test_a_learner_draws_its_events(tmp_path: Path) -> None:
    learner = tiny_learner(LogMetrics(JsonlBackend(tmp_path / "log")), EarlyStopping(patience=2))
    drawing = learner.callbacks.draw(EpochEnd, ValidationPhase)
    plan = learner.callbacks.plan(EpochEnd, ValidationPhase)
    assert drawing.title == "EpochEnd, ValidationPhase"
    assert list(drawing.labels) == [planned.label for planned in plan.handlers]
    assert [(edge.before, edge.after) for edge in drawing.edges] == [(edge.before, edge.after) for edge in plan.edges]
    assert "Recorder writes cbstate.history, Metrics reads it" in str(drawing)
    assert drawing.critical == []
    assert learner.callbacks.draw(BatchEnd).title == "BatchEnd, TrainingPhase"
    assert learner.callbacks.draw(FitBegin).title == "FitBegin, Phase"
    nothing = learner.callbacks.draw(UpdateEnd, TrainingPhase)
    assert not nothing.labels
    assert "No callback has a handler." in nothing.svg
    measured = draw_plan(plan, times=dict.fromkeys(range(len(plan)), 1.0))
    assert len(measured.critical) == 3
    assert 'class="critical edge"' in measured.svg


def test_it_is_written_as_the_name_of_the_file_says(tmp_path: Path) -> None:
    learner = tiny_learner(EarlyStopping(patience=2))
    paths = [tmp_path / "new" / f"graph.{kind}" for kind in ("svg", "html", "mmd")]
    *_, drawing = [learner.callbacks.draw(BatchEnd, TrainingPhase, to=path) for path in paths]
    svg, html, text = (path.read_text("utf-8") for path in paths)
    assert (svg, html, text) == (drawing.svg, drawing.html, str(drawing))
    assert html.startswith("<!doctype html>")
    assert svg in html
    assert "http://" not in html.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_wrong_arguments(tmp_path: Path) -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError, match=r"cannot be written to 'graph.png': .* Write draw\(..., to='graph.svg'\)"):
        learner.callbacks.draw(BatchEnd, to="graph.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"The drawing cannot be written to '.*graph.svg': .*file"):
        learner.callbacks.draw(BatchEnd, to=tmp_path / "file" / "graph.svg")
    wrong: list[tuple[Any, Any]] = [("BatchEnd", None), (BatchEnd(), None), (BatchEnd, "train"), (Phase, Event)]
    for event, phase in wrong:
        with pytest.raises(UsageError, match=r"takes the type of an event, .* Write draw\(BatchEnd, TrainingPhase\)"):
            learner.callbacks.draw(event, phase)


def test_long_lines_of_text_are_broken_and_do_not_push_the_boxes_aside() -> None:
    """A note of an executor has 200 characters, of which each made the picture wider than the window of a phone."""
    words = [f"word{number}" for number in range(40)]
    narrow = Drawing("BatchEnd, TrainingPhase", ["A.act"], [], ["a short note"])
    wide = Drawing("BatchEnd, TrainingPhase", ["A.act"], [], ["a short note", " ".join(words)])
    sizes = [re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing.svg) for drawing in (narrow, wide)]
    assert all(size is not None and int(size[1]) < 400 for size in sizes)
    lines = re.findall(r"<text [^>]*>([^<]*)</text>", wide.svg)
    assert lines[1] == "a short note"
    assert " ".join(" ".join(lines[2:-1]).split()) == " ".join(words)
    assert all(line.startswith("  word") for line in lines[3:-1])
    assert lines[-1] == "A.act"
