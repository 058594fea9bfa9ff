"""Rule 29 in real process groups: the workers of a data loader get the signal too, wherever training is.

One program interrupts all cases, in four processes side by side: torch may wait five seconds for workers that have
died. Each process is in a session of its own. Case after case it trains with workers, sends a signal to its whole
group, catches the `KeyboardInterrupt`, resumes, and compares the result with a run that was not interrupted.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from flowtrain import (
    BackwardEnd,
    BatchEnd,
    Callback,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    on,
)
from flowtrain.callbacks import Checkpointer, LogHistograms
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.programs import Programs

pytestmark = pytest.mark.slow

TERM, INT = signal.SIGTERM, signal.SIGINT


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples with random noise; a worker that finds the file `flag` sends the signal while training waits."""

    def __init__(self, flag: Path, number: signal.Signals) -> None:
        self.flag, self.number = flag, number

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with suppress(FileNotFoundError):  # only one worker sends the signal
            if self.flag.read_text() in ("", str(index)):
                time.sleep(0.3)  # until all batches before this one are trained
                self.flag.unlink()
                to_the_group(self.number)
        x = torch.full((3,), index / 24) + 0.1 * torch.randn(3)
        return x, x[:2] ** 2


class Signal(Callback):
    """Calls a function at the n-th event of a type, in training or in any phase."""

    def __init__(self, send: Callable[[], object], event: type[Event], at: int) -> None:
        self.send, self.event, self.at = send, event, at
        self.seen = 0

    @on(Event)
    def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if type(event) is self.event and type(phase) in (TrainingPhase, Phase):
            self.seen += 1
            if self.seen == self.at:
                self.send()


def to_the_group(number: signal.Signals) -> None:
    """Let another process signal the group: workers treat a signal from their parent as the end of the data."""
    kill(number, -os.getpgrp())
    let_them_die()


def to_the_workers(number: signal.Signals) -> None:
    kill(number, *(child.pid for child in multiprocessing.active_children()))
    let_them_die()


def let_them_die() -> None:
    """Wait until the workers have died, which must be before the batch ends; workers of dask stay alive."""
    deadline = time.monotonic() + 0.3
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.005)


def one_by_one(number: signal.Signals) -> None:
    to_the_workers(number)
    kill(number, os.getpid())


def kill(number: signal.Signals, *processes: int | None) -> None:
    command = ["kill", f"-{number.value}", "--", *map(str, processes)]
    subprocess.run(command, check=True, start_new_session=True)


# Where the signal is sent: from a handler, or, with "worker", from a worker while the training thread waits for it: at
# the sample of this index, or at the first sample that the worker draws.
CASES: dict[str, dict[str, Any]] = {
    "within a batch": {"event": BackwardEnd, "at": 8},
    "within a batch, the workers first": {"event": BackwardEnd, "at": 8, "send": one_by_one},
    "at the end of a batch": {"event": BatchEnd, "at": 9},
    "before the fit's first batch": {"event": FitBegin, "at": 1},
    "before an epoch's first batch": {"event": EpochBegin, "at": 2},
    "between epochs": {"event": EpochEnd, "at": 1},
    "waiting for the first batch": {"worker": "", "event": EpochBegin, "at": 2},
    "waiting for a batch": {"worker": "17", "event": EpochBegin, "at": 2},
    "waiting within an open accumulation group": {"worker": "17", "event": EpochBegin, "at": 2, "accumulate": 4},
    "within an open accumulation group": {"event": BackwardEnd, "at": 9, "accumulate": 4},
    "waiting in the only epoch": {"worker": "17", "event": EpochBegin, "at": 1, "fit": {"epochs": 1}},
    "waiting in a fit by steps": {"worker": "", "event": BatchEnd, "at": 9, "fit": {"steps": 15, "validate_every": 4}},
    "within a fit by steps": {"event": BackwardEnd, "at": 9, "fit": {"steps": 15, "validate_every": 4}},
}


