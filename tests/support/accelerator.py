"""The accelerator for tests that need one: the machine's own, or the simulated one of ``tests/accelerator``."""

from __future__ import annotations

import pytest

from flowtrain.state.accelerator import accelerator

__all__ = ["DEVICE", "needs_accelerator"]

DEVICE = str(accelerator() or "cpu")

needs_accelerator = pytest.mark.skipif(accelerator() is None, reason="needs an accelerator")
