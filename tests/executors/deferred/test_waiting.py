"""Events that wait in lanes when a checkpoint is taken: a fit that resumes has them, under every executor (rule 28)."""

from __future__ import annotations

import copy
import json
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CheckpointError,
    EpochBegin,
    EpochEnd,
    ExecutorError,
    LearnerView,
    Read,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer
from flowtrain.graph.executor import EXECUTORS
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import Value
from flowtrain.logging.records import log
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor, Limits, register_copier
from flowtrain_dask.cluster.codec import encode
from flowtrain_dask.deferred import deferred_callbacks
from flowtrain_dask.deferred.waiting import finish
from flowtrain_dask.lanes.report import Report
from tests.support.programs import Programs
from tests.support.waiting import wait_for


class SlowLog(Callback):
    """Log the loss, a sum of the losses so far and the length of a series; slow until it is told otherwise.

    The sum is state, the loss a tensor of a snapshot, the length that of a series which grows meanwhile. With `until`
    the first event waits for that file, so that events wait behind it however slowly the machine trains.
    """

    deferrable = True

    def __init__(
        self, path: Path, seconds: float = 0.0, slow_from: int = 0, ballast: int = 0, until: Path | None = None
    ) -> None:
        self.backends = (JsonlBackend(path),)
        self.until = until
        self.seconds, self.slow_from, self.ballast = seconds, slow_from, bytes(ballast)
        self.sum = 0.0
        self.count = 0

    def state_access(self) -> Access:
        return {"batch.loss": Read(), "cbstate.metrics_step.Loss": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def work(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.count += 1
        if self.until is not None:
            wait_for(self.until.exists)
        time.sleep(self.seconds if self.count >= self.slow_from else 0.0)
        self.sum += learner.batch.loss.item()
        self.note("Step", learner)

    @on(EpochEnd, TrainingPhase)
    def end(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.note("Epoch", learner)

    def note(self, group: str, learner: LearnerView) -> None:
        """Log the values of an event."""
        log(self.backends, Value(learner.batch.loss), "Loss", self.count, (group,))
        log(self.backends, Value(self.sum), "Sum", self.count, (group,))
        log(
            self.backends,
            Value(float(len(learner.cbstate.metrics_step[TrainingPhase]["Loss"]))),
            "Length",
            self.count,
            (group,),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sum, self.count = state["sum"], state["count"]


class Cut(Callback):
    """Signal the process in one batch, and make a file that says so."""

    def __init__(self, batch: int, file: Path | None = None) -> None:
        self.left, self.file = batch, file

    @on(BatchEnd, TrainingPhase)
    def count(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGTERM)
            if self.file is not None:
                self.file.touch()


def executor_of(name: str, drain_timeout: float = 20.0, limits: Limits | None = None) -> Any:
    """Return an executor, by default one that gives lanes time when machines are slow.

    Args:
        name: ``"serial"``, ``"dask"`` for lanes in threads, or the address of a cluster.
        drain_timeout: The argument of `DaskExecutor`.
        limits: The argument of `DaskExecutor`.
    """
    if name == "serial":
        return "serial"
    return DaskExecutor(None if name == "dask" else name, drain_timeout=drain_timeout, limits=limits, defer="always")


def place_of(name: str, request: pytest.FixtureRequest) -> str:
    """Return the name for `executor_of`: the address of the cluster of the tests for ``"cluster"``."""
    return str(request.getfixturevalue("dask_processes").address) if name == "cluster" else name


def records(path: Path) -> list[tuple[Any, ...]]:
    """Return the records of a log without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(each["group"], each["name"], each["step"], each["value"]) for each in lines]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an interrupt give lanes a tenth of a second before its checkpoint, so that slow handlers may be quick."""
    assert vars(deferred_callbacks)["_SHORT"] > 0.1
    monkeypatch.setattr(deferred_callbacks, "_SHORT", 0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Return the records of the run that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "log.jsonl"
    torch.manual_seed(3)
    # With checkpoints, so that what they import is there when an interrupt takes one while a handler is slow.
    tiny_learner(SlowLog(path), Checkpointer(path.parent), n_batches=8).fit(3)
    return records(path)


def interrupted(place: Path, executor: Any, at: int = 7, seconds: float = 0.2) -> Report:
    """Train until a signal, with a logger that begins then and is slow; return the report of the executor."""
    torch.manual_seed(3)
    cut = place / "cut"
    parts = Checkpointer(place), SlowLog(place / "log.jsonl", seconds, until=cut), Cut(at, cut)
    learner = tiny_learner(*parts, n_batches=8, executor=executor)
    with learner, pytest.raises(KeyboardInterrupt):
        learner.fit(3)
    report: Report = executor.report()
    return report


def resumed(place: Path, executor: Any, at: int | None = None, seconds: float = 0.0) -> SlowLog:
    """Resume, to the end or until another signal, and return the logger."""
    torch.manual_seed(99)
    slow = SlowLog(place / "log.jsonl", seconds)
    parts = (Checkpointer(place), slow, *([] if at is None else [Cut(at)]))
    with tiny_learner(*parts, n_batches=8, executor=executor) as learner:
        if at is None:
            learner.fit(3, resume="auto")
        else:
            with pytest.raises(KeyboardInterrupt):
                learner.fit(3, resume="auto")
    return slow


def waiting_in(place: Path) -> dict[str, Any]:
    """Return the events that wait in the latest checkpoint."""
    contents = torch.load(place / "interrupted.ckpt", weights_only=True)  # which reads no code
    found: dict[str, Any] = contents["lanes"]["waiting"]
    return found


@pytest.mark.parametrize("first", ["dask", pytest.param("cluster", marks=pytest.mark.slow)])
@pytest.mark.parametrize("second", ["serial", "dask", pytest.param("cluster", marks=pytest.mark.slow)])
def test_a_resumed_run_has_every_record_of_the_serial_one(
    first: str,
    second: str,
    tmp_path: Path,
    whole: list[tuple[Any, ...]],
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    report = interrupted(tmp_path, executor_of(place_of(first, request)))
    saved = waiting_in(tmp_path)["SlowLog"]
    assert 1 <= saved["count"] <= 7
    counts = report.lanes[0].counts
    assert (counts.saved, counts.saved_bytes) == (saved["count"], saved["events"].numel())
    said = f"SlowLog: {saved['count']} events were not done in time and are in the checkpoint (0.0 MiB)"
    assert said in str(report)
    assert said in caplog.text
    slow = resumed(tmp_path, executor_of(place_of(second, request)))
    assert records(tmp_path / "log.jsonl") == whole
    assert (slow.count, slow.sum) == (24, whole[-2][3])


@pytest.mark.parametrize("executors", [("dask", "dask", "serial"), ("dask", "serial", "dask")])
def test_events_can_wait_again_and_again(
    executors: tuple[str, ...], tmp_path: Path, whole: list[tuple[Any, ...]]
) -> None:
    interrupted(tmp_path, executor_of(executors[0]), at=5)
    resumed(tmp_path, executor_of(executors[1]), at=4, seconds=0.2)
    resumed(tmp_path, executor_of(executors[2]))
    assert records(tmp_path / "log.jsonl") == whole


def test_a_large_state_comes_from_the_last_time_that_a_worker_sent_it(tmp_path: Path, dask_processes: Any) -> None:
    """Then some of the waiting events have their records in the log already, and only their effect is missing."""

    class Steady(Callback):
        """Make training take as long as the batches of a lane need."""

        @on(BatchEnd, TrainingPhase)
        def wait(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            time.sleep(0.3)

    def parts(place: Path, **options: Any) -> tuple[Callback, ...]:
        """Return the callbacks."""
        return Checkpointer(place), SlowLog(place / "log.jsonl", ballast=100_000, **options)

    (tmp_path / "whole").mkdir()
    torch.manual_seed(3)
    tiny_learner(*parts(tmp_path / "whole"), n_batches=16).fit(1)

    (tmp_path / "cut").mkdir()
    torch.manual_seed(3)
    slow = parts(tmp_path / "cut", seconds=1.5, slow_from=11)
    learner = tiny_learner(*slow, Steady(), Cut(14), n_batches=16, executor=executor_of(dask_processes.address))
    with learner, pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    saved = waiting_in(tmp_path / "cut")["SlowLog"]
    assert 0 < saved["recorded"] < saved["count"]

    with tiny_learner(*parts(tmp_path / "cut"), n_batches=16) as learner:
        learner.fit(1, resume="auto")
    assert records(tmp_path / "cut" / "log.jsonl") == records(tmp_path / "whole" / "log.jsonl")


KILLED = """
import sys, signal
from pathlib import Path
import torch
from flowtrain.callbacks import Checkpointer
from flowtrain.testing import tiny_learner
from tests.executors.deferred.test_waiting import Cut, SlowLog, executor_of

place = Path(sys.argv[1])
torch.manual_seed(3)
parts = Checkpointer(place), SlowLog(place / "log.jsonl", 0.5, until=place / "cut"), Cut(7, place / "cut")
with tiny_learner(*parts, n_batches=8, executor=executor_of("dask")) as learner:
    learner.fit(3)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_after_its_checkpoint_loses_nothing(
    tmp_path: Path, whole: list[tuple[Any, ...]], programs: Programs
) -> None:
    """A batch system sends SIGTERM, and SIGKILL when the grace period is over: while the lane still writes records."""
    process = programs.start(KILLED, str(tmp_path), log=tmp_path / "output")
    try:
        wait_for((tmp_path / "interrupted.ckpt").exists)
        lines = len((tmp_path / "log.jsonl").read_text().splitlines())
        wait_for(lambda: len((tmp_path / "log.jsonl").read_text().splitlines()) > lines)
    finally:
        process.kill()
        process.wait(20)
        process.close()
    resumed(tmp_path, "serial")
    assert records(tmp_path / "log.jsonl") == whole


def test_a_handler_that_does_not_return_keeps_no_checkpoint_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, executor_of("dask", drain_timeout=0.2), seconds=1.5)
    assert waiting_in(tmp_path) == {}
    said = "events of lane SlowLog are not in the checkpoint, and a fit that resumes lacks them: "
    assert re.search(rf"\d {said}a handler has not returned for 0\.2 s", caplog.text)


class Odd:
    """Shared state that a checkpoint can hold, and whose copy cannot be in a file without code."""

    def __init__(self) -> None:
        self.function = min

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


register_copier(Odd, copy.copy)


class MakesOdd(Callback):
    """Make that state."""

    def state_access(self) -> Access:
        return {"cbstate.odd": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.odd = Odd()


class ReadsOdd(SlowLog):
    """Read it."""

    def state_access(self) -> Access:
        return {**super().state_access(), "cbstate.odd": Read()}


def test_events_that_no_file_can_hold_get_the_time_that_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Checkpointer(tmp_path), MakesOdd(), ReadsOdd(tmp_path / "log.jsonl", 1.0), Cut(12)
    learner = tiny_learner(*parts, n_batches=16, executor=executor_of("dask", drain_timeout=1.5))
    with learner, pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    assert waiting_in(tmp_path) == {}
    assert "lacks them: TypeError: builtins.min cannot be in a file without code" in caplog.text


class Noise(SlowLog):
    """Log a random number of the callback's own."""

    stochastic = True

    def note(self, group: str, learner: LearnerView) -> None:
        log(self.backends, Value(torch.rand(())), "Noise", self.count, (group,))


@pytest.mark.parametrize("second", ["serial", "cluster"])
def test_random_numbers_of_a_callback_are_those_of_its_events(
    second: str, tmp_path: Path, dask_processes: Any, request: pytest.FixtureRequest
) -> None:
    def train(place: Path, executor: str, *more: Callback, seconds: float = 0.0, resume: Any = None) -> None:
        """Train, with a logger that draws numbers."""
        place.mkdir(exist_ok=True)
        cut = place / "cut" if seconds else None
        parts = Checkpointer(place), Noise(place / "log.jsonl", seconds, until=cut), *more
        with tiny_learner(*parts, n_batches=8, executor=executor_of(executor)) as learner:
            learner.fit(2, resume=resume)

    torch.manual_seed(5)
    train(tmp_path / "whole", "serial")
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", dask_processes.address, Cut(5, tmp_path / "cut" / "cut"), seconds=0.2)
    assert waiting_in(tmp_path / "cut")["Noise"]["count"] > 1
    torch.manual_seed(6)
    train(tmp_path / "cut", place_of(second, request), resume="auto")
    assert records(tmp_path / "cut" / "log.jsonl") == records(tmp_path / "whole" / "log.jsonl")


def test_a_full_lane_leaves_as_many_events_as_it_may_hold(tmp_path: Path, whole: list[tuple[Any, ...]]) -> None:
    slow = SlowLog(tmp_path / "log.jsonl", 0.4)
    torch.manual_seed(3)
    executor = executor_of("dask", limits=Limits(pending=3))
    learner = tiny_learner(Checkpointer(tmp_path), slow, Cut(6), n_batches=8, executor=executor)
    with learner, pytest.raises(KeyboardInterrupt):
        learner.fit(3)
    assert 1 <= waiting_in(tmp_path)["SlowLog"]["count"] <= 4
    resumed(tmp_path, executor_of("dask", limits=Limits(pending=1)))
    assert records(tmp_path / "log.jsonl") == whole


def test_a_callback_that_the_learner_lacks_is_named(tmp_path: Path) -> None:
    interrupted(tmp_path, executor_of("dask"))
    count = waiting_in(tmp_path)["SlowLog"]["count"]
    learner = tiny_learner(Checkpointer(tmp_path), n_batches=8)
    said = f"The checkpoint has {count} events that waited for SlowLog.work, which the learner does not have: they are"
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="the state of SlowLog"):
        learner.fit(3, resume=tmp_path)


def test_a_handler_that_fails_is_named_and_the_events_can_be_processed_again(
    tmp_path: Path, whole: list[tuple[Any, ...]]
) -> None:
    class Failing(SlowLog):
        """Fail, as a sink does whose disk is full."""

        def note(self, group: str, learner: LearnerView) -> None:
            raise OSError(28, "No space left on device")

    interrupted(tmp_path, executor_of("dask"))
    for executor in ("serial", executor_of("dask")):
        failing = Failing(tmp_path / "log.jsonl")
        failing.name = "SlowLog"
        type(failing).__name__ = "SlowLog"
        with tiny_learner(Checkpointer(tmp_path), failing, n_batches=8, executor=executor) as learner:
            with pytest.raises(OSError, match="No space left") as caught:
                learner.fit(3, resume=tmp_path)
            assert "raised in SlowLog.work at (BatchEnd, TrainingPhase)" in str(caught.value.__notes__)
    resumed(tmp_path, "serial")
    assert records(tmp_path / "log.jsonl") == whole


def test_without_the_package_of_the_lanes_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, executor_of("dask"))
    count = waiting_in(tmp_path)["SlowLog"]["count"]
    monkeypatch.setitem(EXECUTORS, "dask", ("flowtrain_absent:Executor", "pip install 'flowtrain[dask]'"))
    with pytest.raises(ExecutorError) as caught:
        resumed(tmp_path, "serial")
    assert str(caught.value) == (
        f"The checkpoint has {count} events of SlowLog that waited in the executor 'dask', and flowtrain_absent, which "
        f"can read them, is not installed: pip install 'flowtrain[dask]'"
    )


def test_a_checkpoint_of_others_runs_no_code(tmp_path: Path) -> None:
    interrupted(tmp_path, executor_of("dask"))
    contents = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    waiting = contents["lanes"]["waiting"]["SlowLog"]
    waiting["events"] = torch.frombuffer(bytearray(encode([print])), dtype=torch.uint8)
    torch.save(contents, tmp_path / "interrupted.ckpt")
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, "serial")
    assert str(caught.value) == (
        f"The checkpoint has {waiting['count']} events that waited in lane SlowLog, and they cannot be read: it names "
        f"builtins.print, which is no type of a value, or is not imported. Import the modules of your events, phases "
        f"and data types before fit(resume=...). A file of others that names something else may want to run code."
    )


@pytest.mark.parametrize(
    "events",
    [
        None,
        [1],
        [(1, 2)],
        [(0, -1, BatchEnd(), TrainingPhase(), None, 0, None, 0)],
        [(0, 7, BatchEnd(), TrainingPhase(), None, 0, None, 0)],
        [(0, 0, "event", TrainingPhase(), None, 0, None, 0)],
        [(0, 0, BatchEnd(), None, None, 0, None, 0)],
        [("", 0, BatchEnd(), TrainingPhase(), None, 0, None, 0)],
        b"no events",
    ],
    ids=str,
)
def test_events_that_are_none_are_refused(events: Any, tmp_path: Path) -> None:
    """A file of others may have anything in their place, and each error says what it is of."""
    blob = events if isinstance(events, bytes) else encode(events)
    waiting = {"Lane": {"events": torch.frombuffer(bytearray(blob), dtype=torch.uint8), "count": 1, "handlers": ["A"]}}
    site: Any = SimpleNamespace(nodes=[])
    with pytest.raises(CheckpointError, match=r"The checkpoint has 1 events that waited in lane Lane, and they cannot"):
        finish(waiting, site, {}, lambda *_: True)


class Begins(Callback):
    """Count the epochs that have begun, deferred and slowly."""

    deferrable = True

    def __init__(self) -> None:
        self.begun = 0

    def state_access(self) -> Access:
        return {"cbstate.history": Read()}

    @on(EpochBegin, TrainingPhase)
    def count(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        time.sleep(0.2)
        self.begun += 1

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begun = state["begun"]


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_an_epoch_that_resumes_is_counted_once_by_a_deferred_callback(executor: str, tmp_path: Path) -> None:
    with (
        tiny_learner(Checkpointer(tmp_path), Begins(), Cut(3), n_batches=8, executor=executor_of(executor)) as learner,
        pytest.raises(KeyboardInterrupt),
    ):
        learner.fit(2)
    begins = Begins()
    with tiny_learner(Checkpointer(tmp_path), begins, n_batches=8, executor=executor_of(executor)) as learner:
        learner.fit(2, resume="auto")
    assert begins.begun == 2
