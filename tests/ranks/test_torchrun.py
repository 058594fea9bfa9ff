"""Programs under torchrun itself: unchanged programs train on several ranks, and end as torchrun expects it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import parse_args

from tests.support.logs import log_records
from tests.support.programs import importing_the_same
from tests.support.ranks import Ranks, returned

pytestmark = pytest.mark.slow

FAILING = """
import os
import torch
from flowtrain import BatchBegin, Callback, Learner, on
from flowtrain.testing import TinyModel

class Fails(Callback):
    ranks = "every"

    @on(BatchBegin)
    def fail(self, event, phase, learner):
        if os.environ["RANK"] == "1":
            raise ValueError("only here")

random = torch.Generator().manual_seed(int(os.environ["RANK"]))
data = [(x, 3 * x) for x in torch.randn(4, 8, 1, generator=random)]
Learner(TinyModel(), torch.nn.functional.mse_loss, data=data, callbacks=[Fails()], default_callbacks=False).fit(1)
"""

KILLED = """
import os
import signal
import sys
from functools import partial
from pathlib import Path
import torch
from flowtrain import BatchBegin, Callback, Learner, Read, TrainingPhase, on
from flowtrain.callbacks import Checkpointer, LogMetrics
from flowtrain.logging import CsvBackend, JsonlBackend

folder, life, rank = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
killed = dict(enumerate(sys.argv[2].split())).get(life, "")

class Kill(Callback):
    ranks = "every"
    may_cancel = False

    @on(BatchBegin, TrainingPhase)
    def kill(self, event, phase, learner):
        if killed == f"{rank}:{learner.cbstate.history[phase].steps}":
            os.kill(os.getpid(), signal.SIGKILL)

    def state_access(self):
        return {"cbstate.history": Read()}

torch.manual_seed(3)
layers = torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
model = torch.nn.Sequential(*layers)
torch.manual_seed(rank)
random = torch.Generator().manual_seed(rank)
data = [(x, 3 * x[:, :1]) for x in torch.randn(5, 8, 2, generator=random)]
logs = LogMetrics(JsonlBackend(folder / "log.jsonl"), CsvBackend(folder / "log.csv"))
learner = Learner(
    model, torch.nn.functional.mse_loss, data=data, optimizer=partial(torch.optim.AdamW, lr=0.01),
    callbacks=[Kill(), logs, Checkpointer(folder, every_steps=2, monitor=None)], default_callbacks="quiet",
)
if rank == 0:
    folder.mkdir(exist_ok=True)
    with (folder / "lives").open("a") as file:
        file.write(str(life))
learner.fit(3, resume="auto")
torch.save(model.state_dict(), folder / f"{rank}.pt")
"""


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "COLUMNS": "100",
}


def torchrun(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program, given by the arguments of `python`, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, "--no-python", sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=importing_the_same() | ENVIRONMENT,
    )


def test_the_example_trains_on_two_ranks_and_its_callbacks_print_once() -> None:
    done = torchrun("-m", "flowtrain.examples.digits", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(r"Accuracy on held-out digits: ([\d.]+)%", done.stdout)
    assert len(accuracies) == 2  # printed by the program itself, on each rank
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0]) > 80
    printed = [line.split()[:3] for line in done.stdout.splitlines() if re.match(r"epoch +\d", line)]
    phases = ("TrainingPhase", "ValidationPhase")
    assert printed == [["epoch", epoch, phase] for epoch in ("1", "2") for phase in phases]


def test_an_option_that_begins_like_one_of_torchrun_comes_after_two_dashes() -> None:
    options = ["--standalone", "--nproc-per-node", "1"]
    with pytest.raises(SystemExit) as refused:
        parse_args([*options, "program.py", "--log", "runs/a"])
    assert refused.value.code == 2
    found = parse_args([*options, "--", "program.py", "--log", "runs/a"])
    assert (found.training_script, found.training_script_args) == ("program.py", ["--log", "runs/a"])


def test_a_rank_that_fails_ends_the_program_with_its_reason(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAILING)
    done = torchrun(str(program))
    assert done.returncode == 1
    assert "ValueError: only here" in done.stderr
    assert "RemoteError: rank 1: ValueError: only here" in done.stderr


def undisturbed(program: str, folder: str) -> None:
    """Run the program on ranks that are not killed, and that torchrun has not started."""
    sys.argv = [program, folder, ""]
    runpy.run_path(program, run_name="__main__")


def test_torchrun_starts_killed_ranks_again_and_the_training_continues_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 1 is killed in the second epoch, and in its second life the main rank in the third one."""
    program, whole, killed = tmp_path / "program.py", tmp_path / "whole", tmp_path / "killed"
    program.write_text(KILLED)
    returned(ranks.run_on(2, 60, undisturbed, str(program), str(whole)))
    options = "--max-restarts", "2", "--monitor-interval", "0.1"
    done = torchrun(str(program), str(killed), "1:7 0:13", options=options)
    assert done.returncode == 0, done.stderr
    assert (killed / "lives").read_text() == "012"
    for number in range(2):
        one, other = (torch.load(folder / f"{number}.pt") for folder in (whole, killed))
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    logs = [log_records(folder / "log.jsonl") for folder in (whole, killed)]
    assert len(logs[0]) == 3 * (5 + 1)
    assert logs[0] == logs[1]
    assert (whole / "log.csv").read_text().count("\n") == (killed / "log.csv").read_text().count("\n") == 19
