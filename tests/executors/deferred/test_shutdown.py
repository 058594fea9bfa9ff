# pyright: reportPrivateUsage=false
# The test ends all lanes of the process, which have no other name.
"""How lanes end that nobody closes: nothing is lost, and nothing that fails is unheard (rules 25 and 27)."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from flowtrain import BatchEnd, Callback, LearnerView, Phase, Read, TrainingPhase, on
from flowtrain.callback.access import Access
from flowtrain.callbacks import Checkpointer, Metrics
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import Value
from flowtrain.logging.records import log
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from flowtrain_dask.deferred import shutdown
from tests.support.programs import Programs
from tests.support.waiting import wait_for

SCRIPT = """
import sys, time
from flowtrain import BatchEnd, Callback, Read, TrainingPhase, Write, on
from flowtrain.logging import JsonlBackend
from flowtrain.logging import Value, log
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor


class Slow(Callback):
    deferrable = True

    def __init__(self, path):
        self.backends = (JsonlBackend(path),)
        self.count = 0

    def state_access(self):
        return {"batch.loss": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def note(self, event, phase, learner):
        time.sleep(0.05)
        self.count += 1
        if self.count == int(sys.argv[3]):
            raise ValueError("the fifth")
        log(self.backends, Value(learner.batch.loss), "Loss", self.count, ("Step", "TrainingPhase"))


def train():
    learner = tiny_learner(Slow(sys.argv[1]), executor=DaskExecutor(defer="always", drain_timeout=float(sys.argv[2])))
    for raw in learner.data[TrainingPhase]:
        learner.step(TrainingPhase, raw)
    return learner


if sys.argv[4] == "kept":
    learner = train()
else:
    train()
"""


@pytest.mark.parametrize("how", ["kept", "dropped"])
def test_a_script_that_ends_without_closing_loses_nothing(how: str, tmp_path: Path, programs: Programs) -> None:
    """Rule 25, for who calls step() and leaves: 16 events of 50 ms are pending when the script is at its end."""
    path = tmp_path / "log.jsonl"
    ended = programs.run(SCRIPT, str(path), "60", "-1", how)
    assert ended.returncode == 0, ended.stderr
    assert path.read_text().count("\n") == 16
    assert ended.stderr == ""


def test_what_a_script_has_no_time_for_is_told(tmp_path: Path, programs: Programs) -> None:
    path = tmp_path / "log.jsonl"
    ended = programs.run(SCRIPT, str(path), "0.1", "-1", "kept")
    assert ended.returncode == 0, ended.stderr
    assert path.read_text().count("\n") < 16
    assert "events of lane Slow were not processed in 0.1 s, and nobody closed their learner" in ended.stderr


def test_a_failure_that_nobody_waited_for_is_told(tmp_path: Path, programs: Programs) -> None:
    """Rule 27: there is no training thread left that it could be raised on."""
    path = tmp_path / "log.jsonl"
    ended = programs.run(SCRIPT, str(path), "60", "5", "kept")
    assert ended.returncode == 0, ended.stderr
    assert path.read_text().count("\n") == 4
    assert "lane Slow failed, and nobody called learner.flush() or learner.close()" in ended.stderr
    assert "ValueError: the fifth" in ended.stderr


class Gated(Callback):
    """Logs each loss when it is let."""

    deferrable = True

    def __init__(self, gate: threading.Event, backend: JsonlBackend) -> None:
        self.gate = gate
        self.backends = (backend,)

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        assert self.gate.wait(20)
        log(self.backends, Value(learner.batch.loss), "Loss", 1, ("Step", "TrainingPhase"))


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "lane" in thread.name]


class FailedLane:
    """A lane with nothing to do, whose handler has raised something."""

    name, given_up = "failed", False

    def __init__(self, failure: BaseException) -> None:
        self.failure: BaseException | None = failure

    def wait(self, is_over: Callable[[], bool]) -> bool:
        return True

    def raise_failure(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def test_a_handler_that_exits_leaves_no_lane_of_this_or_another_learner_open(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lanes:
        def __init__(self, *lanes: FailedLane, broken: bool = False) -> None:
            self.lanes, self.closed, self.broken = lanes, 0, broken

        def close(self) -> None:
            self.closed += 1
            if self.broken:
                raise RuntimeError("no thread can be started")

    first, second = Lanes(FailedLane(SystemExit(7)), FailedLane(ValueError("bad")), broken=True), Lanes()
    monkeypatch.setattr(shutdown, "_open", set())
    monkeypatch.setattr(shutdown, "_ending", set())
    for lanes in (first, second):
        shutdown.Teardown(1.0).lanes = cast(Any, lanes)
    shutdown._finish_all()
    assert (first.closed, second.closed) == (1, 1)
    assert [lane.failure for lane in first.lanes] == [None, None]
    assert caplog.text.count("flowtrain: lane failed failed") == 2
    assert "flowtrain: lanes could not be ended" in caplog.text


def test_the_lanes_of_a_dropped_learner_process_what_they_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate, path = threading.Event(), tmp_path / "log.jsonl"
    caplog.set_level(logging.WARNING, "flowtrain")

    def train() -> None:
        learner = tiny_learner(Gated(gate, JsonlBackend(path)), executor=DaskExecutor(defer="always"))
        for raw in learner.data[TrainingPhase]:
            learner.step(TrainingPhase, raw)

    train()
    gc.collect()
    gate.set()
    wait_for(lambda: not names())
    assert path.read_text().count("\n") == 16
    assert caplog.text == ""


def test_a_dropped_learner_whose_lanes_are_idle_takes_them_along_at_once(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()

    def train() -> None:
        learner = tiny_learner(Gated(gate, JsonlBackend(tmp_path / "log.jsonl")), executor=DaskExecutor(defer="always"))
        learner.fit(1)

    train()
    gc.collect()
    assert not names()


class Sizes(Callback):
    """Notes, late, how long a series was and what was its last value."""

    deferrable = True

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    def state_access(self) -> Access:
        return {"cbstate.metrics_step": Read()}

    def run_after(self) -> tuple[type[Callback], ...]:
        return (Metrics,)

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(0.005)
        self.found.append((len(learner.cbstate.metrics_step[phase]["Loss"]), self.read(learner, phase)))

    def read(self, learner: LearnerView, phase: Phase) -> float:
        """Return the newest loss."""
        value: float = learner.cbstate.metrics_step[phase]["Loss"].last()[1]
        return value

    def state_dict(self) -> dict[str, object]:
        return {"found": [list(one) for one in self.found]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.found = [(length, loss) for length, loss in state["found"]]


def test_what_is_pending_is_processed_before_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """Rules 21 and 26: a load takes series back and replaces the state that pending events are to change."""
    sizes = Sizes()
    learner = tiny_learner(sizes, Checkpointer(tmp_path), executor=DaskExecutor(defer="always"))
    learner.fit(1)
    saved = list(sizes.found)
    assert [length for length, _ in saved] == list(range(1, 17))
    for raw in learner.data[TrainingPhase]:
        learner.step(TrainingPhase, raw)
    learner.load(tmp_path)
    assert sizes.found == saved
    learner.flush()
    assert sizes.found == saved
    learner.close()
