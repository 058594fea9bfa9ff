"""What an executor tells about its lanes: how much went through, what waits, who made training wait, what went wrong.

`Tally` is counted up by a lane while it works, each number by one thread only; `Report` is what a user gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["LaneReport", "Report", "Stall", "Tally"]


@dataclass
class Stall:
    """How often and for how long the training thread waited for room in a lane.

    Attributes:
        count: How often.
        seconds: For how long in all.
    """

    count: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """What a lane counts besides its events.

    Attributes:
        dropped: The events that were dropped, by callback.
        skipped: The events that were not run because an earlier one had failed.
        stalls: Who made the training thread wait, by callback.
        restarts: How often a batch was given out again: a worker was lost, or did not answer.
        replays: How many events were run again to get back a state that was lost.
        local: How many events were run in this process because the cluster was lost.
        records: The records that were written.
        last_error: The last failure, as text; empty if there was none.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    stalls: dict[str, Stall] = field(default_factory=dict)
    restarts: int = 0
    replays: int = 0
    local: int = 0
    records: int = 0
    last_error: str = ""

    def copy(self) -> Tally:
        """Return the numbers of this moment, while other threads go on counting."""
        stalls = {name: replace(stall) for name, stall in list(self.stalls.items())}
        return replace(self, dropped=Counter(dict(self.dropped)), stalls=stalls)

    def stalled(self, callback: str, seconds: float) -> None:
        """Count that a callback's event waited for room."""
        stall = self.stalls.setdefault(callback, Stall())
        stall.count += 1
        stall.seconds += seconds


@dataclass(frozen=True)
class LaneReport:
    """One lane at one moment.

    Attributes:
        lane: Its name.
        callbacks: The names of its callbacks.
        where: Where its handlers run.
        events: The events that it took.
        done: Those that are done with.
        bytes: What the waiting ones hold.
        retired: Whether it was taken out of service by a failure.
        tally: What else it counted.
    """

    lane: str
    callbacks: tuple[str, ...]
    where: str
    events: int
    done: int
    bytes: int
    retired: bool
    tally: Tally

    @property
    def pending(self) -> int:
        """How many events wait or are at work."""
        return self.events - self.done

    def troubles(self) -> Iterator[str]:
        """Yield a line for each thing that a user should know of."""
        tally = self.tally
        for name, stall in sorted(tally.stalls.items()):
            yield f"{name} made training wait {stall.seconds:.1f} s in all ({stall.count} times): its lane was full"
        for name, count in sorted(tally.dropped.items()):
            yield f"{name}: {count:,} events dropped"
        if tally.restarts:
            yield f"{self.lane}: {tally.restarts:,} batches given out again, {tally.replays:,} events replayed"
        if tally.local:
            yield f"{self.lane}: the cluster was lost; {tally.local:,} events were run in this process"
        if tally.skipped:
            yield f"{self.lane}: {tally.skipped:,} events not run, because an earlier one had failed"
        if self.retired:
            yield f"{self.lane}: retired"
        if tally.last_error:
            yield f"{self.lane}: last error: {tally.last_error}"


_HEAD = ("lane", "where", "events", "done", "pending", "MiB", "dropped", "records")


@dataclass(frozen=True)
class Report:
    """What the lanes of an executor did so far; ``print`` shows a table.

    Attributes:
        lanes: One for each lane.
    """

    lanes: tuple[LaneReport, ...] = ()

    @property
    def dropped(self) -> int:
        """How many events were dropped."""
        return sum(sum(lane.tally.dropped.values()) for lane in self.lanes)

    @property
    def pending(self) -> int:
        """How many events wait or are at work."""
        return sum(lane.pending for lane in self.lanes)

    @property
    def stalled(self) -> float:
        """For how many seconds the training thread waited for room."""
        return sum(stall.seconds for lane in self.lanes for stall in lane.tally.stalls.values())

    def troubles(self) -> list[str]:
        """Return a line for each thing that a user should know of: waiting, drops, restarts, errors."""
        return [line for lane in self.lanes for line in lane.troubles()]

    def __str__(self) -> str:
        if not self.lanes:
            return "no deferred callbacks"
        rows = [_row(lane) for lane in self.lanes]
        return "\n".join([*_table([_HEAD, *rows]), *(f"  {line}" for line in self.troubles())])


def _row(lane: LaneReport) -> tuple[str, ...]:
    tally = lane.tally
    numbers = lane.events, lane.done, lane.pending
    return (
        lane.lane,
        lane.where,
        *(f"{number:,}" for number in numbers),
        f"{lane.bytes / 2**20:,.1f}",
        f"{sum(tally.dropped.values()):,}",
        f"{tally.records:,}",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines with the cells below each other: the first two columns to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
