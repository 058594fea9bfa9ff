"""What happens when something goes wrong with deferred callbacks: they fail, are slow, large, or lose their cluster.

The processes are real ones: schedulers and workers of dask's command line, and scripts that are sent signals.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from distributed import Client
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CancelEpochException,
    EpochEnd,
    LearnerView,
    Read,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.callbacks import LogHistograms, LogMetrics
from flowtrain.errors import DeferredCancelError, ExecutorError
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import Value
from flowtrain.logging.records import log
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain_dask import DaskExecutor, Limits
from tests.support.logs import log_records, log_steps
from tests.support.programs import importing_the_same
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

Where = Literal["threads", "cluster"]


class Logs(Callback):
    """Logs the number of the batch; at one of them something else happens first."""

    deferrable = True

    def __init__(self, path: Path, at: int = 0, then: Callable[[], Any] | None = None) -> None:
        self.backends = (JsonlBackend(path),)
        self.at = at
        self.then = then
        self.count = 0

    def state_access(self) -> Access:
        return {"batch.inputs": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def record(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Log."""
        self.count += 1
        if self.count == self.at and self.then is not None:
            self.then()
        log(self.backends, Value(learner.batch.inputs.sum()), "Sum", self.count, ("Step", repr(phase)))


class Meanwhile(Callback):
    """Calls a function in place, at the end of one training batch."""

    def __init__(self, at: int, call: Callable[[], Any]) -> None:
        self.at = at
        self.call = call
        self.count = 0

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Call it."""
        self.count += 1
        if self.count == self.at:
            self.call()


def fail() -> None:
    raise ValueError("no such colour")


def cancel() -> None:
    raise CancelEpochException("enough")


@pytest.fixture(params=["threads", "cluster"])
def make_executor(request: pytest.FixtureRequest) -> Callable[..., DaskExecutor]:
    """Makes executors, of threads and of a cluster."""
    if request.param == "threads":
        return partial(DaskExecutor, defer="always")
    address = request.getfixturevalue("dask_processes").address
    return partial(DaskExecutor, address, defer="always")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts scripts; those that still run are ended with the test."""
    # The C library gives large blocks back at once: otherwise each small object that is kept splits a large block that
    # is free, and what is measured is that.
    environment = {**importing_the_same(), "MALLOC_MMAP_THRESHOLD_": "65536"}
    started: list[subprocess.Popen[str]] = []

    def begin(source: str, *arguments: str) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(source)
        command = [sys.executable, str(script), *arguments]
        started.append(
            subprocess.Popen(
                command, text=True, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_rule_27_the_error_comes_at_the_next_batch_boundary(
    make_executor: Callable[..., DaskExecutor], tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    executor = make_executor()
    known = Meanwhile(12, lambda: wait_for(lambda: executor.report().lanes[0].counts.last_error))
    with tiny_learner(Logs(path, 8, fail), known, executor=executor) as learner:
        with pytest.raises(ValueError, match="no such colour") as caught:
            learner.fit(3)
        assert known.count == 12
        assert log_steps(path) == [1, 2, 3, 4, 5, 6, 7]
        assert any(
            note == "raised in Logs.record at (BatchEnd, TrainingPhase), deferred as event 7 of lane Logs"
            for note in caught.value.__notes__
        )
        assert learner.stopped is caught.value
        learner.fit(1)  # it has failed once, and goes on with what comes then
        assert log_steps(path) == [*range(1, 8), *range(9, 25)]


def test_rule_27_an_error_that_comes_late_is_raised_at_the_end_of_the_fit(tmp_path: Path) -> None:
    go_on = threading.Event()

    def wait_and_fail() -> None:
        assert go_on.wait(60)
        fail()

    with tiny_learner(
        Logs(tmp_path / "log.jsonl", 8, wait_and_fail), Meanwhile(32, go_on.set), executor=DaskExecutor(defer="always")
    ) as learner:
        with pytest.raises(ValueError, match="no such colour"):
            learner.fit(2)
        assert learner.cbstate.history[TrainingPhase].steps == 32
    assert log_steps(tmp_path / "log.jsonl") == [1, 2, 3, 4, 5, 6, 7]


def test_rule_27_with_warn_the_lane_retires_and_training_goes_on(
    make_executor: Callable[..., DaskExecutor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Logs(tmp_path / "failing.jsonl", 8, fail), Logs(tmp_path / "other.jsonl")
    executor = make_executor(on_error="warn")
    with tiny_learner(failing, other, executor=executor) as learner, caplog.at_level(logging.WARNING, "flowtrain"):
        learner.fit(2)
        report = executor.report()
    assert log_steps(tmp_path / "failing.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    assert log_steps(tmp_path / "other.jsonl") == list(range(1, 33))
    assert [lane.retired for lane in report.lanes] == [True, False]
    assert report.lanes[0].counts.last_error == "ValueError: no such colour"
    assert "flowtrain retires lane Logs, its callbacks see no more events: ValueError: no such colour" in caplog.text


def test_rule_27_a_cancel_in_a_lane_is_an_error(make_executor: Callable[..., DaskExecutor], tmp_path: Path) -> None:
    with tiny_learner(Logs(tmp_path / "log.jsonl", 3, cancel), executor=make_executor()) as learner:
        with pytest.raises(DeferredCancelError, match=r"Logs.record raised CancelEpochException\('enough'\)") as caught:
            learner.fit(2)
        assert str(caught.value).endswith("Set deferrable = False in Logs.")
    assert log_steps(tmp_path / "log.jsonl") == [1, 2]


def test_rule_24_a_snapshot_larger_than_the_limit_goes_alone(
    make_executor: Callable[..., DaskExecutor], tmp_path: Path
) -> None:
    serial, deferred = tmp_path / "serial.jsonl", tmp_path / "deferred.jsonl"
    tiny_learner(Logs(serial), n_batches=6, batch_size=4096).fit(1)
    executor = make_executor(limits=Limits(bytes=1000))
    pending: list[int] = []
    looks = [Meanwhile(at, lambda: pending.append(executor.report().pending)) for at in range(1, 7)]
    with tiny_learner(Logs(deferred), *looks, n_batches=6, batch_size=4096, executor=executor) as learner:
        learner.fit(1)
    assert max(pending) <= 1
    assert log_records(deferred) == log_records(serial)


def test_rule_24_what_is_dropped_is_counted(tmp_path: Path) -> None:
    go_on = threading.Event()
    executor = DaskExecutor(defer="always", limits=Limits(pending=4, when_full="drop"))
    callback = Logs(tmp_path / "log.jsonl", 1, lambda: go_on.wait(60))
    with tiny_learner(callback, Meanwhile(16, go_on.set), executor=executor) as learner:
        learner.fit(1)
        report = executor.report()
    assert report.dropped == 12
    assert report.troubles() == ["Logs: 12 events dropped"]
    assert log_steps(tmp_path / "log.jsonl") == [1, 2, 3, 4]


SLOW = """
import os, sys, time
from pathlib import Path
import torch
from flowtrain import BatchEnd, Callback, Read, on
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor, Limits

# Slower than training, however busy the machine: the first event ends a second after the lane is full.
class Slow(Callback):
    deferrable = True

    def __init__(self, full):
        self.full, self.begun = full, False

    def state_access(self):
        return {"batch.inputs": Read()}

    @on(BatchEnd)
    def work(self, event, phase, learner):
        deadline = time.monotonic() + 90
        while not self.begun and not os.path.exists(self.full) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.02 if self.begun else 1.0)
        self.begun = True
        self.last = float(learner.batch.inputs.sum())

class Look(Callback):
    def __init__(self, executor, full):
        self.executor, self.full = executor, full
        self.pending = self.bytes = self.base = self.count = 0

    @on(BatchEnd)
    def look(self, event, phase, learner):
        self.count += 1
        if self.count == 3:
            self.base = memory()
        lane = self.executor.report().lanes[0]
        self.pending, self.bytes = max(self.pending, lane.pending), max(self.bytes, lane.bytes)
        if lane.pending == 64:
            Path(self.full).touch()

def memory():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024

def main():
    torch.set_num_threads(1)
    executor = DaskExecutor(sys.argv[1] or None, defer="always", limits=Limits(bytes=64 << 20))
    full = str(Path(__file__).with_name("full"))
    look = Look(executor, full)
    data = [(torch.ones(1 << 18, 1), torch.ones(1 << 18, 1)) for _ in range(20)]
    with tiny_learner(Slow(full), look, data=data, executor=executor) as learner:
        learner.fit(6)
        print(look.pending, look.bytes, memory() - look.base, executor.report().troubles()[0], sep="|")

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("where", ["threads", "cluster"])
def test_rule_24_one_that_is_slower_than_training_for_ever(
    where: Where, start: Callable[..., subprocess.Popen[str]], request: pytest.FixtureRequest
) -> None:
    """Rule 24: 120 MB of snapshots go through a lane of 64 MB."""
    address = request.getfixturevalue("dask_processes").address if where == "cluster" else ""
    output = start(SLOW, address).communicate(timeout=120)[0]
    pending, size, grown, trouble = output.splitlines()[-1].split("|")
    assert int(pending) == 64
    assert int(size) == 64 << 20
    assert int(grown) <= 1.2 * (64 << 20) + (64 << 20)
    assert trouble.startswith("Slow made training wait")


STUCK = """
import signal, sys, time
from flowtrain import BatchEnd, Callback, Read, TrainingPhase, Write, on
from flowtrain.logging import JsonlBackend
from flowtrain.logging import Value, log
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor, Limits

# A shell lets what it runs in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Stuck(Callback):
    deferrable = True

    def __init__(self, path):
        self.backends = (JsonlBackend(path),)
        self.count = 0

    def state_access(self):
        return {"batch.loss": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def work(self, event, phase, learner):
        self.count += 1
        if self.count == 20:
            time.sleep(600)
        log(self.backends, Value(learner.batch.loss), "Loss", self.count, ("Step",))

def main():
    path, cluster = sys.argv[1:]
    executor = DaskExecutor(cluster or None, defer="always", limits=Limits(pending=8), drain_timeout=2.0)
    with tiny_learner(Stuck(path), executor=executor) as learner:
        learner.fit(1000)

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes as Linux tells them")
@pytest.mark.parametrize(("number", "cluster"), [(signal.SIGINT, "local"), (signal.SIGTERM, "")])
def test_rule_29_interrupted_while_training_waits_for_a_full_lane(
    number: signal.Signals, cluster: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Rule 29: it leaves after the time for draining, though a handler takes ten minutes; nothing stays behind."""
    log = tmp_path / "log.jsonl"
    process = start(STUCK, str(log), cluster)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 12)
    time.sleep(2)  # until it is stuck and the lane is full
    children = descendants(process.pid)
    process.send_signal(number)
    output = process.communicate(timeout=40)[0]
    assert f"training was interrupted by {number.name}" in output
    assert process.returncode
    found = log_steps(log)
    assert found == list(range(1, len(found) + 1))
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert bool(children) == bool(cluster)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and that those have started."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *descendants(child)]
    return found


class Killing(Callback):
    """Kills a scheduler after a batch of training, in place, when some events have been processed on its cluster."""

    def __init__(self, processes: Any, executor: DaskExecutor) -> None:
        self.processes = processes
        self.executor = executor

    @on(EpochEnd, TrainingPhase)
    def kill(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Kill it."""
        if self.processes.scheduler.poll() is None:
            wait_for(lambda: self.executor.report().lanes[0].done >= 8)
            self.processes.kill_scheduler()


class Restarting(Killing):
    """Kills the scheduler after epoch 1, starts it again after epoch 2, and waits after epoch 3 until it is used."""

    epochs = 0

    @on(EpochEnd, TrainingPhase)
    def kill(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Do it."""
        self.epochs += 1
        if self.epochs == 1:
            self.processes.kill_scheduler()
        elif self.epochs == 2:
            wait_for(lambda: self.executor.report().lanes[0].where.startswith("thread"))
            self.processes.start_scheduler()
            self.processes.start_worker("b")
        elif self.epochs == 3:
            wait_for(lambda: self.executor.report().outages[0].back is not None)


@pytest.fixture
def mortal(make_dask_processes: Callable[[], Any]) -> Any:
    """A cluster with one worker whose scheduler may be killed."""
    processes = make_dask_processes()
    processes.start_worker("a")
    return processes


def test_the_scheduler_dies_and_the_log_is_complete(
    mortal: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serial, deferred = JsonlBackend(tmp_path / "serial.jsonl"), JsonlBackend(tmp_path / "deferred.jsonl")
    tiny_learner(LogMetrics(serial), LogHistograms(serial, every=4)).fit(3)
    executor = DaskExecutor(mortal.address, defer="always")
    callbacks = LogMetrics(deferred), LogHistograms(deferred, every=4), Killing(mortal, executor)
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with tiny_learner(*callbacks, executor=executor) as learner:
        learner.fit(3)
        [lane] = executor.report().lanes
    assert log_records(tmp_path / "deferred.jsonl") == log_records(tmp_path / "serial.jsonl")
    assert lane.counts.local > 0
    assert lane.where == f"thread ({mortal.address} was lost)"
    assert f"the cluster was lost; {lane.counts.local} events were run in this process" in caplog.text


def test_the_scheduler_comes_back_and_is_used(mortal: Any, tmp_path: Path) -> None:
    """The log and the callbacks are those of the serial run, and the report says what ran where."""
    serial, deferred = JsonlBackend(tmp_path / "serial.jsonl"), JsonlBackend(tmp_path / "deferred.jsonl")
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    alone = tiny_learner(LogMetrics(serial), Logs(tmp_path / "one.jsonl"), LogHistograms(serial, every=4))
    alone.fit(5)
    with Client(mortal.address, set_as_default=False) as client:  # type: ignore[no-untyped-call]  # no annotations
        executor = DaskExecutor(client, defer="always")
        callbacks = LogMetrics(deferred), Logs(tmp_path / "two.jsonl"), LogHistograms(deferred, every=4)
        with tiny_learner(*callbacks, Restarting(mortal, executor), executor=executor) as learner:
            learner.fit(5)
            report = executor.report()
            counts = [each.count for one in (learner, alone) for each in one.callbacks if isinstance(each, Logs)]
            assert counts == [5 * 16, 5 * 16]
            assert executor.report().lanes[0].where.startswith(mortal.address)
    assert log_records(tmp_path / "deferred.jsonl") == log_records(tmp_path / "serial.jsonl")
    assert log_steps(tmp_path / "two.jsonl") == list(range(1, 5 * 16 + 1))
    for lane in report.lanes:
        assert lane.where.startswith(f"{mortal.address}, worker tcp://127.0.0.1:")
        assert 0 < lane.counts.local < lane.events == lane.done
    [outage] = report.outages
    assert (outage.address, outage.refused) == (mortal.address, "")
    assert f"the cluster at {mortal.address} was lost at 20" in str(report)
    assert f"({outage.why}), and was back at 20" in str(report)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_fit_that_ends_before_the_cluster_is_back(mortal: Any, tmp_path: Path, interrupted: bool) -> None:
    """The next fit uses it again; `close` ends the looking."""
    path = tmp_path / "log.jsonl"
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    executor = DaskExecutor(mortal.address, defer="always")
    before = threading.active_count()
    callbacks = [Logs(path), Meanwhile(16, mortal.kill_scheduler)]
    if interrupted:
        callbacks.append(Meanwhile(40, lambda: signal.raise_signal(signal.SIGINT)))
    with tiny_learner(*callbacks, executor=executor) as learner:
        with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
            learner.fit(3)
        taken = 40 if interrupted else 48
        assert log_steps(path) == list(range(1, taken + 1))
        [lane] = executor.report().lanes
        assert lane.where == f"thread ({mortal.address} was lost)"
        assert executor.report().outages[0].back is None
        mortal.start_scheduler()
        mortal.start_worker("b")
        wait_for(lambda: executor.report().outages[0].back is not None)
        learner.fit(1)
        assert executor.report().lanes[0].where.startswith(mortal.address)
        mortal.kill_scheduler()
        learner.fit(1)
        assert [each.back is None for each in executor.report().outages] == [False, True]
    assert log_steps(path) == list(range(1, taken + 33))
    assert threading.active_count() <= before, [each.name for each in threading.enumerate()]


def test_the_scheduler_dies_and_that_is_an_error(mortal: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    executor = DaskExecutor(mortal.address, defer="always", on_cluster_loss="raise")
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    learner = tiny_learner(Logs(path), Killing(mortal, executor), executor=executor)
    with pytest.raises(ExecutorError, match=f"The cluster at {mortal.address} was lost during training"):
        learner.fit(3)
    learner.close()
    assert log_steps(path) == list(range(1, len(log_steps(path)) + 1))


def test_a_cluster_that_is_not_there_is_an_error_before_training(
    make_dask_processes: Callable[[], Any], tmp_path: Path
) -> None:
    nowhere = "tcp://127.0.0.1:9"
    with pytest.raises(ExecutorError, match=f"No dask scheduler answers at {nowhere} within 1 s .*Start one with"):
        tiny_learner(Logs(tmp_path / "log.jsonl"), executor=DaskExecutor(nowhere, drain_timeout=1.0))
    address = make_dask_processes().address
    with pytest.raises(ExecutorError, match=f"{address} has no workers within 1 s. Start one: dask worker {address}"):
        tiny_learner(Logs(tmp_path / "log.jsonl"), executor=DaskExecutor(address, drain_timeout=1.0))
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(("method", "epochs"), [("fork", 10), ("forkserver", 3)])
def test_rule_30_loader_workers_begin_beside_lanes_in_every_epoch(method: str, epochs: int, tmp_path: Path) -> None:
    """Rule 30: a lock that a lane holds while a worker is forked would hang it; ``tests.chaos --loaders`` does 200."""
    x, y = (torch.cat(each) for each in zip(*tiny_batches(n_batches=8), strict=True))
    loader = DataLoader(
        TensorDataset(x, y), batch_size=8, num_workers=1, multiprocessing_context=method, timeout=60
    )  # fmt: skip
    path = tmp_path / "log.jsonl"
    with tiny_learner(Logs(path), data=loader, executor=DaskExecutor(defer="always")) as learner:
        learner.fit(epochs)
    assert log_steps(path) == list(range(1, 8 * epochs + 1))
