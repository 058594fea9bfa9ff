"""The terminal: what it does to a program that only imports it, and to a terminal that outlives the program."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("use", ["console()", "BottomLine.of(console()).show(progress)"])
def test_rich_draws_no_random_numbers_of_the_program(use: str) -> None:
    """rich draws when it is imported: a run that prints would be another run."""
    program = f"""
import random, sys
from flowtrain.callbacks.terminal import BottomLine, console
assert "rich" not in sys.modules
random.seed(0)
before = random.getstate()
import os
os.environ.update(TTY_COMPATIBLE="1", TERM="xterm", COLUMNS="40", LINES="8")
def progress():
    from rich.progress import Progress  # which imports more of rich
    return Progress().get_renderable()
{use}
assert random.getstate() == before
"""
    run(program)


def test_a_line_that_nobody_closed_is_given_back_when_the_program_ends() -> None:
    program = """
import os
os.environ.update(TTY_COMPATIBLE="1", TERM="xterm", COLUMNS="40", LINES="8")
from flowtrain.callbacks.terminal import BottomLine, console
BottomLine.of(console()).show(lambda: "shown")
print("printed")
"""
    written = run(program)
    begin, end = "\x1bD\x1b[A\x1b7\x1b[1;7r\x1b8\x1b7\x1b[8;1H\x1b[2K", "\x1b7\x1b[8;1H\x1b[2K\x1b[r\x1b8"
    assert written == f"{begin}shown\x1b8printed\n{end}"


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1", "TERM": "dumb"}])
def test_there_is_no_last_line_where_the_cursor_cannot_move(environment: dict[str, str]) -> None:
    program = f"""
import os
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
os.environ.update({environment!r})
from flowtrain.callbacks.terminal import BottomLine, console
print(BottomLine.of(console()))
"""
    assert run(program) == "None\n"
