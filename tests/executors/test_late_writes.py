"""``Write(lag=n)``: what a handler writes arrives at the same event under every executor, and nothing else differs.

Drawn are callbacks that write with lags at any events, with conditions, beside callbacks that read the entries and
steer training by them; fits that a callback ends early; and fits that resume under another executor. Rule 44.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CancelFittingException,
    EpochEnd,
    Event,
    LearnerView,
    MissingStateError,
    NoConflict,
    Phase,
    Read,
    Resolution,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.callback.handler import Handler
from flowtrain.callbacks import Checkpointer, throttle
from flowtrain.graph.executor import Executor
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.examples import examples

EPOCHS, BATCHES = 4, 4


@dataclass(frozen=True)
class Spec:
    """A callback that writes entry number `entry` with a lag, after every n-th event of a type."""

    entry: int
    lag: int
    event: type[Event]
    every: int
    reads: int


class Writes(Callback):
    """Writes the sum of the parameters, and what it reads of another entry, with a lag."""

    deferrable = True
    stochastic = False

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.name = f"Writes {spec.entry}"
        self.calls = 0

    def state_access(self) -> Access:
        late = Write(lag=self.spec.lag)
        mine: Access = {f"cbstate.e{self.spec.entry}": late, f"cbstate.tracehistory.S{self.spec.entry}": late}
        return {f"cbstate.e{self.spec.reads}": Read(optional=True), "params": Read(), **mine}

    def setup(self, learner: LearnerView) -> None:
        setattr(learner.cbstate, f"e{self.spec.entry}", None)

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        yield type(self), Handler(self.spec.event, TrainingPhase, None, "Writes", "act")

    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.calls += 1
        total = sum(parameter.sum() for parameter in learner.params.values())
        read = getattr(learner.cbstate, f"e{self.spec.reads}")
        seen = None if read is None else read["call"]
        setattr(learner.cbstate, f"e{self.spec.entry}", {"call": self.calls, "total": total, "seen": seen})
        learner.cbstate.tracehistory[phase].push(f"S{self.spec.entry}", total, self.calls)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state["calls"]


class Steering(Callback):
    """Reads all entries at every batch and epoch, and changes the learning rate and ends the fit by them."""

    def __init__(self, entries: int, stop: int | None) -> None:
        self.entries, self.stop = entries, stop
        self.seen: list[Any] = []

    def state_access(self) -> Access:
        read = {f"cbstate.e{entry}": Read(optional=True) for entry in range(self.entries)}
        return {**read, "optimizer.hyperparams": Write()}

    @on(BatchEnd, TrainingPhase)
    def batch(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.look(learner)

    def look(self, learner: LearnerView) -> None:
        found = [getattr(learner.cbstate, f"e{entry}") for entry in range(self.entries)]
        stamps = [learner.arrival(f"cbstate.e{entry}") for entry in range(self.entries)]
        calls = [0 if each is None else each["call"] for each in found]
        totals = [0.0 if each is None else float(each["total"]) for each in found]
        self.seen.append((calls, totals, [None if each is None else tuple(each) for each in stamps]))
        learner.optimizer.hyperparams[0]["lr"] = 0.1 / (1 + sum(calls))
        if len(self.seen) == self.stop:
            raise CancelFittingException("enough")

    @on(EpochEnd, TrainingPhase)
    def epoch(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.look(learner)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = list(state["seen"])


class Saves(Callback):
    """Requests a checkpoint after some batch, which a fit can resume from."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after
        self.batches = 0

    @on(BatchEnd, TrainingPhase)
    def save(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.batches += 1
        if self.batches == self.after:
            learner.request_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Any) -> None:
        self.batches = state["batches"]


def specs() -> st.SearchStrategy[list[Spec]]:
    def numbered(found: Sequence[tuple[int, type[Event], int, int]]) -> list[Spec]:
        return [Spec(at, lag, event, every, reads % len(found)) for at, (lag, event, every, reads) in enumerate(found)]

    one = st.tuples(st.integers(1, 3), st.sampled_from((BatchEnd, EpochEnd)), st.integers(1, 2), st.integers(0, 2))
    return st.lists(one, min_size=1, max_size=3).map(numbered)


