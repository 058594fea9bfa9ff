"""The cost of snapshots for deferred callbacks, and of checkpoints, on the training thread.

The floor of a large snapshot and of a checkpoint is a copy of the same tensors into existing buffers. The floor of a
small snapshot, such as a logger of metrics needs at each batch, is an empty loop. The floor of a checkpoint with long
histories is one with short ones. Run ``python -m bench.bench_snapshots`` from the root of
the checkout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bench.pairs import REPETITIONS, Report, differences, in_turns
from flowtrain import Access, Learner, Read, TrainingPhase
from flowtrain.callback.access import declare
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.encoding import Buffers, Packer
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.parameters import Parameters
from flowtrain.state.series import SeriesMap
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint.contents import gather
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.taker import Taker

TENSORS = 300
BYTES = 100_000_000
CALLS = 2000

LARGE: Access = {"params": Read()}
LOSS: Access = {"batch.loss": Read(), "cbstate.history": Read()}
METRICS: Access = {"cbstate.history": Read(), "cbstate.metrics_step": Read()}


def main() -> None:
    """Print the table."""
    report = Report(
        "Snapshots",
        "python -m bench.bench_snapshots",
        "the same copied into buffers that are there already; for small ones an empty loop",
    )
    large(report, "100 MB in 300 tensors")
    for name, access, tail in (
        ("loss and counters", LOSS, False),
        ("counters and 4 series of 100,000 values", METRICS, False),
        ("the same for another process", METRICS, True),
    ):
        small(report, name, access, tail)
    checkpoint(report, "a checkpoint of 100 MB in 300 tensors, without its writing")
    histories(report, "a checkpoint with 2 series of 1,000,000 values, against 1,000; 100 new values each")


def large(report: Report, name: str) -> None:
    """Time a snapshot of 100 MB in 300 tensors. Each is released before the next, as in a lane that keeps up."""
    state = LearnerState()
    rows = BYTES // TENSORS // 4 // 64
    model = nn.ParameterDict({f"p{number}": nn.Parameter(torch.randn(rows, 64)) for number in range(TENSORS)})
    state.model, state.params = model, Parameters({"": model})
    sources = [parameter.detach() for parameter in model.parameters()]
    buffers = [torch.empty_like(source) for source in sources]
    taker = Taker(declare(LARGE, "bench"), state, Pool(4 * BYTES), tail=False)

    def floor() -> None:
        """Copy into existing buffers."""
        for buffer, source in zip(buffers, sources, strict=True):
            buffer.copy_(source)

    times = in_turns([floor, taker.take], REPETITIONS)
    report.ratio(name, times, 1.3, steps=1)


def checkpoint(report: Report, name: str) -> None:
    """Time the copy of the state for a checkpoint. It is released before the next, as when it has been written."""
    rows = BYTES // TENSORS // 4 // 64
    model = nn.ParameterDict({f"p{number}": nn.Parameter(torch.randn(rows, 64)) for number in range(TENSORS)})
    learner = tiny_learner(model=model)
    sources = [parameter.detach() for parameter in model.parameters()]
    buffers = [torch.empty_like(source) for source in sources]

    def floor() -> None:
        """Copy into existing buffers."""
        for buffer, source in zip(buffers, sources, strict=True):
            buffer.copy_(source)

    report.ratio(name, in_turns([floor, taken(learner)], REPETITIONS), 1.3, steps=1)


def histories(report: Report, name: str) -> None:
    """Time the copy of the state of a learner that has trained for long, and of one that has not."""

    def grown(count: int) -> Callable[[], None]:
        """Return a function that adds values to long series and takes a checkpoint."""
        learner = tiny_learner()
        series = learner.cbstate.metrics_step[TrainingPhase()]
        take = taken(learner)

        def add(start: int, end: int) -> None:
            """Record two values for each batch."""
            for step in range(start, end):
                series.push("Loss", 0.5, step)
                series.push("Accuracy", 0.5, step)

        def run() -> None:
            """Record values of 100 batches, and take a checkpoint."""
            add(0, 100)
            take()

        add(0, count)
        return run

    report.ratio(name, in_turns([grown(1_000), grown(1_000_000)], REPETITIONS), 1.3, steps=1)


def taken(learner: Learner) -> Callable[[], None]:
    """Return a function that copies the state of a learner for a checkpoint."""
    loop = learner.loop
    changes, buffers = loop.checkpoints.changes, Buffers()

    def take() -> None:
        """Copy the state as when the checkpoint before has been written."""
        buffers.begin()
        gather(loop.state, loop.core, changes, Packer([], buffers))

    return take


def small(report: Report, name: str, access: Access, tail: bool) -> None:
    """Time a snapshot of the state that a logger of metrics reads."""
    state = LearnerState()
    state.batch = state.batch_twin = BatchState()
    state.batch.loss = torch.tensor(0.5)
    phase = TrainingPhase()
    state.cbstate.history = CountsMap("cbstate.history")
    state.cbstate.history[phase] = Counts((1, 2, 3, 4))
    state.cbstate.metrics_step = PhaseMap("cbstate.metrics_step", lambda: SeriesMap("cbstate.metrics_step"))
    for metric in ("Loss", "accuracy", "top5", "recall"):
        for step in range(100_000):
            state.cbstate.metrics_step[phase].push(metric, 0.5, step)
    taker = Taker(declare(access, "bench"), state, Pool(1 << 20), tail=tail)
    taker.take()

    def take() -> None:
        """Take snapshots, and release each at once."""
        for _ in range(CALLS):
            taker.take()

    def floor() -> None:
        """Run the loop without snapshots."""
        for _ in range(CALLS):
            pass

    times = in_turns([floor, take], REPETITIONS)
    found = differences(times, calls=CALLS)
    report.row(name, "0.0 µs", f"{found.median * 1e6:.1f} µs", f"{found.text(1e6, 2)} µs")


if __name__ == "__main__":
    main()
