"""The events of a trace file: read strictly, by the rules of the format, and checked for their order."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Slice:
    """A complete event of a trace, with times in us."""

    name: str
    kind: str
    process: str
    thread: str
    begin: float
    end: float
    args: dict[str, Any]

    def within(self, other: Slice) -> bool:
        return other.begin <= self.begin and self.end <= other.end


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a whole file, each with the fields that the format asks for."""
    events: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    for event in events:
        assert event["ph"] in ("X", "M", "i"), event
        assert (type(event["pid"]), type(event["name"])) == (int, str), event
        if event["ph"] == "X":
            assert isinstance(event["tid"], int), event
            assert min(event["ts"], event["dur"]) >= 0, event
    return events


def slices_of(path: Path) -> list[Slice]:
    """Return the complete events of a whole file, in the order in which they began."""
    events = events_of(path)
    named = [event for event in events if event["ph"] == "M"]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    threads = {(event["pid"], event["tid"]): event["args"]["name"] for event in named if event["name"] == "thread_name"}
    found = [
        Slice(
            event["name"],
            event["cat"],
            processes[event["pid"]],
            threads[event["pid"], event["tid"]],
            event["ts"],
            round(event["ts"] + event["dur"], 3),  # the format has three decimals
            event["args"],
        )
        for event in events
        if event["ph"] == "X"
    ]
    return sorted(found, key=lambda one: (one.begin, -one.end))


def check_nested(slices: Iterable[Slice]) -> None:
    """Check that of two slices on one line one contains the other, or they do not overlap: viewers need that."""
    lines: dict[tuple[str, str], list[Slice]] = defaultdict(list)
    for one in slices:
        line = lines[one.process, one.thread]
        while line and line[-1].end <= one.begin:
            line.pop()
        assert not line or one.end <= line[-1].end + 0.002, (one, line[-1])  # both are rounded
        line.append(one)


def names(slices: Sequence[Slice], kind: str) -> list[str]:
    return [one.name for one in slices if one.kind == kind]
