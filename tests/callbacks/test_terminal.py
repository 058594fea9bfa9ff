"""Output to the terminal: what an import of flowtrain changes, and how a terminal is left when the program ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Programs, importing_the_same

TERMINAL = """
import os, sys
os.environ.update(TTY_COMPATIBLE="1", TERM="xterm", COLUMNS="40", LINES="8")
sys.stdout.isatty = lambda: True  # rich 13.7 does not know TTY_COMPATIBLE
"""


def printed(programs: Programs, program: str) -> str:
    """Run a program, assert that it succeeds, and return its output."""
    done = programs.run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("use", ["console()", "BottomLine.of(console()).show(progress)"])
def test_rich_draws_no_random_numbers_of_the_program(use: str, programs: Programs) -> None:
    """The import of rich draws random numbers; without a remedy, a run that prints would train differently."""
    program = (
        TERMINAL
        + f"""
import random
from flowtrain.callbacks.terminal import BottomLine, console
assert "rich" not in sys.modules
random.seed(0)
before = random.getstate()
def progress():
    from rich.progress import Progress  # which imports more of rich
    return Progress().get_renderable()
{use}
assert random.getstate() == before
"""
    )
    printed(programs, program)


def test_a_line_that_nobody_closed_is_given_back_when_the_program_ends(programs: Programs) -> None:
    program = (
        TERMINAL
        + """
from flowtrain.callbacks.terminal import BottomLine, console
BottomLine.of(console()).show(lambda: "shown")
print("printed")
"""
    )
    written = printed(programs, program)
    begin, end = "\x1bD\x1b[A\x1b7\x1b[1;7r\x1b8\x1b7\x1b[8;1H\x1b[2K", "\x1b7\x1b[8;1H\x1b[2K\x1b[r\x1b8"
    assert written == f"{begin}shown\x1b8printed\n{end}"


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "dumb"}])
def test_there_is_no_last_line_where_the_cursor_cannot_move(environment: dict[str, str], programs: Programs) -> None:
    program = f"""
import os
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
os.environ.update({environment!r})
from flowtrain.callbacks.terminal import BottomLine, console
print(BottomLine.of(console()))
"""
    assert printed(programs, program) == "None\n"


NOTEBOOK = """
from flowtrain import BatchEnd, TrainingPhase
from flowtrain.callbacks import CustomCallback, ProgressBar
from flowtrain.testing import tiny_learner
say = CustomCallback(lambda learner: print("printed"), BatchEnd, TrainingPhase, {})
tiny_learner(say, ProgressBar(redraw=0), n_batches=2).fit(1)
"""


def test_in_a_notebook_the_bar_is_one_output_that_ends_empty() -> None:
    """Tested with the messages that a kernel of Jupyter sends to its frontends; no widgets are needed."""
    pytest.importorskip("ipykernel")
    jupyter = pytest.importorskip("jupyter_client.manager")
    manager, client = jupyter.start_new_kernel(env=importing_the_same())
    try:
        client.execute(NOTEBOOK)
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["content"].get("execution_state") != "idle":
            messages.append(client.get_iopub_msg(timeout=120))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    shown = [each["content"] for each in messages if each["msg_type"].endswith("display_data")]
    text = "".join(each["content"]["text"] for each in messages if each["msg_type"] == "stream")
    assert [each["msg_type"] for each in messages if each["msg_type"] == "error"] == []
    assert text.count("printed\n") == text.count("\n") == 2
    assert len({each["transient"]["display_id"] for each in shown}) == 1
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", each["data"]["text/plain"]) for each in shown]
    bars = [re.fullmatch(r"(\w+) epoch 1/1 [━╸╺]+ (\d)/2 .{7} *\n(.*)\n", line) for line in lines[:-1]]
    assert [match and (match[1], match[2], bool(re.match(r"Loss \d", match[3]))) for match in bars] == [
        (phase, done, done != "0") for phase in ("TrainingPhase", "ValidationPhase") for done in "012"
    ]
    assert all("text/html" in each["data"] for each in shown[:-1])
    assert lines[-1] == ""


TRAINING = """
import sys
from flowtrain.callbacks import Metric, ModelSummary, Metrics, ProgressBar
from flowtrain.testing import tiny_learner
named = Metrics(Metric(lambda outputs, targets: 0.5, name="Pr\u00e9cision"))
learner = tiny_learner(ModelSummary(), named, ProgressBar(report=0), n_batches=2, default_callbacks=True)
learner.fit(2)
print(learner.cbstate.history, file=sys.stderr)
"""
COUNTS = "Counts(epochs=2, steps=4, steps_epoch=2, updates=4)"


def test_characters_that_the_output_cannot_write() -> None:
    environment = {**importing_the_same(), "PYTHONIOENCODING": "ascii"}
    run = [sys.executable, "-c", TRAINING]
    done = subprocess.run(run, env=environment, capture_output=True, encoding="ascii", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Pr?cision 0.5" in done.stdout
    assert "-----" in done.stdout, "the line below the titles of a table"
    assert COUNTS in done.stderr


FULL = "output = os.open('/dev/full', os.O_WRONLY)"
NO_READER = "reader, output = os.pipe(); os.close(reader)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no file that is always full")
@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (FULL + "; os.dup2(output, 1)", "OSError: [Errno 28] No space left on device"),
        (NO_READER + "; os.dup2(output, 1)", "BrokenPipeError: [Errno 32] Broken pipe"),
        ("sys.stdout.close()", "ValueError: I/O operation on closed file."),
    ],
    ids=["full", "no reader", "closed"],
)
def test_an_output_that_cannot_be_written(prepare: str, error: str, programs: Programs) -> None:
    done = programs.run(f"import os, sys\n{prepare}\n{TRAINING}")
    assert COUNTS in done.stderr
    assert done.stderr.count(f"The output of flowtrain cannot be written ({error}). Training continues without.") == 1
