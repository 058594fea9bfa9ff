"""Two logs of JSON lines, record for record: what one of them has lost, doubled, swapped or changed.

A record is known by its name, group, step and kind, of which a log has each combination once. Clock times do not count.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """How a log differs from the one that it should be.

    Attributes:
        records: How many it should have.
        lost: How many are missing.
        doubled: How many there are more than once, or should not be there at all.
        out_of_order: How many come after one that should come later.
        changed: How many have another value.
    """

    records: int = 0
    lost: int = 0
    doubled: int = 0
    out_of_order: int = 0
    changed: int = 0

    @property
    def equal(self) -> bool:
        """Whether there is none."""
        return not (self.lost or self.doubled or self.out_of_order or self.changed)


def compare(expected: Path, found: Path) -> Difference:
    """Compare two files."""
    wanted, got = _records(expected), _records(found)
    places = {key: place for place, (key, _) in enumerate(wanted)}
    if len(places) < len(wanted):
        raise ValueError(f"{expected} has a record twice, so it tells nothing about another log")
    counts = Counter(key for key, _ in got)
    values = dict(wanted)
    latest, out_of_order = -1, 0
    for key, _ in got:
        place = places.get(key, -1)
        out_of_order += 0 <= place < latest
        latest = max(latest, place)
    return Difference(
        len(wanted),
        sum(key not in counts for key in places),
        sum(count - (key in places) for key, count in counts.items()),
        out_of_order,
        sum(key in values and values[key] != value for key, value in got),
    )


def _records(path: Path) -> list[tuple[tuple[Any, ...], Any]]:
    with path.open(encoding="utf-8") as file:
        parsed = [json.loads(line) for line in file]
    return [((each["name"], each["group"], each["step"], each["kind"]), each["value"]) for each in parsed]
