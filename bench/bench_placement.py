"""The cost of ``executor="dask"`` where the executor decides by itself: cheap callbacks, and callbacks that wait.

Run ``python -m bench.bench_placement`` from the root of the checkout. ``--only`` chooses a part. The first epoch, in
which the executor measures, is not timed, except for short fits. The times are wall times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.bench_lanes import Batches, batches, cluster, epochs_in_turns, learner_of, width_of
from bench.pairs import Report, figure, median, seconds
from flowtrain import Access, BatchEnd, Callback, Learner, LearnerView, Phase, Read, TrainingPhase, on
from flowtrain.callbacks import LogMetrics
from flowtrain.graph.executor import Executor
from flowtrain.logging import JsonlBackend
from flowtrain_dask import DaskExecutor

SLEEP = 10e-3
STEP = 4e-3


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--only", choices=("cheap", "metrics", "waiting", "short"), help="one part of it")
    chosen = arguments.parse_args()
    command = "python -m bench.bench_placement" + (f" --only {chosen.only}" if chosen.only else "")
    report = Report("Placement", command, "as each line says", packages=("torch", "dask", "distributed"))
    for name, part in (("cheap", cheap), ("metrics", metrics), ("waiting", waiting), ("short", short)):
        if chosen.only in (None, name):
            part(report)


# --- callbacks that cost almost nothing


class Reads(Callback):
    """A deferrable callback that reads the loss."""

    deferrable = True
    stochastic = False

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.batch.loss  # noqa: B018  # the read is all that it does


def cheap(report: Report) -> None:
    """Compare cheap deferrable callbacks under the default executor of dask with the serial one."""
    data = batches(300)
    for count in (1, 8, 64, 256):
        made = [partial(_cheap, count, data, name) for name in ("serial", "dask")]
        # New learners in each round: two that are made alike differ in speed as long as they live.
        times = [row for _ in range(6) for row in epochs_in_turns(made, 10)]
        report.ratio(f"{count} deferrable callbacks that read the loss; floor: serial", times, 1.02, steps=1)


def _cheap(count: int, data: Batches, executor: str) -> Learner:
    return learner_of(16, data, [Reads() for _ in range(count)], executor)


def metrics(report: Report) -> None:
    """Compare `LogMetrics` at each batch under executors that decide by cost with the same in place."""
    width, data = width_of(1e-3), batches(300)
    with tempfile.TemporaryDirectory() as folder, cluster(1) as (address, _):

        def logged(name: str, executor: Callable[[], str | Executor]) -> Learner:
            return learner_of(width, data, (LogMetrics(JsonlBackend(Path(folder, f"{name}.jsonl"))),), executor())

        serial = partial(logged, "serial", lambda: "serial")
        ways: dict[str, Callable[[], str | Executor]] = {
            '`executor="dask"`': DaskExecutor,
            "a cluster": partial(DaskExecutor, address),
        }
        for number, (name, executor) in enumerate(ways.items()):
            times = epochs_in_turns([serial, partial(logged, str(number), executor)], 40)
            report.ratio(f"1 ms step, `LogMetrics` each batch, {name}; floor: serial", times, 1.02, steps=1)


# --- callbacks that wait


class Waits(Callback):
    """Waits as for a network."""

    stochastic = False

    def __init__(self, *, deferrable: bool) -> None:
        self.deferrable = deferrable

    @on(BatchEnd, TrainingPhase)
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(SLEEP)


WAYS: Sequence[tuple[str, bool, Callable[[], str | Executor], Callable[[float, float], float]]] = (
    ("in parallel; floor: the step and one sleep", False, DaskExecutor, lambda step, sleep: step + sleep),
    ('deferrable, `executor="dask"`; floor: the longer of step and sleep', True, DaskExecutor, max),
    ("deferred from the first event on; the same floor", True, partial(DaskExecutor, defer="always"), max),
)
"""What is compared, whether the callbacks are deferrable, the executor, and the floor from step and sleep."""


def sleeping(width: int, data: Batches, deferrable: bool, executor: Callable[[], str | Executor]) -> Learner:
    return learner_of(width, data, [Waits(deferrable=deferrable) for _ in range(4)], executor())


def waiting(report: Report) -> None:
    """Compare four callbacks that sleep with the least time that they can take."""
    width, data = width_of(STEP), batches(40)
    for what, deferrable, executor, floor in WAYS:
        made = [partial(learner_of, width, data, (), "serial"), partial(sleeping, width, data, deferrable, executor)]
        against_floor(report, f"4 ms step, four callbacks that sleep 10 ms, {what}", epochs_in_turns(made, 30), floor)


def short(report: Report) -> None:
    """Compare the same in the first fit of a new learner, of 20 steps, with what the process has measured before."""
    width, data = width_of(STEP), batches(20)

    def first_fit(make: Callable[[], Learner]) -> float:
        with make() as learner:
            return seconds(partial(learner.fit, 1)) / len(data)

    for what, deferrable, executor, floor in WAYS:
        made = [partial(learner_of, width, data, (), "serial"), partial(sleeping, width, data, deferrable, executor)]
        times = [tuple(map(first_fit, made)) for _ in range(31)][1:]
        against_floor(report, f"a first fit of 20 such steps with four such callbacks, {what}", times, floor)


def against_floor(
    report: Report, what: str, times: Sequence[tuple[float, ...]], floor: Callable[[float, float], float]
) -> None:
    bounds = [floor(step, SLEEP) for step, _ in times]
    found = figure([ours / bound for (_, ours), bound in zip(times, bounds, strict=True)])
    report.row(
        what, f"{statistics.median(bounds) * 1e6:.1f} µs", f"{median(times, 1) * 1e6:.1f} µs", found.text(), "1.10",
        reached=found.median <= 1.1,
    )  # fmt: skip


if __name__ == "__main__":
    main()
