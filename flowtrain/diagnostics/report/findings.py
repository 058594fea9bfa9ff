"""The findings: all that a report shows of one run, in plain values, whatever they were read from.

Logs, checkpoints and the shared state of a learner name their series alike: by a group, which says what a step counts
and in which phase (``Step/TrainingPhase``, ``Epoch/ValidationPhase``, ``HyperParams``), and by a name (``Loss``).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from flowtrain.graph.drawing import Drawing
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.state.series import Series
from flowtrain.training.checkpoint.reading import own_version

__all__ = [
    "GROUPS",
    "Epoch",
    "Findings",
    "FoundFile",
    "Key",
    "Picture",
    "Points",
    "Spans",
    "epochs",
    "named",
    "of_learner",
    "parts_of_step",
    "text_of",
]

Key: TypeAlias = tuple[str, str]
"""The group and the name of a series."""

GROUPS: Mapping[str, str] = {
    "metrics_step": "Step",
    "metrics_epoch": "Epoch",
    "tracehistory": "Step",
    "hyperparams": "HyperParams",
}
"""The entries of ``cbstate`` that a report shows, and the first part of the group under which logs have them."""


@dataclass
class Points:
    """The values of one series.

    Attributes:
        steps: The step of each value.
        values: The values, which may be NaN or infinite.
        times: When each value was recorded, in seconds since 1970; empty if the source does not say it.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A drawing of the handlers of one event.

    Attributes:
        title: The event and the phases.
        svg: The drawing as an SVG document.
        text: The same order and its reasons as text; empty if the source does not have it.
    """

    title: str
    svg: bytes
    text: str = ""


@dataclass(frozen=True)
class Spans:
    """The spans of one kind in a trace, those of equal names together.

    Attributes:
        title: The kind of the spans.
        source: The file of the trace.
        rows: The name, the number of spans and their seconds together, the longest first.
        left_out: The number of names that are not in `rows`.
    """

    title: str
    source: str
    rows: Sequence[tuple[str, int, float]]
    left_out: int = 0


@dataclass
class FoundFile:
    """A file that belongs to a run.

    Attributes:
        name: Its path in the folder.
        kind: What the file is.
        note: What was read of it, or why nothing was.
    """

    name: str
    kind: str
    note: str = ""


@dataclass
class Findings:
    """All that is known of one run.

    Attributes:
        title: The name of the folder, or of the learner.
        series: The series by group and name.
        settings: The settings and hyperparameters: for each heading the names and values.
        versions: The versions of packages, by name.
        counts: For each phase the epochs, batches and updates that are complete.
        callbacks: The names of the callbacks.
        pictures: The drawings of the events.
        times: Tables of measured times: for each heading the lines, of which the first is the head.
        texts: Further reports as plain text, by heading.
        spans: What traces say of times.
        files: The files of the run.
        notes: What the reader should know first: damage, and things that are missing.
        run: The identifier of the run; empty if no source has it.
    """

    title: str
    series: dict[Key, Points] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    callbacks: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    times: dict[str, list[list[str]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    spans: list[Spans] = field(default_factory=list)
    files: list[FoundFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    run: str = ""

    def add(self, series: Mapping[Key, Points]) -> int:
        """Add series, and return how many of them have more values than those that are known under the same name."""
        better = {
            key: points
            for key, points in series.items()
            if points.values and (key not in self.series or len(points.values) > len(self.series[key].values))
        }
        self.series |= better
        return len(better)

    def add_optimizer(self, name: str, kind: str, groups: Iterable[Mapping[str, Any]]) -> None:
        """Add the hyperparameters of an optimizer, from the groups in its ``state_dict``."""
        for number, group in enumerate(groups):
            heading = f"Optimizer {name}".strip() + f": {kind}, group {number}"
            self.settings[heading] = {
                name: text_of(value)
                for name, value in group.items()
                if name != "params" and value is not None and _is_plain(value)
            }

    def add_model(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the sizes of the models, from the ``state_dict`` of each."""
        for name, state in models.items():
            size = sum(math.prod(value.shape) for value in state.values() if hasattr(value, "shape"))
            called = f"Numbers in {name or 'the model'}, buffers included"
            self.settings.setdefault("Model", {})[called] = f"{size:,}"


@dataclass(frozen=True)
class Epoch:
    """One epoch of one phase.

    Attributes:
        number: The number of the training epoch that the values belong to.
        phase: The phase.
        values: The values by metric.
        ended: When the epoch ended, in seconds since 1970; ``None`` if no source says it.
    """

    number: int
    phase: str
    values: dict[str, float]
    ended: float | None


