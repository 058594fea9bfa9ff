"""The report on lanes: how many events are done and wait, how long training waited for room, and what failed.

A lane counts in its `LaneCounts` while it works, and each number has one thread that counts it. A `Report` is a copy of
the numbers at one moment, for the user.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from flowtrain.errors import text_of

__all__ = ["LaneCounts", "LaneReport", "Outage", "PlaceReport", "Report", "Stall", "uncounted"]


_SHORT = 0.1
"""Seconds. Shorter waits for late writes, all together, are no problem that a user should know of."""


@dataclass
class Stall:
    """The waits of the training thread for a lane: for room for the events of one callback, or for what it writes.

    Attributes:
        count: The number of waits.
        seconds: The seconds of all waits together.
    """

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a wait."""
        self.count += 1
        self.seconds += seconds


@dataclass
class LaneCounts:
    """The counts of a lane beside those of its events.

    Attributes:
        dropped: How many events were dropped, by the name of the callback.
        skipped: How many events were not run because an earlier one had failed.
        stalls: The waits of the training thread for room, by the name of the callback.
        answers: The waits for what a callback writes with a lag, by its name and the names of those that read it.
        restarts: How often a batch was given out again because a worker was lost or did not answer.
        replays: How many events were run again to restore a state that was lost.
        local: How many events were run in this process because the cluster was lost.
        records: How many records were written.
        saved: How many events are in the last checkpoint, since they were not done in time.
        saved_bytes: How many bytes these take there.
        last_error: The last failure, as text; empty if there was none.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    stalls: dict[str, Stall] = field(default_factory=dict)
    answers: dict[tuple[str, tuple[str, ...]], Stall] = field(default_factory=dict)
    restarts: int = 0
    replays: int = 0
    local: int = 0
    records: int = 0
    saved: int = 0
    saved_bytes: int = 0
    last_error: str = ""

    def copy(self) -> LaneCounts:
        """Return a copy of the numbers, while other threads continue to count."""
        # No lock is held, since one thread alone adds to each number. The dicts are listed at once, because a dict that
        # grows cannot be iterated.
        stalls = {name: replace(stall) for name, stall in list(self.stalls.items())}
        answers = {names: replace(stall) for names, stall in list(self.answers.items())}
        return replace(self, dropped=Counter(dict(self.dropped)), stalls=stalls, answers=answers)

    def failed(self, failure: BaseException) -> str:
        """Keep a failure as text, and return the text."""
        self.last_error = text_of(failure)
        return self.last_error

    def stalled(self, callback: str, seconds: float) -> None:
        """Count a wait for room for an event of a callback."""
        # Only the training thread waits for room, so only that thread calls this.
        self.stalls.setdefault(callback, Stall()).add(seconds)

    def answered_late(self, callback: str, readers: tuple[str, ...], seconds: float) -> None:
        """Count a wait of the training thread for what a callback writes with a lag."""
        self.answers.setdefault((callback, readers), Stall()).add(seconds)


@dataclass(frozen=True)
class LaneReport:
    """The numbers of one lane at one moment.

    Attributes:
        lane: The name of the lane: the names of its callbacks, joined by ``+``.
        callbacks: The names of its callbacks.
        where: Where its handlers run: a thread, a process or the address of a scheduler, and the last worker.
        events: How many events the lane has taken.
        done: How many of them are done.
        bytes: How many bytes the pending events hold.
        retired: Whether a failure has taken the lane out of service.
        counts: Its further counts.
    """

    lane: str
    callbacks: tuple[str, ...]
    where: str
    events: int
    done: int
    bytes: int
    retired: bool
    counts: LaneCounts

    @property
    def pending(self) -> int:
        """How many events wait or are at work."""
        return self.events - self.done

    def troubles(self) -> Iterator[str]:
        """Yield a line for each problem that a user should know of."""
        counts = self.counts
        for name, stall in sorted(counts.stalls.items()):
            yield f"{name} made training wait {stall.seconds:.1f} s in all ({stall.count} times): its lane was full"
        for (name, readers), stall in sorted(counts.answers.items()):
            if stall.seconds < _SHORT:
                continue
            who = f"{', '.join(readers)} waited" if readers else "training waited"
            yield f"{who} {stall.seconds:.1f} s in all ({stall.count} times) for {name}, which had not finished"
        for name, count in sorted(counts.dropped.items()):
            yield f"{name}: {count:,} events dropped"
        if counts.restarts:
            yield f"{self.lane}: {counts.restarts:,} batches given out again, {counts.replays:,} events replayed"
        if counts.local:
            yield f"{self.lane}: the cluster was lost; {counts.local:,} events were run in this process"
        if counts.skipped:
            yield f"{self.lane}: {counts.skipped:,} events not run, because an earlier one had failed"
        if counts.saved:
            size = f"{counts.saved_bytes / 2**20:,.1f} MiB"
            yield f"{self.lane}: {counts.saved:,} events were not done in time and are in the checkpoint ({size})"
        if self.retired:
            yield f"{self.lane}: retired"
        if counts.last_error:
            yield f"{self.lane}: last error: {counts.last_error}"


@dataclass(frozen=True)
class PlaceReport:
    """Where the callbacks of one lane run under ``defer="auto"``, and why.

    Attributes:
        lane: The name of the lane.
        where: ``"in place"`` or ``"lane"``.
        why: The reason, with the measured times.
        in_place: The seconds of one event of the costliest handler in place; ``None`` if it is not known yet.
        handing_over: The seconds that one event costs training to be handed over, which are a snapshot and the queue;
            ``None`` if no event of the last race was.
    """

    lane: str
    where: str
    why: str
    in_place: float | None
    handing_over: float | None


@dataclass
class Outage:
    """A time in which the cluster was lost, and this process ran the events of its lanes.

    Attributes:
        address: The address of the scheduler.
        lost: When a lane noticed it, in seconds since 1970.
        why: The reason.
        back: When the cluster was back; ``None`` if it is not yet.
        refused: Why the cluster was back and not used; empty if it was not, or nothing was wrong.
    """

    address: str
    lost: float
    why: str
    back: float | None = None
    refused: str = ""

    def __str__(self) -> str:
        text = f"the cluster at {self.address} was lost at {_at(self.lost)} ({self.why})"
        if self.back is not None:
            return f"{text}, and was back at {_at(self.back)}"
        return f"{text}; it is back, and is not used: {self.refused}" if self.refused else f"{text}, and is not back"


def _at(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


_SHOWN = 3
"""How many times without the cluster are shown."""

_HEAD = ("lane", "where", "events", "done", "pending", "MiB", "dropped", "records")


@dataclass(frozen=True)
class Report:
    """The numbers of all lanes of an executor at one moment; ``print`` shows them as a table.

    Attributes:
        lanes: The numbers of each lane that has had an event.
        places: Where the callbacks of each lane run and why; empty unless cost decides (``defer="auto"``).
        outages: The times without the cluster. How many events this process ran in them is in ``counts.local`` of each
            lane.
    """

    lanes: tuple[LaneReport, ...] = ()
    places: tuple[PlaceReport, ...] = ()
    outages: tuple[Outage, ...] = ()

    @property
    def dropped(self) -> int:
        """How many events were dropped."""
        return sum(sum(lane.counts.dropped.values()) for lane in self.lanes)

    @property
    def pending(self) -> int:
        """How many events wait or are at work."""
        return sum(lane.pending for lane in self.lanes)

    @property
    def stalled(self) -> float:
        """For how many seconds the training thread has waited for room."""
        return sum(stall.seconds for lane in self.lanes for stall in lane.counts.stalls.values())

    def troubles(self) -> list[str]:
        """Return a line for each problem that a user should know of: waits, dropped events, restarts, errors."""
        earlier = len(self.outages) - _SHOWN
        lines = [f"the cluster was lost {earlier:,} times before"] if earlier > 0 else []
        lines += map(str, self.outages[-_SHOWN:])
        return [*lines, *(line for lane in self.lanes for line in lane.troubles())]

    def __str__(self) -> str:
        table = _table([_HEAD, *map(_row, self.lanes)]) if self.lanes else ["no deferred callbacks"]
        places = [f"  {each.lane}: {each.where}: {each.why}" for each in self.places]
        return "\n".join([*table, *places, *(f"  {line}" for line in self.troubles())])


def uncounted(troubles: Sequence[str]) -> list[str]:
    """Return lines of `Report.troubles` without their numbers, to tell a new problem from more of a known one."""
    return [re.sub(r"\d[\d,.]*", "", line) for line in troubles]


def _row(lane: LaneReport) -> tuple[str, ...]:
    counts = lane.counts
    numbers = lane.events, lane.done, lane.pending
    return (
        lane.lane,
        lane.where,
        *(f"{number:,}" for number in numbers),
        f"{lane.bytes / 2**20:,.1f}",
        f"{sum(counts.dropped.values()):,}",
        f"{counts.records:,}",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, with the first two columns aligned to the left and the numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
