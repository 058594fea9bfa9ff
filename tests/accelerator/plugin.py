"""The plugin that installs the simulated device in the process of pytest, before anything uses torch."""

from __future__ import annotations

from tests.accelerator.simulated.backend import install

install()
