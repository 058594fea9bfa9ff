"""The cost of a handler: of its call, of access to protected state, and of a callback without a handler for an event.

Run ``python -m bench.bench_handlers`` from the root of the checkout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from bench.pairs import PROCESSOR, Figure, Report, differences, figure, in_turns, median
from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    Write,
    on,
)

COUNTS = (0, 64, 128, 192, 256)
EVENTS = 100
"""The number of events in one timing."""
CALLS = 2000
"""The number of calls of one handler in one timing."""
REPETITIONS = 200
"""The number of timings, which are many because each is short."""

PHASE = TrainingPhase()


class NoOp(Callback):
    """Handles the end of a batch and does nothing."""

    @on(BatchEnd)
    def nothing(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        pass


class Elsewhere(Callback):
    """Has no handler for the end of a batch."""

    @on(FitEnd)
    def nothing(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        pass


class Keeps(Callback):
    """Reads the loss of the batch and writes it to an entry of ``cbstate``."""

    def state_access(self) -> Access:
        """Declare the read and the write."""
        return {"batch.loss": Read(), "cbstate.kept": Write()}

    @on(BatchEnd)
    def keep(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.kept = learner.batch.loss


def main() -> None:
    report = Report(
        "Handlers", "python -m bench.bench_handlers", "the same handlers called by hand, as each line says", PROCESSOR
    )
    call_cost(report)
    protection_cost(report)
    absence_cost(report)


def call_cost(report: Report) -> None:
    """Compare 0 to 256 no-op handlers with a hand-written loop over the same bound methods, by the slopes."""
    by_hand = [calling([NoOp().nothing for _ in range(count)]) for count in COUNTS]
    fired = [firing(*(NoOp() for _ in range(count))) for count in COUNTS]
    times = in_turns([*by_hand, *fired], REPETITIONS, clock=PROCESSOR)
    half = len(COUNTS)
    floor = figure([slope([seconds / EVENTS for seconds in row[:half]]) for row in times])
    ours = figure([slope([seconds / EVENTS for seconds in row[half:]]) for row in times])
    report.row(
        f"a no-op handler, slope over {COUNTS[0]} to {COUNTS[-1]}; floor: `for handler in handlers: handler(...)`",
        nanoseconds(floor),
        nanoseconds(ours),
        nanoseconds(ours),
        "60 ns",
        reached=ours.median <= 60e-9,
    )


def protection_cost(report: Report) -> None:
    """Compare a handler that reads and writes state on its protected view with the same on two unprotected objects."""
    learner = learner_with(Keeps())
    learner.step(PHASE, raw())
    (planned,) = learner.callbacks.plan(BatchEnd, TrainingPhase).handlers
    plain = SimpleNamespace(batch=SimpleNamespace(loss=learner.batch.loss), cbstate=SimpleNamespace(kept=None))
    event = BatchEnd()

    def handling(learner: Any) -> Callable[[], None]:
        def run() -> None:
            handler = planned.call
            for _ in range(CALLS):
                handler(event, PHASE, learner)

        return run

    times = in_turns([handling(plain), handling(learner.state), handling(planned.view)], REPETITIONS, clock=PROCESSOR)
    for which, floor in ((0, "plain objects"), (1, "the learner's state, unprotected")):
        more = differences(times, 2, which, CALLS)
        report.row(
            f"`learner.cbstate.kept = learner.batch.loss`; floor: on {floor}",
            f"{median(times, which) / CALLS * 1e9:.0f} ns",
            f"{median(times, 2) / CALLS * 1e9:.0f} ns",
            f"{nanoseconds(more)} more",
            "250 ns more",
            reached=more.median <= 250e-9,
        )


def absence_cost(report: Report) -> None:
    """Time an event with one other handler, and one without, beside 256 callbacks that do not handle the event."""
    for what, others in (("one other handler", [NoOp]), ("no handler", [])):
        without = firing(*(kind() for kind in others))
        beside = firing(*(kind() for kind in others), *(Elsewhere() for _ in range(COUNTS[-1])))
        times = in_turns([without, beside], REPETITIONS, clock=PROCESSOR)
        each = differences(times, calls=EVENTS * COUNTS[-1])
        report.row(
            f"a callback without a handler for an event that has {what}; floor: without the callback",
            f"{median(times, 0) / EVENTS * 1e9:.0f} ns",
            f"{median(times, 1) / EVENTS * 1e9:.0f} ns",
            f"{nanoseconds(each, 2)} each",
            "nothing",
            reached=each.low <= 0.05e-9,  # the clock resolves no less; tests/test_costs.py proves that there is no call
        )


def learner_with(*callbacks: Callback) -> Learner:
    model = torch.nn.Linear(2, 2)
    return Learner(model, torch.nn.functional.mse_loss, callbacks=callbacks, default_callbacks=False)


def raw() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(3, 2), torch.ones(3, 2)


def calling(handlers: Sequence[Callable[[Any, Any, Any], None]]) -> Callable[[], None]:
    """Return a function that calls the handlers in a hand-written loop."""
    event, state = BatchEnd(), object()

    def run() -> None:
        for _ in range(EVENTS):
            for handler in handlers:
                handler(event, PHASE, state)

    return run


def firing(*callbacks: Callback) -> Callable[[], None]:
    """Return a function that fires the end of a batch as the loop does: it calls the runner, if there is one."""
    runner = learner_with(*callbacks).loop.dispatch.runner(BatchEnd, TrainingPhase)
    event = BatchEnd()

    def run() -> None:
        for _ in range(EVENTS):
            if runner is not None:
                runner(event, PHASE)

    return run


def slope(seconds: Sequence[float]) -> float:
    """Return the least-squares slope of seconds over `COUNTS`."""
    mean_count, mean = sum(COUNTS) / len(COUNTS), sum(seconds) / len(seconds)
    above = sum((count - mean_count) * (value - mean) for count, value in zip(COUNTS, seconds, strict=True))
    return above / sum((count - mean_count) ** 2 for count in COUNTS)


def nanoseconds(found: Figure, digits: int = 1) -> str:
    return f"{found.text(1e9, digits)} ns"


if __name__ == "__main__":
    main()
