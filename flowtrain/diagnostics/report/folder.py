"""The runs in a folder: the files that callbacks and backends of flowtrain have written there, whatever their names.

==================  ===========================================  ======================================================
file                recognized by                                gives
==================  ===========================================  ======================================================
JSON lines          the keys of its first record                 series, settings, the times of epochs
CSV                 its first columns, ``group,step``            series
event file          ``events.out.tfevents`` in its name          series
checkpoint          ``.ckpt`` at the end of its name             series, settings, versions, counts, callbacks
timeline, trace     its first event, or ``traceEvents``          spans of time
drawing             SVG, from ``learner.callbacks.draw``         the picture of an event
==================  ===========================================  ======================================================

The files in one folder, and in the folders in it, belong to one run. Folders beside each other are several runs, unless
a checkpoint and an event file in them say that they have the same run. Of series that several files have, the longest
is shown.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowtrain.diagnostics.report.findings import GROUPS, Findings, FoundFile, Key, Picture, Points, Spans, named
from flowtrain.diagnostics.report.logs import Log, read_csv, read_jsonl, read_tensorboard
from flowtrain.diagnostics.trace_file import read_trace
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.training.checkpoint.reading import number_of, read

__all__ = ["SHOWN_RUNS", "find_runs"]

SHOWN_RUNS = 6
"""The most runs on one page: the newest ones."""

_SNIFFED = 4096
"""The number of bytes at the beginning of a file by which it is recognized."""

_LARGEST_TRACE = 256 << 20
"""The size in bytes of the largest trace that is read; a browser reads a larger one no better."""

_LONGEST_SPANS = 20
"""The number of names in a table of spans."""

_SPANS = {
    "part": "Parts of a batch",
    "handler": "Handlers",
    "stall": "Waits of training",
    "device": "Waits of training",
    "checkpoint": "Checkpoints",
    "hand-over": "Snapshots for deferred callbacks, and their way into the queue",
    "lane": "Batches of events in lanes",
    "deferred": "Deferred handlers",
    "fit": "Fit, epochs and batches",
    "epoch": "Fit, epochs and batches",
    "batch": "Fit, epochs and batches",
}
"""The titles of the tables of spans, by the category that a timeline gives a span."""

_TRACES = (b'[{"name": "process_name", "ph": "M"', b'"traceEvents"')
"""The beginning of a timeline, and a key at the beginning of the traces of ``torch.profiler``."""

_RUN_ID = re.compile(r"events\.out\.tfevents\.\d+\.([0-9a-f]{12})(\.|$)")


def find_runs(folder: Path) -> list[Findings]:
    """Return the findings of all runs in a folder, the newest run first.

    Raises:
        UsageError: There is no such folder, it is a file, or there is no file of a run in it that can be read.
    """
    if not folder.exists():
        raise UsageError(f"There is no folder {folder}. Pass the folder of a run: the one that its logs are in.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, and a report is of a folder. Pass its folder: {folder.parent}")
    homes = _homes(folder)
    if not homes:
        inside = ", ".join(sorted(each.name for each in folder.iterdir())[:5])
        raise UsageError(
            f"There is no run in {folder}: it has no log of JsonlBackend, CsvBackend or TensorBoardBackend, and no "
            f"checkpoint (it holds: {inside or 'nothing'}). Pass the folder that a callback of the run writes to."
        )
    groups = _joined(homes)
    newest = sorted(groups, key=lambda files: max(path.stat().st_mtime for path, _ in files), reverse=True)
    runs = [_findings(folder, files) for files in newest[:SHOWN_RUNS]]
    if not any(run.series or run.counts or run.settings for run in runs):
        troubles = " ".join(note for run in runs for note in run.notes)
        raise UsageError(f"No file of a run in {folder} can be read. {troubles}".rstrip())
    if len(newest) > SHOWN_RUNS:
        left = ", ".join(_title(folder, files) for files in newest[SHOWN_RUNS:])
        runs[0].notes.append(f"{folder} has {len(newest)} runs; the newest {SHOWN_RUNS} are shown. Left out: {left}.")
    return runs


_Found = tuple[Path, str]
"""The path of a file, and its kind."""


def _homes(folder: Path) -> dict[Path, list[_Found]]:
    """Return the files of runs by the folder that they belong to, from the top of the tree down."""
    homes: dict[Path, list[_Found]] = {}
    loose: list[_Found] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.endswith(".files"))  # the pictures of a JsonlBackend
        for name in sorted(names):
            path = Path(where, name)
            kind = _kind(path)
            if kind in ("trace", "drawing"):
                loose.append((path, kind))
            elif kind:
                in_phase = kind == "event file" and name.endswith(f".{path.parent.name}") and path.parent != folder
                homes.setdefault(path.parent.parent if in_phase else path.parent, []).append((path, kind))
    for home in sorted(homes, key=lambda each: len(each.parts), reverse=True):
        above = next((each for each in home.parents if each in homes), None)
        if above is not None:
            homes[above] += homes.pop(home)
    for path, kind in loose:  # a trace may lie in a folder of its own, and belongs to the only run or the nearest one
        near = [each for each in path.parents if each in homes] or (list(homes) if len(homes) == 1 else [])
        if near:
            homes[near[0]].append((path, kind))
    return homes


def _kind(path: Path) -> str:
    """Return the kind of a file, empty if it is of no run."""
    if not path.is_file():  # a pipe, which nobody may ever write into, or a link to nothing
        return ""
    if ".tfevents." in path.name:
        return "event file"
    if path.suffix == ".ckpt":
        return "checkpoint"
    try:
        with path.open("rb") as file:
            first = file.read(_SNIFFED)
    except OSError:
        return ""
    if first.startswith(b'{"name": ') and b'"group": ' in first:
        return "JSON lines"
    if first.startswith(b"group,step"):
        return "CSV"
    if path.suffix == ".json" and any(each in first for each in _TRACES):
        return "trace"
    if path.suffix == ".svg" and first.startswith(b"<svg ") and b'class="paper"' in first:
        return "drawing"
    return ""


def _joined(homes: Mapping[Path, list[_Found]]) -> list[list[_Found]]:
    """Return the files of each run: folders whose files say that they are of one run are one."""
    groups: list[tuple[set[str], list[_Found]]] = []
    for files in homes.values():
        ids = {found for path, kind in files if (found := _run_id(path, kind))} if len(homes) > 1 else set()
        same = [group for group in groups if group[0] & ids]
        for group in same:
            groups.remove(group)
        groups.append((ids.union(*(each for each, _ in same)), [*(file for _, more in same for file in more), *files]))
    return [files for _, files in groups]


def _run_id(path: Path, kind: str) -> str:
    if kind == "event file":
        found = _RUN_ID.match(path.name)
        return found[1] if found else ""
    if kind == "checkpoint" and path.parent.joinpath("latest").is_file():
        try:
            with warnings.catch_warnings(action="ignore"):
                return str(read(path.parent, pieces=True).get("run", {}).get("id", ""))
        except FlowtrainError:
            return ""
    return ""


def _title(folder: Path, files: list[_Found]) -> str:
    """Return the name of a run: the folder that all of its files are in."""
    home = Path(os.path.commonpath([path.parent for path, _ in files]))
    return folder.resolve().name if home == folder else home.relative_to(folder).as_posix()


# --- reading


def _findings(folder: Path, files: list[_Found]) -> Findings:
    """Return the findings of the run that has these files."""
    run = Findings(_title(folder, files))
    readers: Mapping[str, Callable[[Findings, Path, str], str]] = {
        "JSON lines": lambda run, path, name: _take_log(run, read_jsonl(path, name)),
        "CSV": lambda run, path, name: _take_log(run, read_csv(path, name)),
        "event file": lambda run, path, name: _take_log(run, read_tensorboard(path, name)),
        "trace": _take_trace,
        "drawing": _take_drawing,
    }
    for kind, reader in readers.items():  # in this order: of series of one length, the first one is shown
        for path in [path for path, each in files if each == kind]:
            name = path.relative_to(folder).as_posix()
            try:
                note = reader(run, path, name)
            except Exception as error:  # a damaged file of any kind; the others are still worth a page
                note = f"could not be read: {_first_line(error)}"
                run.notes.append(f"{name} {note}")
            run.files.append(FoundFile(name, kind, note))
    for place in dict.fromkeys(path.parent for path, kind in files if kind == "checkpoint"):
        _take_checkpoints(run, place, [path for path, kind in files if kind == "checkpoint" and path.parent == place],
                          folder)  # fmt: skip
    run.callbacks.sort()
    return run


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _take_log(run: Findings, log: Log) -> str:
    better = run.add(log.series)
    if log.settings:
        run.settings.setdefault("Settings", {}).update(log.settings)
    run.notes += log.notes
    values = sum(len(points.values) for points in log.series.values())
    others = "".join(f", {count:,} of {kind}" for kind, count in log.others.items())
    unused = "" if better == len(log.series) else f"; {len(log.series) - better} are longer elsewhere"
    return f"{values:,} values in {len(log.series)} series{others}{unused}"


def _take_drawing(run: Findings, path: Path, name: str) -> str:
    svg = path.read_bytes()
    found = re.search(rb"<title>([^<]*)</title>", svg)
    title = found[1].decode("utf-8", "replace") if found else path.stem
    run.pictures.append(Picture(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"), svg))
    return title


def _take_trace(run: Findings, path: Path, source: str) -> str:
    size = path.stat().st_size
    if size > _LARGEST_TRACE:
        return f"{size / 2**20:,.0f} MiB, too large for a table; open it with https://ui.perfetto.dev"
    found: dict[str, dict[str, list[float]]] = {}
    for event in read_trace(path)[0]:
        if event.get("ph") == "X" and isinstance(event.get("dur"), (int, float)):
            category, name = str(event.get("cat", "")), re.sub(r"#\d+$", "", str(event.get("name", "")))
            title = _SPANS.get(category, f"Spans of the kind {category}")
            found.setdefault(title, {}).setdefault(name, []).append(event["dur"] / 1e6)  # from microseconds
    order = list(dict.fromkeys(_SPANS.values()))
    for title in sorted(found, key=lambda each: order.index(each) if each in order else len(order)):
        rows = [(name, len(seconds), sum(seconds)) for name, seconds in found[title].items()]
        rows.sort(key=lambda row: -row[2])
        run.spans.append(Spans(title, source, rows[:_LONGEST_SPANS], max(0, len(rows) - _LONGEST_SPANS)))
    count = sum(len(seconds) for names in found.values() for seconds in names.values())
    return f"{count:,} spans; open it with https://ui.perfetto.dev"


def _take_checkpoints(run: Findings, place: Path, files: list[Path], folder: Path) -> None:
    """Read the newest checkpoint of a folder that is whole, and note the others."""
    files.sort(key=lambda path: (number_of(path.name) or 0, path.stat().st_mtime))
    wanted = [place] if (place / "latest").is_file() else files[::-1]
    failure = ""
    for path in wanted:
        try:
            with warnings.catch_warnings(record=True, action="always") as said:  # of a damaged one that is passed over
                contents = read(path, pieces=True)
        except FlowtrainError as error:
            failure = str(error)
            run.notes.append(failure)
            continue
        run.notes += [str(each.message) for each in said if issubclass(each.category, UserWarning)]
        run.run = str(contents.get("run", {}).get("id", ""))
        note = _take_contents(run, contents)
        break
    else:
        note = f"no checkpoint here can be read: {failure.splitlines()[0]}" if failure else ""
    where = place.relative_to(folder).as_posix()
    names = [path.name for path in files]
    shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)} files"
    run.files.append(FoundFile(shown if where == "." else f"{where}/{shown}", "checkpoint", note))


def _take_contents(run: Findings, contents: Mapping[str, Any]) -> str:
    """Take what a checkpoint holds, and return what that is."""
    series: dict[Key, Points] = {}
    for entry, group in GROUPS.items():
        series |= dict(_unpacked(contents["cbstate"].get(entry, {}), group))
    better = run.add(series)
    run.versions = {"flowtrain": str(contents.get("flowtrain")), "torch": str(contents.get("torch"))}
    run.add_model(contents["model"])
    for name, optimizer in contents["optimizer"].items():
        run.add_optimizer(name, optimizer["type"], optimizer["state"]["param_groups"])
    for phase, counts in contents["cbstate"].get("history", {}).get("counts", {}).items():
        epochs, steps, _, updates = (*counts, counts[1])[:4]
        run.counts[phase] = epochs, steps, updates
    run.callbacks = [named(name, saved["type"]) for name, saved in contents["callbacks"].items()]
    return f"{len(series)} series, {better} of them shown; the versions, the optimizer and the callbacks"


def _unpacked(packed: Mapping[str, Any], group: str, name: str = "") -> Iterator[tuple[Key, Points]]:
    """Yield the series in a packed entry of ``cbstate`` (`flowtrain.state.encoding`)."""
    for kind, content in packed.items():
        if kind == "series":
            steps, values = (column.tolist() if hasattr(column, "tolist") else list(column)
                             for column in (content.get("steps", ()), content.get("values", ())))  # fmt: skip
            pairs = [(step, float(each)) for step, each in zip(steps, values, strict=True)
                     if isinstance(each, (int, float))]  # fmt: skip
            yield (group, name), Points([step for step, _ in pairs], [each for _, each in pairs])
        elif kind in ("by phase", "by name"):
            for key, item in content.items():
                inside = (f"{group}/{key}", "") if kind == "by phase" else (group, key)
                yield from _unpacked(item, *inside)
