"""The page of a report: what it shows, that it escapes names, and how it looks in a browser."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flowtrain import BatchEnd, Callback, LearnerView, Read, TrainingPhase, UsageError, on
from flowtrain.callbacks import LogHyperParams, LogMetrics, LogTraces, Metric, Metrics, Timer
from flowtrain.diagnostics.report.command import main
from flowtrain.diagnostics.report.findings import Findings, FoundFile, Picture, Points, Spans
from flowtrain.diagnostics.report.page import page, write_page
from flowtrain.logging import JsonlBackend
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import tiny_learner
from tests.support.browser import BROWSER, look
from tests.support.untyped import untyped

needs_browser = pytest.mark.skipif(BROWSER is None, reason="this machine has no Chromium")

EVIL = "</script><script>failures.push('ran')</script><img src=x onerror=\"failures.push('ran')\">'\\"


class Texts(HTMLParser):
    """Collects the texts of the cells of tables and the like, and the names of all elements."""

    CELLS = ("td", "th", "caption", "dt", "li", "pre", "summary", "p")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.names: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.names.append(tag)
        if tag in self.CELLS:
            self._inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        """Note the end of a cell."""
        self._inside = self._inside and tag not in self.CELLS

    def handle_data(self, data: str) -> None:
        """Add a text to the present cell."""
        if self._inside:
            self.cells[-1] += data


def long_run(steps: int) -> Findings:
    """Return the findings of a long run: 6 metrics, one of which diverges, and the times of its batches."""
    drawn = random.Random(0)
    run = Findings("long", counts={"TrainingPhase": (steps // 100, steps, steps)})
    numbers = [*range(1, steps + 1)]
    for name in ("Loss", "Accuracy", "Precision", "Recall", "GradNorm", "Time.Step", "Time.Data"):
        run.add({("Step/TrainingPhase", name): Points(numbers, [math.exp(-k / steps) + drawn.gauss(0, 0.1)
                                                                for k in numbers])})  # fmt: skip
    run.series["Step/TrainingPhase", "Loss"].values[-3:] = [math.nan, math.inf, math.nan]
    ends = [*range(1, steps // 100 + 1)]
    for phase in ("TrainingPhase", "ValidationPhase"):
        run.add({(f"Epoch/{phase}", "Loss"): Points(ends, [1 / end for end in ends], [60.0 * end for end in ends])})
    return run


def test_a_page_of_a_long_run_is_small_and_says_what_it_leaves_out() -> None:
    text = page([long_run(100_000)])
    assert len(text.encode()) < 2_000_000
    assert "values that are NaN or infinite: 3" in text
    assert "A chart of more than 600 values shows them in 600 columns" in text
    assert "The newest 200 of 2,000 lines" in text
    assert "16:39:00" in text, "the time of the last epoch, since the first one"


def test_a_page_has_a_largest_number_of_charts() -> None:
    run = Findings("wide")
    for number in range(50):
        run.add({("Epoch/TrainingPhase", f"metric {number}"): Points([1, 2], [1.0, 2.0])})
    text = page([run])
    assert text.count('<div class="chart">') == 40
    assert "A page has at most 40 charts. Left out: metric 40 by epoch, metric 41 by epoch" in text
    assert len(text.encode()) < 2_000_000


def test_a_page_of_a_learner_before_its_first_fit_has_no_script(tmp_path: Path) -> None:
    tiny_learner().report(tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text("utf-8")
    assert "The learner has not been trained yet" in text
    assert "Nothing has measured times in this run." in text
    assert "<script" not in text
    assert "BatchEnd, TrainingPhase and ValidationPhase" in Texts(text).cells
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_the_tables_have_the_values_of_the_learner(tmp_path: Path) -> None:
    learner = tiny_learner(Metrics(mean_absolute_error), n_batches=4)
    history = learner.fit(2)
    learner.report(tmp_path / "report.html")
    cells = Texts((tmp_path / "report.html").read_text("utf-8")).cells
    start = cells.index("epoch")
    assert cells[start : start + 4] == ["epoch", "phase", "Loss", "MeanAbsoluteError"]
    last = history.rows[-2]["value"], history.rows[-1]["value"]
    assert cells[start + 16 : start + 20] == ["2", "ValidationPhase", *(f"{value:.4g}" for value in last)]


def test_of_several_ranks_the_main_one_writes(tmp_path: Path) -> None:
    learner = tiny_learner()
    learner.state.rank = 1
    learner.report(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", None, 3, ["report.html"]])
def test_a_path_that_is_none_is_refused(path: object) -> None:
    with pytest.raises(UsageError) as failure:
        untyped(tiny_learner()).report(path)
    assert str(failure.value) == (f"report({path!r}) takes the path of the file to write: write report('report.html').")


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UsageError, match=r"^The report cannot be written to '.*/file/report.html': "):
        tiny_learner().report(tmp_path / "file" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"Is a directory\. Choose a path in a folder that you may write to\.$"):
        tiny_learner().report(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def evil_run() -> Findings:
    """Return findings in which every text is an attack."""
    run = Findings(EVIL, run=EVIL, notes=[EVIL], callbacks=[EVIL], texts={EVIL: EVIL}, versions={EVIL: EVIL})
    run.settings = {EVIL: {EVIL: EVIL}}
    run.counts = {EVIL: (1, 2, 3)}
    run.times = {EVIL: [[EVIL], [EVIL]]}
    run.spans = [Spans(EVIL, EVIL, [(EVIL, 1, 1.0)])]
    run.files = [FoundFile(EVIL, EVIL, EVIL)]
    run.pictures = [Picture(EVIL, b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", EVIL)]
    for group in (f"Step/{EVIL}", f"Epoch/{EVIL}", "HyperParams", EVIL):
        run.add({(group, EVIL): Points([1, 2], [1.0, 2.0]), (group, f"Time.{EVIL}"): Points([1], [2.0])})
    return run


def test_names_cannot_leave_their_place() -> None:
    names = Texts(page([evil_run()])).names
    assert names.count("script") == Texts(page([long_run(100)])).names.count("script")
    assert names.count("img") == 1, "the picture"


@needs_browser
@pytest.mark.slow
def test_attacks_in_names_do_nothing_in_a_browser(tmp_path: Path) -> None:
    write_page([evil_run()], tmp_path / "report.html")
    seen = look(tmp_path / "report.html")
    assert (seen.failures, seen.loaded) == ([], [])
    assert seen.charts == 9


class Reads(Callback):
    """Reads the loss."""

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Do nothing."""