def plain(value: Any) -> Any:
    """Return a value with tensors as lists, so that values can be compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {key: plain(item) for key, item in value.items()} if hasattr(value, "items") else value


def trained(
    drawn: list[Spec], executor: Executor | str, stop: int | None, file: Path, after: int, resume: Path | None = None
) -> Any:
    """Return everything that a fit leaves."""
    writers = [throttle(Writes(spec), spec.event, every=spec.every) for spec in drawn]
    steering = Steering(len(drawn), stop)
    with tiny_learner(steering, Saves(file, after), *writers, n_batches=BATCHES, executor=executor) as learner:
        learner.fit(EPOCHS, resume=resume)
        series = {name: list(each) for name, each in learner.cbstate.tracehistory[TrainingPhase].items()}
        entries = [plain(getattr(learner.cbstate, f"e{spec.entry}")) for spec in drawn]
        calls = [each.calls for each in writers]
        return learner.model.coeff.tolist(), series, entries, calls, steering.seen


@given(specs(), st.none() | st.integers(1, 20), st.integers(1, 15))
@settings(max_examples=examples(12), deadline=None)
def test_every_executor_gives_the_serial_result_and_so_does_a_resumed_fit(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Spec], stop: int | None, after: int
) -> None:
    folder = tmp_path_factory.mktemp("late")
    serial = trained(drawn, "serial", stop, folder / "serial.ckpt", after)
    for defer in ("always", "auto"):
        file = folder / f"{defer}.ckpt"
        assert trained(drawn, DaskExecutor(defer=defer), stop, file, after) == serial
    for at, executor in (("serial", DaskExecutor(defer="always")), ("always", "serial")):
        if (file := folder / f"{at}.ckpt").exists():
            assert trained(drawn, executor, stop, folder / "again.ckpt", 99, resume=file) == serial


@pytest.mark.slow
def test_processes_give_the_serial_result(tmp_path: Path) -> None:
    drawn = [Spec(0, 1, BatchEnd, 1, 1), Spec(1, 2, EpochEnd, 1, 0), Spec(2, 3, BatchEnd, 2, 2)]
    serial = trained(drawn, "serial", None, tmp_path / "serial.ckpt", 6)
    with DaskLocal() as executor:
        assert trained(drawn, executor, None, tmp_path / "local.ckpt", 6) == serial
    with DaskLocal() as executor:
        assert trained(drawn, executor, None, tmp_path / "again.ckpt", 99, resume=tmp_path / "serial.ckpt") == serial
    assert trained(drawn, "serial", None, tmp_path / "again.ckpt", 99, resume=tmp_path / "local.ckpt") == serial


class DaskLocal:
    """An executor with worker processes, closed at the end."""

    def __enter__(self) -> DaskExecutor:
        self.executor = DaskExecutor("local", workers=1, defer="always")
        return self.executor

    def __exit__(self, *failure: object) -> None:
        self.executor.close()


class Slowly(Writes):
    """Takes so long that an interrupt comes before it has finished."""

    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        time.sleep(1.5)  # more than the second that the checkpoint of an interrupt waits
        super().act(event, phase, learner)


class Interrupts(Callback):
    """Sends the signal of Ctrl-C in the second batch of an epoch, when the handler of the epoch before is at work."""

    def __init__(self) -> None:
        self.batches = 0

    @on(BatchEnd, TrainingPhase)
    def interrupt(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.batches += 1
        if self.batches == BATCHES + 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the signal would end the process")
@pytest.mark.parametrize("resumed", ["serial", "dask"])
def test_a_write_that_an_interrupt_finds_at_work_arrives_in_the_resumed_fit(tmp_path: Path, resumed: str) -> None:
    spec = Spec(0, 1, EpochEnd, 1, 0)
    serial = trained([spec], "serial", None, tmp_path / "none.ckpt", 99)
    callbacks = Steering(1, None), Slowly(spec), Interrupts(), Checkpointer(tmp_path / "run")
    executor = DaskExecutor(defer="always", drain_timeout=5)
    learner = tiny_learner(*callbacks, n_batches=BATCHES, executor=executor)
    with learner, pytest.raises(KeyboardInterrupt):
        learner.fit(EPOCHS)
    after = "serial" if resumed == "serial" else DaskExecutor(defer="always")
    steering = Steering(1, None)
    again = steering, Slowly(spec), Interrupts(), Checkpointer(tmp_path / "run")
    again[2].batches = 99
    with tiny_learner(*again, n_batches=BATCHES, executor=after) as learner:
        learner.fit(EPOCHS, resume=tmp_path / "run")
    assert steering.seen == serial[-1]


class Fails(Callback):
    """Writes the number of the call with a lag, and fails at the second one."""

    deferrable = True
    stochastic = False

    def __init__(self) -> None:
        self.calls = 0

    def state_access(self) -> Access:
        return {"cbstate.score": Write(lag=1)}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.score = 0

    @on(EpochEnd, TrainingPhase)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.calls += 1
        if self.calls == 2:
            raise ValueError("the second score")
        learner.cbstate.score = self.calls


class Reads(Callback):
    """Keeps what it reads."""

    def __init__(self, *, optional: bool = False) -> None:
        self.optional = optional
        self.seen: list[Any] = []

    def state_access(self) -> Access:
        return {"cbstate.score": Read(optional=self.optional)}

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return NoConflict()

    @on(EpochEnd, TrainingPhase)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.seen.append(learner.cbstate.score)


@pytest.mark.parametrize("defer", ["never", "always", "auto"])
def test_a_failure_is_raised_at_the_arrival_at_the_latest(defer: Any) -> None:
    reads = Reads()
    learner = tiny_learner(reads, Fails(), executor=DaskExecutor(defer=defer))
    with learner, pytest.raises(ValueError, match="the second score"):
        learner.fit(5)
    assert reads.seen == [0, 1]


@pytest.mark.parametrize("defer", ["always", "auto"])
def test_readers_are_told_that_a_lane_has_retired(defer: Any) -> None:
    reads = Reads(optional=True)
    with tiny_learner(reads, Fails(), executor=DaskExecutor(defer=defer, on_error="warn")) as learner:
        learner.fit(5)
    assert reads.seen == [0, 1, None, None, None]
    learner = tiny_learner(Reads(), Fails(), executor=DaskExecutor(defer=defer, on_error="warn"))
    with learner, pytest.raises(MissingStateError, match=r"Reads reads Learner.cbstate.score"):
        learner.fit(5)
