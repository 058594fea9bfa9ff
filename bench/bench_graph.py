"""The time to build the callbacks of a learner, and its growth with their number.

Each callback handles 3 events, in training and validation, and declares 3 of 30 shared paths. All callbacks use one of
the paths; each path has one writer, which comes after its readers in the list and must be ordered before them.

The floor is the work that no implementation can avoid: making the same callbacks, and reading and normalising their
declarations. Run ``python -m bench.bench_graph`` from the root of the checkout.
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
"""The number of callbacks of the goal, and the most seconds that building them may take."""


class Reader(Callback):
    """A callback with three handlers, which reads the path that all callbacks use and two others."""

    def __init__(self, number: int) -> None:
        self.number = number

    def paths(self) -> set[str]:
        """Return the paths that the callback uses."""
        return {f"cbstate.path{number % PATHS}" for number in (0, self.number, 7 * self.number + 1)}

    def state_access(self) -> Access:
        """Declare a read of each path."""
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
    """Writes the path with its number, and reads the path that all callbacks use."""

    def state_access(self) -> Access:
        """Declare the read and the write."""
        return {"cbstate.path0": Read(), f"cbstate.path{self.number}": Write()}

    def setup(self, learner: LearnerView) -> None:
        """Make the entry of its path."""
        setattr(learner.cbstate, f"path{self.number}", 0)


def callbacks(count: int) -> list[Reader]:
    """Make the callbacks, the writers last."""
    return [*(Reader(number) for number in range(PATHS, count)), *(Writer(number) for number in range(PATHS))]


def declared(count: int) -> int:
    """Make the callbacks and read their declarations, which is the floor; return the number of paths."""
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