def train(case: dict[str, Any], number: signal.Signals, folder: Path, *, interrupt: bool, **options: Any) -> list[Any]:
    """Return all results of a run of a case."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2))
    flag = folder / "flag"
    send = partial(case.get("send", to_the_group), number)
    if "worker" in case:
        send = partial(flag.write_text, case["worker"])
    start, executor = options.pop("start"), options.pop("executor")
    data = DataLoader(Noisy(flag, number), 4, shuffle=True, num_workers=2, multiprocessing_context=start)
    extra: list[Callback] = [Signal(send, case["event"], case["at"])] if interrupt else []
    if executor == "local":
        extra.append(LogHistograms(JsonlBackend(folder / "log.jsonl"), every=2))
    with Learner(
        model,
        torch.nn.functional.mse_loss,
        data=(data, DataLoader(Noisy(folder / "none", number), 12)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=[Checkpointer(folder), *extra],
        default_callbacks="quiet",
        core=TorchCore(device="cpu", accumulate=case.get("accumulate", 1)),
        executor=DaskExecutor("local", workers=1) if executor == "local" else executor,
    ) as learner:
        learner.fit(**case.get("fit", {"epochs": 3}), **options)
    metrics = learner.cbstate.metrics_epoch
    moments = learner.optimizer.state.values()
    optimizer = [{key: torch.as_tensor(value).tolist() for key, value in each.items()} for each in moments]
    return [
        {name: value.tolist() for name, value in model.state_dict().items()},
        optimizer,
        {repr(phase): list(metrics[phase]["Loss"]) for phase in metrics},
        {repr(phase): str(counts) for phase, counts in learner.cbstate.history.items()},
        torch.rand(1).item(),
    ]


@cache
def whole(accumulate: int, fit: str) -> list[Any]:
    """Return the results of runs without an interrupt, for the cases that train in the same way."""
    case = next(each for each in CASES.values() if way_of(each) == (accumulate, fit))
    with tempfile.TemporaryDirectory() as place:
        return train(case, TERM, Path(place), interrupt=False, start="fork", executor="serial")


def way_of(case: dict[str, Any]) -> tuple[int, str]:
    return case.get("accumulate", 1), str(case.get("fit"))


@dataclass(frozen=True)
class Job:
    """An interrupt of a case: the signal, how the workers of the data loader start, the executor, the case."""

    number: signal.Signals
    start: str
    executor: str
    case: str

    def say(self, text: str) -> None:
        """Print a line about this job, in one piece: several processes print into one file."""
        os.write(1, f"{self}: {text}\n".encode())

    def run(self) -> None:
        """Interrupt and resume the case; print this job and how it ended."""
        case, options = CASES[self.case], {"start": self.start, "executor": self.executor}
        text = "it was not interrupted"
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                train(case, self.number, folder, interrupt=True, **options)
            except KeyboardInterrupt as interrupt:
                text = str(interrupt)
            if text != f"training was interrupted by {self.number.name}":
                self.say(text)
            latest = (folder / "latest").read_text().strip() if (folder / "latest").exists() else "nothing"
            if latest != "interrupted.ckpt":
                self.say(f"the latest checkpoint is {latest}")
                return
            found = train(case, self.number, folder, interrupt=False, resume=folder, **options)
            wanted = whole(*way_of(case))
            self.say("equal" if found == wanted else f"{found} is not {wanted}")


AGAIN = ["within a batch", "waiting for a batch"]  # in a process that was interrupted before
GROUPS = {number.name: [Job(number, "fork", "serial", name) for name in [*CASES, *AGAIN]] for number in (TERM, INT)}
# Ctrl-C ends the workers of a fork server as if their work were done, so torch reports it only later.
GROUPS["workers that end without an error"] = [Job(INT, "forkserver", "serial", "waiting in the only epoch")]
GROUPS["callbacks in processes"] = [Job(TERM, "fork", "local", name) for name in AGAIN]
JOBS = list(chain.from_iterable(GROUPS.values()))
AT_ONCE = 4


def main() -> None:
    """Run all jobs: the program."""
    signal.signal(TERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["torch", "flowtrain_dask"])
    for case in CASES.values():
        whole(*way_of(case))
    gc.collect()  # in this process, whose children the workers of these runs were
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_in_a_session, args=(JOBS[first::AT_ONCE],)) for first in range(AT_ONCE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def run_in_a_session(jobs: list[Job]) -> None:
    os.setsid()
    for job in jobs:
        job.run()


@pytest.fixture(scope="module")
def ended(programs: Programs) -> str:
    """Return what the program prints."""
    done = programs.run(f"from {__name__} import main; main()", seconds=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_rule_29_a_signal_to_the_group_leaves_a_checkpoint_wherever_training_is(group: str, ended: str) -> None:
    lines = Counter(ended.splitlines())
    missing = Counter(f"{job}: equal" for job in GROUPS[group]) - lines
    assert not missing, ended


class Deadly(Noisy):
    """Samples of which one kills the worker that draws it, while the training thread waits."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 9:
            time.sleep(0.3)
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [signal.SIGKILL, TERM])
@pytest.mark.parametrize("waiting", [True, False])
def test_a_worker_that_dies_without_an_interrupt_is_an_error(
    waiting: bool, number: signal.Signals, tmp_path: Path
) -> None:
    """The batch in progress is completed; no checkpoint for an interrupt is written."""
    before = signal.getsignal(TERM), signal.getsignal(INT)
    data = (Deadly if waiting else Noisy)(tmp_path / "none", number)
    strike = Signal(partial(to_the_workers, number), BackwardEnd, 99 if waiting else 2)
    loader = DataLoader(data, 4, num_workers=1)
    learner = tiny_learner(Checkpointer(tmp_path), strike, data=loader, model=torch.nn.Linear(3, 2))
    died = r"DataLoader worker \(pid(\(s\))? \d+\) (is killed by signal: (Killed|Terminated)|exited unexpectedly)"
    with pytest.raises(RuntimeError, match=died):
        learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].steps == 2
    assert not (tmp_path / "interrupted.ckpt").exists()
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == before
