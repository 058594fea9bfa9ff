"""How the time to build the callbacks of a learner grows with their number.

Each callback handles 3 events, in training and validation, and declares 3 of 30 shared paths. One path is used by all
of them; each path has one writer, which stands behind its readers in the list and must be moved before them.

The floor is what cannot be left out: making the same callbacks, asking each for its declaration, and bringing that
into normal form. ``python -m bench.bench_graph`` from the root of the checkout.
"""

from __future__ import annotations

import sys
from functools import partial

from bench.pairs import Report, in_turns, median, ratios
from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.access import declare
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState

PATHS = 30
COUNTS = (125, 250, 500, 1000, 2000)
GOAL = (1000, 2.0)
"""So many callbacks in so many seconds."""


class Reader(Callback):
    """A callback with three handlers: reads the path of all and two more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def paths(self) -> set[str]:
        """Return what it uses of the shared state."""
        return {f"cbstate.path{number % PATHS}" for number in (0, self.number, 7 * self.number + 1)}

    def state_access(self) -> Access:
        return dict.fromkeys(self.paths(), Read())

    @on(BatchBegin)
    def begin(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Do nothing."""

    @on(BatchEnd)
    def end(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Do nothing."""

    @on(EpochEnd)
    def epoch(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Do nothing."""


class Writer(Reader):
    """Writes the path of its number, makes it in `setup`, and reads the path of all."""

    def state_access(self) -> Access:
        return {"cbstate.path0": Read(), f"cbstate.path{self.number}": Write()}

    def setup(self, learner: LearnerView) -> None:
        setattr(learner.cbstate, f"path{self.number}", 0)


def callbacks(count: int) -> list[Reader]:
    """Make the callbacks, the writers last."""
    return [*(Reader(number) for number in range(PATHS, count)), *(Writer(number) for number in range(PATHS))]


def declared(count: int) -> int:
    """The floor: make the callbacks and read their declarations; return the number of paths."""
    return sum(len(declare(callback.state_access(), "bench")) for callback in callbacks(count))


def built(count: int) -> Callbacks:
    """Make the callbacks and build them, checked, ordered and set up."""
    return Callbacks(callbacks(count), LearnerState(), [TrainingPhase, ValidationPhase])


def main() -> int:
    """Measure and print; return 1 if the goal is missed."""
    report = Report(
        "Building callbacks", "python -m bench.bench_graph", "making the same callbacks and reading their declarations"
    )
    before, reached = 0.0, True
    for count in COUNTS:
        times = in_turns([partial(declared, count), partial(built, count)], 30)
        taken = median(times, 1)
        edges = len(built(count).plan(BatchEnd, TrainingPhase).edges)
        held = taken <= GOAL[1] if count == GOAL[0] else None
        reached = reached and held is not False
        growth = f", x{taken / before:.2f} for twice as many" if before else ""
        report.row(
            f"{count} callbacks, {edges} edges an event{growth}",
            f"{median(times, 0) * 1e3:.1f} ms",
            f"{taken * 1e3:.1f} ms",
            ratios(times).text(digits=1),
            "" if held is None else f"{GOAL[1]:.0f} s",
            reached=held,
        )
        before = taken
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
