"""Printing must not change a run: rich draws random numbers when it is imported, and that is put right."""

from __future__ import annotations

import subprocess
import sys

import rich

from flowtrain.terminal import console

_PROGRAM = """
import random, sys
from flowtrain.terminal import console
random.seed(0)
assert "rich" not in sys.modules
console()
assert "rich.console" in sys.modules
print(random.random())
"""


def test_the_first_use_leaves_the_random_numbers_alone() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "0.8444218515250481\n"  # the first number after random.seed(0)


def test_it_is_the_console_that_a_user_sets_up() -> None:
    assert console() is rich.get_console()