def of_learner(folder: Path) -> Path:
    learner = tiny_learner(Timer(), Reads(), Metrics(mean_absolute_error), n_batches=8)
    learner.fit(3)
    learner.report(folder / "report.html")
    return folder / "report.html"


def of_folder(folder: Path) -> Path:
    lines = JsonlBackend(folder / "log.jsonl")
    metrics = Metrics(Metric(mean_absolute_error, "A" * 90))
    logs = LogMetrics(lines), LogTraces(lines), LogHyperParams(lines, settings={"path": "/a" * 90, "rate": 0.1})
    with tiny_learner(Timer(), metrics, *logs, n_batches=8) as learner:
        learner.fit(3)
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def of_long_run(folder: Path) -> Path:
    write_page([long_run(20_000), Findings("nothing")], folder / "report.html")
    return folder / "report.html"


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("make", [of_learner, of_folder, of_long_run])
def test_a_browser_shows_all_charts_without_a_network_on_a_desk_and_on_a_phone(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = make(tmp_path)
    charts = path.read_text("utf-8").count('<div class="chart">')
    assert charts > 3
    for width, dark in ((1280, False), (390, True)):
        seen = look(path, width=width, dark=dark)
        assert (seen.failures, seen.loaded, seen.wide) == ([], [], [])
        assert seen.charts == charts
        assert seen.width == seen.window == width, "it does not scroll sideways"
        assert (seen.paper, seen.ink) == (
            ("rgb(20, 23, 31)", "rgb(230, 232, 238)") if dark else ("rgb(255, 255, 255)", "rgb(31, 36, 48)")
        )


def test_texts_and_marks_have_enough_contrast() -> None:
    css = page([Findings("a")])
    for mode in re.findall(r":root\{(.*?)\}", css, re.DOTALL):
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]+)", mode))
        for name in ("ink", "dim"):
            for ground in ("paper", "card", "note"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    """Return the ratio of the luminance of two colours, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        """Return the relative luminance."""
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
