"""Run tests on the simulated device: ``python -m tests.accelerator [--all] [arguments of pytest]``.

Without ``--all`` these are the tests of this folder. With ``--all`` the ordinary tests run with the simulated device as
the accelerator of the process, and learners that were told ``device="cpu"`` or nothing compute on it.
"""

from __future__ import annotations

import sys

import pytest

from tests.accelerator.simulated.backend import can_install

if not can_install():
    sys.exit("This torch can have no device that is written in Python.")
arguments = sys.argv[1:]
everything = "--all" in arguments
arguments = [each for each in arguments if each != "--all"]
plugin = "tests.accelerator.everything" if everything else "tests.accelerator.plugin"
if not any(not each.startswith("-") for each in arguments):
    arguments += ["tests", "--ignore=tests/accelerator"] if everything else ["tests/accelerator"]
sys.exit(pytest.main(["-p", plugin, "-p", "no:cacheprovider", *arguments]))
