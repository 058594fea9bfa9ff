"""Runs the tests on the simulated device in a separate process, because torch cannot unregister the device again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator.simulated.backend import can_install

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not can_install(), reason="this torch can have no device that is written in Python")
def test_on_the_simulated_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.accelerator", "-q"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
