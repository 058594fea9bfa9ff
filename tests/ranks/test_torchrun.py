"""Programs under torchrun itself: unchanged programs train on several ranks, and end as torchrun expects it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import importing_the_same

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


def torchrun(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program, given by the arguments of `python`, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return subprocess.run(
        [*command, "--no-python", sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=importing_the_same() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "100"},
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


def test_a_rank_that_fails_ends_the_program_with_its_reason(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAILING)
    done = torchrun(str(program))
    assert done.returncode == 1
    assert "ValueError: only here" in done.stderr
    assert "RemoteError: rank 1: ValueError: only here" in done.stderr
