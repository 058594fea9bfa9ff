"""The cost of a timeline: a fit with one beside the same fit without, for steps of about 1 and 5 ms.

Run ``python -m bench.bench_timeline`` from the root of the checkout. The times are wall times of whole fits, with the
file that is opened and closed. The callbacks are the default ones that do not print, and 8 further ones.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.bench_lanes import Batches, batches, learner_of, width_of
from bench.pairs import Report, in_turns_afresh
from flowtrain import BatchEnd, Callback, Learner, LearnerView, Phase, TrainingPhase, on

STEPS = 300


class Nothing(Callback):
    """Has a handler that does nothing."""

    @on(BatchEnd, TrainingPhase)
    def nothing(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        pass


def main() -> None:
    report = Report("Timeline", "python -m bench.bench_timeline", "wall times of whole fits", packages=("torch",))
    data = batches(STEPS)
    with tempfile.TemporaryDirectory() as folder:
        number = itertools.count()

        def plain(width: int) -> Callable[[], object]:
            return partial(_learner(width, data).fit, 1)

        def timed(width: int) -> Callable[[], object]:
            learner = _learner(width, data)
            return lambda: learner.fit(1, timeline=Path(folder, f"{next(number)}.json"))

        for step in (1e-3, 5e-3):
            width = width_of(step)
            times = in_turns_afresh([partial(plain, width), partial(timed, width)], rounds=5, repetitions=8)
            report.ratio(f"a step of about {step * 1e3:g} ms; floor: without a timeline", times, 1.02, steps=STEPS)


def _learner(width: int, data: Batches) -> Learner:
    return learner_of(width, data, [Nothing() for _ in range(8)], "serial")


if __name__ == "__main__":
    main()
