"""Deferred callbacks end to end: the log and the callbacks' state are the serial ones, wherever they run.

Rules 20 to 23, 25 and 26, with the bundled callbacks that can be deferred and with drawn ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle  # type: ignore[import-untyped]  # it has no annotations
import psutil  # type: ignore[import-untyped]  # dask has it; without annotations
import pytest
import torch

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    ExecutorError,
    Learner,
    LearnerView,
    Phase,
    Read,
    Resolution,
    RunFirst,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import (
    LearningRate,
    LogHistograms,
    LogHyperParams,
    LogMetrics,
    LogTraces,
    LogVisualization,
    Metrics,
    Scheduler,
    Traces,
    one_cycle,
    throttle,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.logging import Image, JsonlBackend
from flowtrain.logging.backend import Run
from flowtrain.logging.records import Identity, identity
from flowtrain.metrics import accuracy
from flowtrain.testing import assert_equivalent, tiny_learner
from flowtrain_dask import DaskExecutor, Limits
from flowtrain_dask.cluster.block import possible
from flowtrain_dask.deferred.preparing import Defer
from flowtrain_dask.lanes.limits import WhenFull
from flowtrain_dask.lanes.report import Report
from flowtrain_dask.lanes.threads import MOST_THREADS
from tests.support.waiting import wait_for

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class Memory(JsonlBackend):
    """Keeps the lines that the file would get, without their clock time."""

    def __init__(self, name: str = "log") -> None:
        super().__init__(f"/memory/{name}")
        self.records: list[dict[str, Any]] = []

    def open(self, run: Run) -> None: ...

    def write(self, record: bytes) -> None:
        line = json.loads(record.lstrip(b"\0").split(b"\n")[0])
        del line["time"]
        self.records.append(line)

    def flush(self) -> int:
        return len(self.records)

    def restore(self, position: Any) -> None:
        del self.records[position:]

    def close(self) -> None: ...


class Sums(Callback):
    """Keeps a state that depends on every event and their order; grows a list, a dict and a tensor."""

    deferrable = True

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.by_phase: dict[str, int] = {}
        self.mean = torch.zeros(3)

    def state_access(self) -> Access:
        return {"batch.outputs": Read(), "batch.loss": Read(), "cbstate.history": Read()}

    @on(BatchEnd)
    def sum_up(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.mean = 0.9 * self.mean + 0.1 * learner.batch.outputs.mean(0)
        self.seen.append(float(learner.batch.loss) + learner.cbstate.history[phase].steps)
        self.by_phase[repr(phase)] = self.by_phase.get(repr(phase), 0) + 1


class Wrecker(torch.nn.Module):
    """Works in place wherever it can: on its inputs, on its activations, on a buffer that it gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.act = torch.nn.ReLU(inplace=True)
        self.last = torch.nn.Linear(8, 3)
        self.out = torch.zeros(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        y: torch.Tensor = self.last(self.act(self.first(x)))
        if not torch.is_grad_enabled():
            self.out.copy_(y)
            return self.out
        return y


class Reusing:
    """A loader that gives out one pair of tensors again and again, filled anew."""

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        inputs, targets = torch.empty(6, 4), torch.empty(6, dtype=torch.long)
        for _ in range(self.length):
            inputs.normal_(generator=generator)
            targets.random_(0, 3, generator=generator)
            yield inputs, targets


def picture(learner: LearnerView) -> Any:
    return {"in": Image(learner.batch.inputs), "wrong": Image(learner.batch.outputs.sigmoid())}


def mean_output(learner: LearnerView) -> torch.Tensor:
    result: torch.Tensor = learner.batch.outputs.mean()
    return result


def loggers() -> list[Callback]:
    """All bundled deferrable callbacks: three on one backend, the others each with their own."""
    shared = Memory()
    return [
        LogMetrics(shared),
        LogHistograms(shared, every=2, gradients=True, bins=4),
        throttle(LogMetrics(Memory("seldom")), BatchEnd, every=3),
        LogVisualization(picture, Memory("pictures"), every=2),
        LogVisualization(picture, shared, every=1, event_type=EpochEnd, phase_type=ValidationPhase),
        LogTraces(Memory("traces")),
        LogHyperParams(Memory("settings"), settings={"a": 1}),
        Sums(),
    ]


def learner_of(executor: Executor, callbacks: Callable[[], Sequence[Callback]] = loggers) -> Learner:
    return Learner(
        Wrecker(),
        torch.nn.functional.cross_entropy,
        data=(Reusing(1, 5), Reusing(2, 3)),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[
            Metrics(accuracy),
            Traces({"Mean": mean_output}, TrainingPhase),
            Scheduler({LearningRate: one_cycle(0.1, length=40)}),
            *callbacks(),
        ],
        default_callbacks="quiet",
        executor=executor,
        core=TorchCore(device="cpu", clip_grad_norm=0.1),
    )


def fit_twice(learner: Learner) -> None:
    learner.fit(1)
    learner.fit(steps=7, validate_every=3)


def by_hand(learner: Learner) -> None:
    """Everything that runs batches outside of a fit."""
    learner.epoch(TrainingPhase)
    learner.flush()
    learner.validate()
    learner.step(ValidationPhase, next(iter(Reusing(3, 1))))
    learner.step(TrainingPhase, next(iter(Reusing(4, 1))))


def change_callbacks(learner: Learner) -> None:
    """Callbacks come and go between fits, on backends that stay; what was seen is not seen again."""
    learner.fit(1)
    late = Sums()
    late.name = "late"
    learner.add_callback(late)
    learner.fit(1)
    histograms = learner.remove_callback(LogHistograms)
    learner.epoch(TrainingPhase)
    learner.replace_callback(LogTraces(Memory("other traces")))
    learner.add_callback(histograms)
    learner.fit(1)


RUNS = [fit_twice, by_hand, change_callbacks]


@pytest.mark.cpu_only("the model and a callback hold tensors of the CPU")
@pytest.mark.parametrize("run", RUNS)
def test_threads_give_the_serial_log_and_state(run: Callable[[Learner], None]) -> None:
    """Rules 13, 20 to 23 and 26."""
    defers: tuple[Defer, ...] = ("auto", "always", "never")
    ways: list[Callable[[], Executor]] = [partial(DaskExecutor, defer=defer) for defer in defers]
    ways.append(partial(DaskExecutor, defer="always", parallel="always", workers=3))
    assert_equivalent(learner_of, executors=ways, run=run, interleavings=2)


def test_processes_give_the_serial_log_and_state(dask_processes: Any) -> None:
    """Rules 13, 22, 25 and 26: the same code on workers, for all runs on one cluster."""
    for run in RUNS:
        make = partial(DaskExecutor, dask_processes.address, defer="always")
        assert_equivalent(learner_of, executors=[make], run=run, interleavings=0)


# --- shared copies, numbers, the life of lanes


class Look(Callback):
    """Reads the outputs at the end of a batch, and keeps them, where they are and which event it was."""

    deferrable = True

    def __init__(self, name: str, after: type[Callback] | None = None) -> None:
        self.name = name
        self.after = after
        self.kept: list[torch.Tensor] = []
        self.where: list[int] = []
        self.values: list[float] = []
        self.numbers: list[Identity | None] = []

    def state_access(self) -> Access:
        return {"batch.outputs": Read()}

    def run_after(self) -> tuple[type[Callback], ...]:
        return () if self.after is None else (self.after,)

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return RunFirst(self) if isinstance(other, Double) and self.after is None else None

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.kept.append(learner.batch.outputs)
        self.where.append(learner.batch.outputs.data_ptr())
        self.values.append(float(learner.batch.outputs.detach().sum()))
        self.numbers.append(identity())


class Double(Callback):
    """Writes the outputs in place."""

    def state_access(self) -> Access:
        return {"batch.outputs": Write()}

    @on(BatchEnd, TrainingPhase)
    def double(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.batch.outputs.detach().mul_(2)


def test_two_readers_share_a_copy_and_not_across_a_writer() -> None:
    """Rule 20. All copies of the fit are kept, so one address is one copy."""
    first, second, late, later = Look("a"), Look("b"), Look("c", Double), Look("d", Double)
    executor = DaskExecutor(defer="always")
    with tiny_learner(first, second, Double(), late, later, n_batches=4, batch_size=200, executor=executor) as learner:
        learner.fit(1)
        report = executor.report()
    assert first.where == second.where
    assert late.where == later.where
    assert not set(first.where) & set(late.where)
    assert [2 * value for value in first.values] == late.values
    assert [lane.lane for lane in report.lanes] == ["a", "b", "c", "d"]


def test_the_number_of_an_event_has_no_gaps_and_goes_on_when_a_fit_is_resumed(tmp_path: Path) -> None:
    """Rule 25: (run, lane, sequence)."""

    class Saver(Callback):
        @on(EpochEnd, TrainingPhase)
        def save(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            learner.request_checkpoint(tmp_path / "saved")

    look = Look("look")
    with tiny_learner(look, Saver(), n_batches=3, executor=DaskExecutor(defer="always")) as learner:
        learner.fit(1)
        learner.add_callback(Sums())  # the lanes are new ones then, and count on
        learner.fit(1)
        learner.remove_callback(Sums)
    run = learner.loop.sinks.run.id
    assert look.numbers == [Identity(run, "look", number) for number in range(6)]

    again = Look("look")
    with tiny_learner(again, Saver(), n_batches=3, executor=DaskExecutor(defer="always")) as learner:
        learner.fit(3, resume=tmp_path / "saved")
    assert again.numbers == [Identity(run, "look", number) for number in range(6, 12)]


def test_in_place_an_event_has_no_number() -> None:
    look = Look("look")
    with tiny_learner(look, n_batches=2, executor=DaskExecutor(defer="never")) as learner:
        learner.fit(1)
        assert "deferred" not in learner.callbacks.explain()
        assert str(learner.executor.report()) == "no deferred callbacks"  # type: ignore[attr-defined]  # dask's
    assert look.numbers == [None, None]


def lane_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flowtrain lane")]


def test_close_processes_what_waits_and_ends_the_threads() -> None:
    look = Look("look")
    learner = tiny_learner(look, n_batches=3, executor=DaskExecutor(defer="always"))
    learner.epoch(TrainingPhase)
    wait_for(lambda: lane_threads() == ["flowtrain lanes_0"])  # a thread may begin to run a moment later
    learner.close()
    assert len(look.values) == 3
    assert lane_threads() == []
    with pytest.raises(ExecutorError, match="closed"):
        learner.fit(1)


def test_many_callbacks_share_few_threads_and_each_has_its_events_in_order() -> None:
    """Rule 23: a lane for each of 256 callbacks, which were 256 threads."""
    looks = [Look(f"look{number}") for number in range(256)]
    alone = Look("alone")
    with tiny_learner(alone, n_batches=12) as learner:
        learner.fit(2)
    most = 0

    class Counts(Callback):
        @on(BatchEnd, TrainingPhase)
        def count(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            nonlocal most
            most = max(most, len(lane_threads()))

    with tiny_learner(*looks, Counts(), n_batches=12, executor=DaskExecutor(defer="always")) as learner:
        learner.fit(2)
        report = learner.executor.report()  # type: ignore[attr-defined]  # dask's
    assert 1 <= most <= MOST_THREADS
    assert [(lane.lane, lane.events, lane.done) for lane in report.lanes] == [(each.name, 24, 24) for each in looks]
    assert all(each.values == alone.values for each in looks)
    assert lane_threads() == []


def test_a_learner_that_is_dropped_takes_its_lanes_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """No thread, and nothing that one holds, leads back to the learner; what was lost is said."""
    look = Look("look")
    learner = tiny_learner(look, n_batches=3, executor=DaskExecutor(defer="always"))
    learner.fit(1)
    learner.add_callback(Sums())
    learner.fit(1)
    held = [weakref.ref(each) for each in (learner, learner.loop, learner.model, learner.executor, learner.batch)]
    del learner
    gc.collect()
    assert [each() for each in held] == [None] * 5
    assert lane_threads() == []
    assert caplog.messages == []
    assert len(look.values) == 6


def test_an_executor_belongs_to_one_learner() -> None:
    executor = DaskExecutor(defer="always")
    text = "belongs to another learner"
    with tiny_learner(Look("a"), executor=executor), pytest.raises(ExecutorError, match=text):
        tiny_learner(Look("b"), executor=executor)


class Slow(Look):
    """Waits until it is let go on."""

    gate: ClassVar[threading.Event] = threading.Event()

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        Slow.gate.wait(20)
        super().look(event, phase, learner)


@pytest.mark.parametrize("when_full", ["block", "drop"])
def test_the_report_can_be_read_during_training_and_the_fit_ends_with_what_went_wrong(
    when_full: WhenFull, caplog: pytest.LogCaptureFixture
) -> None:
    """Rule 24: from another thread; each event is done, or counted as dropped."""
    caplog.set_level("WARNING", logger="flowtrain")
    Slow.gate.clear()
    slow = Slow("slow")
    executor = DaskExecutor(defer="always", limits=Limits(pending=2, when_full=when_full))
    reports: list[Report] = []

    def watch() -> None:
        while not any(report.pending or report.dropped for report in reports):
            reports.append(executor.report())
        Slow.gate.set()

    watcher = threading.Thread(target=watch)
    with tiny_learner(slow, n_batches=8, executor=executor) as learner:
        watcher.start()
        learner.fit(1)
        watcher.join()
        final = executor.report()
    assert all(0 <= lane.done <= lane.events <= 8 for report in reports for lane in report.lanes)
    assert (final.pending, final.lanes[0].events + final.dropped) == (0, 8)
    assert len(slow.values) == 8 - final.dropped
    said = "slow made training wait" if when_full == "block" else "events dropped"
    assert [said in message for message in caplog.messages if message.startswith("flowtrain: ")] == [True] * bool(
        final.stalled or final.dropped
    )


def own_processes() -> set[int]:
    """Return the processes that dask has started from this one."""
    found: set[int] = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends in this moment
            command = " ".join(child.cmdline())
            if "spawn_main" in command or "dask worker" in command:  # the latter where setproctitle is installed
                found.add(child.pid)
    return found


@pytest.mark.cpu_only("the model and a callback hold tensors of the CPU")
@pytest.mark.slow
def test_processes_that_the_executor_started_go_with_its_learner() -> None:
    """Rule 26, for ``"local"``: the state comes home; a learner that is dropped leaves no process."""
    torch.manual_seed(0)
    before = own_processes()
    sums, here = Sums(), Sums()
    learner = learner_of(DaskExecutor("local", workers=1, defer="always"), lambda: [sums])
    assert "Sums.sum_up is deferred to lane Sums (a process)" in learner.callbacks.explain()
    learner.fit(1)
    torch.manual_seed(0)
    with learner_of(SerialExecutor(), lambda: [here]) as serial:
        serial.fit(1)
    assert (sums.seen, sums.by_phase, sums.mean.shape) == (here.seen, here.by_phase, (3,))
    started = own_processes() - before
    assert started
    del learner
    gc.collect()
    deadline = time.monotonic() + 30
    while own_processes() & started and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not own_processes() & started


class Keeps(Callback):
    """Keeps what it reads."""

    deferrable = True

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def state_access(self) -> Access:
        return {"batch.inputs": Read()}

    @on(BatchEnd, TrainingPhase)
    def keep(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Keep it."""
        self.kept.append(learner.batch.inputs)


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_memory_that_workers_read_is_given_back_when_the_learner_is_closed(dask_processes: Any) -> None:
    """Without waiting for the garbage collector; what a callback has kept is its own."""

    def memory() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum("memfd:flowtrain" in os.readlink(link) for link in links if os.path.islink(link))

    before, collecting = memory(), gc.isenabled()
    keeps = Keeps()
    data = [(torch.full((1 << 18, 1), float(number)), torch.ones(1 << 18, 1)) for number in range(4)]
    gc.disable()
    try:
        with tiny_learner(keeps, data=data, executor=DaskExecutor(dask_processes.address, defer="always")) as learner:
            learner.fit(1)
            assert memory() > before, "a batch of megabytes is in such memory"
        assert memory() == before
    finally:
        if collecting:
            gc.enable()
    assert [float(each.sum()) for each in keeps.kept] == [float(number << 18) for number in range(4)]


def test_the_report_keeps_what_was_before_a_change_of_callbacks() -> None:
    class Sees(Callback):
        deferrable = True

        @on(BatchEnd, TrainingPhase)
        def see(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    executor = DaskExecutor(defer="always")
    with tiny_learner(Sees(), n_batches=5, executor=executor) as learner:
        learner.fit(1)
        learner.add_callback(Sees())
        learner.fit(1)
        found = [(lane.lane, lane.where, lane.events) for lane in executor.report().lanes]
    assert found == [("Sees", "ended", 5), ("Sees", "thread", 5), ("Sees#2", "thread", 5)]
