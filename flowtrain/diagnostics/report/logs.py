"""The logs in a folder: files of `JsonlBackend`, `CsvBackend` and `TensorBoardBackend`, read as far as they are whole.

Each function returns the series of a file, and a note on what was left out of them. A log to which several runs have
written one after the other shows the last of them: where a step is lower than the one before, another run begins.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from flowtrain.diagnostics.report.findings import Key, Points, text_of
from flowtrain.logging.extras import needed
from flowtrain.logging.values import flat

__all__ = ["Log", "read_csv", "read_jsonl", "read_tensorboard"]

_COUNTED = ("Step/", "Epoch/", "HyperParams")
"""The beginnings of groups whose steps only grow, because flowtrain counts them."""


@dataclass
class Log:
    """What one log has.

    Attributes:
        series: The series by group and name.
        settings: The settings of the run by name, from `LogHyperParams`.
        notes: What was left out, and why.
        others: The number of records that are neither values nor settings, by their kind.
    """

    source: str
    series: dict[Key, Points] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    _earlier: int = 0

    def add(self, group: str, name: str, step: int, value: float, time: float | None = None) -> None:
        """Add a value. A step that is lower than the last one of its series begins another run."""
        points = self.series.get((group, name))
        if points is not None and step < points.steps[-1] and group.startswith(_COUNTED):
            self._earlier += 1
            self.series.clear()
            points = None
        if points is None:
            points = self.series[group, name] = Points()
        points.steps.append(step)
        points.values.append(value)
        if time is not None:
            points.times.append(time)

    def finished(self, bad: list[int], unit: str) -> Log:
        """Return this log with its notes.

        Args:
            bad: The numbers of the lines that could not be read.
            unit: The word for a line.
        """
        if bad:
            which = f"{unit} {bad[0]} is" if len(bad) == 1 else f"{len(bad)} {unit}s, the first of them {bad[0]}, are"
            self.notes.append(f"{self.source}: {which} cut off or damaged, and left out; the other {unit}s are shown.")
        if self._earlier:
            self.notes.append(
                f"{self.source} has the records of {self._earlier + 1} runs, one after the other, since steps begin "
                f"again; the last of them is shown."
            )
        return self


def read_jsonl(path: Path, name: str) -> Log:
    """Return the log of a `JsonlBackend`.

    Args:
        path: The file.
        name: The name of the file for the reader.

    Raises:
        OSError: The file cannot be read.
    """
    log, bad = Log(name), list[int]()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                _take(json.loads(line), log)
            except (ValueError, TypeError, KeyError):  # not JSON, not UTF-8, or no record
                bad.append(number)
    return log.finished(bad, "line")


def _take(record: Mapping[str, Any], log: Log) -> None:
    group, name, step, kind = record["group"], record["name"], record["step"], record["kind"]
    if not (isinstance(group, str) and isinstance(name, str) and type(step) is int):
        raise ValueError("no record of flowtrain")
    if kind == "Value":
        log.add(group, name, step, float(record["value"]), float(record["time"]))
    elif kind == "Settings":
        log.settings |= {each: text_of(value) for each, value in flat(dict(record["value"])).items()}
    else:
        log.others[kind] = log.others.get(kind, 0) + 1


def read_csv(path: Path, name: str) -> Log:
    """Return the log of a `CsvBackend`; see `read_jsonl`.

    Raises:
        OSError: The file cannot be read.
    """
    log, bad = Log(name), list[int]()
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(_whole_lines(file, bad))
        columns = next(rows, [])
        for cells in rows:
            try:
                group, step, *values = cells
                if len(cells) != len(columns):
                    raise ValueError("a cell is missing")
                found = [(column, float(cell)) for column, cell in zip(columns[2:], values, strict=True) if cell]
                number = int(step)
            except ValueError:
                bad.append(rows.line_num)
                continue
            for column, value in found:
                log.add(group, column, number, value)
    return log.finished(sorted(bad), "row")


def _whole_lines(file: Iterator[str], bad: list[int]) -> Iterator[str]:
    """Yield the lines of a file that have an end; note the number of one that has none."""
    for number, line in enumerate(file, 1):
        if line.endswith("\n"):
            yield line
        else:
            bad.append(number)


def read_tensorboard(path: Path, name: str) -> Log:
    """Return the values in an event file; see `read_jsonl`.

    Raises:
        LoggingError: TensorBoard is not installed.
        Exception: TensorBoard cannot read the file.
    """
    events = needed(
        "tensorboard.backend.event_processing.event_accumulator", "The report of an event file", "tensorboard"
    )
    everything = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    board = events.EventAccumulator(str(path), size_guidance=everything).Reload()
    log = Log(name)
    # A file in the folder of a phase ends with the name of that folder, and its tags leave out the phase.
    folder = unquote(path.parent.name) if path.name.endswith(f".{path.parent.name}") else ""
    for tag in board.Tags()["scalars"]:
        parts = tag.split("/", 2)
        if folder:
            group, short = f"{parts[0]}/{folder}", "/".join(parts[1:])
        elif tag.startswith(_COUNTED) and len(parts) == 3:
            group, short = "/".join(parts[:2]), parts[2]
        else:
            group, _, short = tag.rpartition("/")
        for event in board.Scalars(tag):
            log.add(group, short, event.step, event.value, event.wall_time)
    return log