def epochs(findings: Findings) -> list[Epoch]:
    """Return the epochs of a run in order. Several evaluations may have the number of one training epoch."""
    rows: dict[tuple[int, str, int], Epoch] = {}
    for (group, name), points in findings.series.items():
        each, _, phase = group.partition("/")
        if each != "Epoch":
            continue
        seen: dict[int, int] = {}
        for place, (step, value) in enumerate(zip(points.steps, points.values, strict=True)):
            key = step, phase, seen.get(step, 0)
            seen[step] = key[2] + 1
            when = points.times[place] if points.times else None
            rows.setdefault(key, Epoch(step, phase, {}, when)).values[name] = value
    phases = list(dict.fromkeys(row.phase for row in rows.values()))
    return [row for _, row in sorted(rows.items(), key=lambda item: (item[0][0], item[0][2], phases.index(item[0][1])))]


_PARTS = {"Time.Data": "waiting for data", "Time.Step": "the step, with its handlers"}
"""The series of `flowtrain.callbacks.Timer` that are parts of the time of an epoch."""


def parts_of_step(findings: Findings) -> list[list[str]]:
    """Return the table of the parts of a batch that `Timer` has measured: its head, then its lines; or nothing."""
    lines: list[list[str]] = []
    for (group, name), points in findings.series.items():
        if name in _PARTS and points.values:
            seconds = sorted(points.values)
            total = sum(seconds)
            middle, mean = seconds[len(seconds) // 2], total / len(seconds)
            numbers = [f"{total:,.2f}", *(f"{1e3 * each:,.3f}" for each in (mean, middle, seconds[-1]))]
            lines.append([group.partition("/")[2], _PARTS[name], f"{len(seconds):,}", *numbers])
    head = ["phase", "part", "batches", "seconds in all", "ms: mean", "median", "longest"]
    return [head, *lines] if lines else []


def named(name: str, kind: str) -> str:
    """Return the name of a callback, with its type where the name is another."""
    return name if name == kind else f"{name} ({kind})"


def text_of(value: object) -> str:
    """Return a value of a setting or a metric as a short text."""
    return f"{value:.6g}" if type(value) is float else str(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


# --- the findings of a learner


def of_learner(state: LearnerState, executor: Executor) -> Findings:
    """Return the findings of a learner. Values that are still on a device are read, which waits for it.

    Args:
        state: The state of the learner.
        executor: Its executor.
    """
    callbacks: Callbacks = state.callbacks
    found = Findings("A learner", callbacks=[named(each.name, type(each).__name__) for each in callbacks])
    for entry, group in GROUPS.items():
        if entry in state.cbstate:
            found.add(dict(_series(getattr(state.cbstate, entry), group)))
    history = state.cbstate.history if "history" in state.cbstate else {}
    found.counts = {repr(phase): (each.epochs, each.steps, each.updates) for phase, each in history.items()}
    if not (found.series or any(any(counts) for counts in found.counts.values())):
        found.notes.append("The learner has not been trained yet: there are no metrics and no times.")
    found.add_model({name: model.state_dict() for name, model in by_name(state.model).items()})
    for name, optimizer in by_name(state.optimizer).items():
        found.add_optimizer(name, type(optimizer).__name__, optimizer.state_dict()["param_groups"])
    found.versions = {
        "flowtrain": own_version(),
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    drawings = list(_drawings(callbacks))
    found.pictures = [Picture(title, alike[0].svg.encode(), text) for title, alike, text in drawings]
    measured = [
        (seconds, drawing.title, drawing.labels[place])
        for _, alike, _ in drawings
        for drawing in alike
        for place, seconds in drawing.times.items()
    ]
    if measured:
        measured.sort(reverse=True)
        lines = [[event, handler, f"{seconds * 1e3:,.3f}"] for seconds, event, handler in measured]
        found.times["Time by callback, the longest first"] = [["event", "handler", "ms a call"], *lines]
    report = getattr(executor, "report", None)  # an executor with lanes has one
    if report is not None:
        found.texts[f"Executor {executor.name}: where callbacks run, what waits, and stalls"] = str(report())
    return found


def _series(value: Any, group: str, name: str = "") -> Iterator[tuple[Key, Points]]:
    """Yield the series in an entry of ``cbstate``: by phase and name, or by name alone."""
    if isinstance(value, Series):
        pairs = [(step, each) for step, each in value if isinstance(each, (int, float))]
        yield (group, name), Points([step for step, _ in pairs], [float(each) for _, each in pairs])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inside = (group, key) if isinstance(key, str) else (f"{group}/{key!r}", "")
            yield from _series(item, *inside)


def _drawings(callbacks: Callbacks) -> Iterator[tuple[str, list[Drawing], str]]:
    """Yield each event with the phases of one order: their title, a drawing for each phase, and the order as text."""
    alike: dict[tuple[Any, ...], list[tuple[str, Drawing, str]]] = {}
    for event, phase in callbacks.known:
        drawing = callbacks.draw(event, phase)
        text = "\n".join(callbacks.plan(event, phase).explain())
        alike.setdefault((event, text, tuple(drawing.notes)), []).append((phase.__name__, drawing, text))
    for (event, text, _), found in alike.items():
        yield f"{event.__name__}, {' and '.join(name for name, *_ in found)}", [each for _, each, _ in found], text
