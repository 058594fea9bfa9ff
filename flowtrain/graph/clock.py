"""The clock of a timeline: it times handlers, the parts of batches, and whatever else takes time in a fit.

Without a clock nothing is timed, and no line of the loop asks whether there is one: plans and runners are made
differently while there is a clock (`flowtrain.training.dispatch.Dispatch.time`). The clock only collects `Stamp`; a
thread of the timeline takes them out and writes them (`flowtrain.diagnostics.trace_file`).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import Phase
from flowtrain.data.loaders import END_OF_DATA
from flowtrain.graph.plan import Call, Plan, PlanKey, PlannedHandler

__all__ = ["HANDLER", "HAND_OVER", "IN_LANE", "Clock", "Mark", "Measured", "Stamp", "TimelineRow", "spanning"]

HANDLER: Final = "handler"
HAND_OVER: Final = "hand-over"
IN_LANE: Final = "deferred"
"""The kinds of the times of a handler: its call, the snapshot and queue if it is deferred, and its call in a lane."""

_KEPT = 1000
"""How many times are kept of each handler, the last ones: enough for a median, however long the fit."""

_Runner: TypeAlias = Callable[[Event, Phase], None]


@dataclass(frozen=True, eq=False, slots=True)
class Mark:
    """The name of what is timed, which many stamps share.

    Attributes:
        name: The name.
        kind: The category, such as ``"handler"``, ``"part"`` or ``"stall"``.
        args: Further values by name; those in a stamp come after them.
        seconds: The last times; empty for kinds of which no median is asked.
    """

    name: str
    kind: str
    args: Mapping[str, Any] = field(default_factory=dict)
    seconds: deque[float] | None = None


@dataclass(frozen=True, slots=True)
class TimelineRow:
    """A line of the timeline that is no thread of this process.

    Attributes:
        process: The process, as ``"worker tcp://10.0.0.7:41873"``; empty for this one.
        thread: The line within the process, as the name of a lane.
    """

    process: str
    thread: str


Stamp: TypeAlias = tuple[Mark, int, int, "int | TimelineRow", "Mapping[str, Any] | tuple[int, int] | None"]
"""What was timed, its begin and end in ns of `time.perf_counter_ns`, the thread or track, and further values.

