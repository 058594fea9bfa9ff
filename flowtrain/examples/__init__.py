"""Examples: whole programs to read and to run, such as ``python -m flowtrain.examples.digits``."""

from __future__ import annotations

__all__: list[str] = []