The further values of a batch are a plain pair, the numbers of the epoch and of the batch: there is one in each step.
"""

_DATA = Mark("data", "part")
_FORWARD, _LOSS = Mark("forward", "part"), Mark("loss", "part")
_BACKWARD, _UPDATE = Mark("backward", "part"), Mark("update", "part")
_WHOLE_FORWARD = Mark("forward and loss", "part")  # a step of the user need not fire `LossBegin`

_PARTS: Mapping[type[Event], Mapping[type[Event] | None, Mark]] = {
    LossBegin: {BatchBegin: _FORWARD},
    BackwardBegin: {
        LossBegin: _LOSS,
        BatchBegin: _WHOLE_FORWARD,
        BackwardEnd: _WHOLE_FORWARD,
        UpdateEnd: _WHOLE_FORWARD,
    },
    BackwardEnd: {BackwardBegin: _BACKWARD},
    UpdateEnd: {UpdateBegin: _UPDATE},
    BatchEnd: {LossBegin: _LOSS, BatchBegin: _WHOLE_FORWARD},
}
"""The part of a batch that ends when an event begins, by that event and by the event after whose end it began."""

_BOUNDARIES = {*_PARTS, BatchBegin, BatchCancelled, UpdateBegin}


class Measured:
    """The times of handlers, by event type, phase type, name and kind. It stays when the clock has stopped."""

    def __init__(self) -> None:
        self._marks: dict[tuple[PlanKey, str, str], Mark] = {}

    def mark(self, key: PlanKey, label: str, kind: str) -> Mark:
        """Return the mark of a handler, which keeps its last times."""
        found = self._marks.get((key, label, kind))
        if found is None:
            event, phase = key
            args = {"event": event.__name__, "phase": phase.__name__}
            found = self._marks[key, label, kind] = Mark(label, kind, args, deque(maxlen=_KEPT))
        return found

    def median(self, plan: Plan, position: int, *kinds: str) -> float | None:
        """Return the median seconds of a handler, of the kind with the most times; ``None`` if it has no time."""
        found: list[tuple[float, ...]] = []
        for kind in kinds:
            mark = self._marks.get(((plan.event_type, plan.phase_type), plan.handlers[position].label, kind))
            if mark is not None and mark.seconds:
                found.append(tuple(mark.seconds))
        most = max(found, key=len, default=())
        return statistics.median(most) if most else None

    def count(self, plan: Plan) -> int:
        """Return how many of the last times there are of the handler of a plan that has the most."""
        key = plan.event_type, plan.phase_type
        counts = (len(mark.seconds or ()) for (one, _, _), mark in self._marks.items() if one == key)
        return max(counts, default=0)

    def of(self, plan: Plan) -> dict[int, float]:
        """Return the median seconds that each handler of a plan costs the event, by position."""
        found = ((at, self.median(plan, at, HANDLER, HAND_OVER)) for at in range(len(plan)))
        return {at: seconds for at, seconds in found if seconds is not None}


class Clock:
    """Collects the times of one fit.

    Args:
        place: Returns the numbers of the present epoch and batch.

    Attributes:
        stamps: The stamps that nobody has taken out yet, in the order in which they ended. Any thread appends.
        measured: The times of handlers.
    """

    def __init__(self, place: Callable[[], tuple[int, int]]) -> None:
        self.stamps: deque[Stamp] = deque()
        self.measured = Measured()
        self._place = place
        self._thread = threading.get_ident()
        self._last: type[Event] | None = None  # the last boundary of a part, and when it ended
        self._at = self._batch = self._epoch = 0

    def around(self, key: PlanKey, planned: PlannedHandler, call: Call) -> Call:
        """Return the call of a handler, which is timed."""
        return self.timed(self.measured.mark(key, planned.label, HANDLER), call)

    def hand_over(self, plan: Plan, position: int, call: Call) -> Call:
        """Return the call that hands an event of a handler over to its lane, which is timed."""
        key = plan.event_type, plan.phase_type
        return self.timed(self.measured.mark(key, plan.handlers[position].label, HAND_OVER), call)

    def timed(self, mark: Mark, call: Call) -> Call:
        """Return a call that leaves a stamp with a mark."""
        add, now, thread = self.stamps.append, time.perf_counter_ns, threading.get_ident

        def run(event: Event, phase: Phase, view: Any) -> None:
            """Call, and leave a stamp, whatever is raised."""
            begin = now()
            try:
                call(event, phase, view)
            finally:
                add((mark, begin, now(), thread(), None))

        return run

    def add(
        self,
        mark: Mark,
        begin: int,
        end: int,
        track: int | TimelineRow | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """Leave a stamp, by default on the line of the calling thread; times are in ns of `time.perf_counter_ns`."""
        self.stamps.append((mark, begin, end, threading.get_ident() if track is None else track, args))

    @contextmanager
    def span(self, name: str, kind: str, **args: Any) -> Generator[None]:
        """Give a context that is timed."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(Mark(name, kind, args), begin, time.perf_counter_ns())

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a loader, and time how long the loop waits for each."""
        source, now = iter(batches), time.perf_counter_ns
        held: list[Any] = []  # a variable would keep the memory of a batch while the next one is computed
        while True:
            begin = now()
            held.append(next(source, END_OF_DATA))
            self.add(_DATA, begin, now())
            if held[0] is END_OF_DATA:
                return
            yield held.pop()

    def runner(self, event_type: type[Event], phase_type: type[Phase], runner: _Runner | None) -> _Runner | None:
        """Return the runner of an event that also times what lies between this event and the one before.

        Args:
            event_type: The type of the event.
            phase_type: The type of the phase.
            runner: Runs the handlers; ``None`` if there are none.
        """
        if event_type in _BOUNDARIES:
            return self._boundary(event_type, phase_type, runner)
        if event_type is EpochBegin:
            return self._begin_epoch(runner)
        if event_type in (EpochEnd, EpochCancelled):
            return self._end_epoch(Mark(f"epoch of {phase_type.__name__}", "epoch"), runner)
        return runner

    def _boundary(self, event_type: type[Event], phase_type: type[Phase], runner: _Runner | None) -> _Runner:
        """Return the runner of an event between two parts of a batch, which are on the thread that made this clock."""
        add, now, thread, parts = self.stamps.append, time.perf_counter_ns, self._thread, _PARTS.get(event_type, {})
        begins, ends = event_type is BatchBegin, event_type in (BatchEnd, BatchCancelled)
        cancelled = {"cancelled": True} if event_type is BatchCancelled else {}
        batch = Mark("batch", "batch", {"phase": phase_type.__name__, **cancelled})

        def bound(event: Event, phase: Phase) -> None:
            """End the part before this event, and begin the next one: no handler takes time between them."""
            at = now()
            if (mark := parts.get(self._last)) is not None:
                add((mark, self._at, at, thread, None))
            self._last, self._at = event_type, now()  # later than `at`: viewers round, and parts must not overlap

        def run(event: Event, phase: Phase) -> None:
            """End the part before this event, run the handlers, and begin the next part."""
            begin = now()
            if (mark := parts.get(self._last)) is not None:
                add((mark, self._at, begin, thread, None))
            if begins:
                self._batch = begin
            try:
                if runner is not None:
                    runner(event, phase)
            finally:
                self._last, self._at = event_type, now()
                if ends:
                    add((batch, self._batch, self._at, thread, self._place()))

        return bound if runner is None and not begins and not ends else run

    def _begin_epoch(self, runner: _Runner | None) -> _Runner:
        def run(event: Event, phase: Phase) -> None:
            """Begin an epoch, and run the handlers."""
            self._epoch = time.perf_counter_ns()
            if runner is not None:
                runner(event, phase)

        return run

    def _end_epoch(self, mark: Mark, runner: _Runner | None) -> _Runner:
        def run(event: Event, phase: Phase) -> None:
            """Run the handlers, and end the epoch."""
            try:
                if runner is not None:
                    runner(event, phase)
            finally:
                self.add(mark, self._epoch, time.perf_counter_ns(), args={"epoch": self._place()[0]})

        return run


@contextmanager
def spanning(clock: Clock | None, name: str, kind: str, **args: Any) -> Generator[None]:
    """Give a context that is timed if there is a clock."""
    if clock is None:
        yield
        return
    with clock.span(name, kind, **args):
        yield
