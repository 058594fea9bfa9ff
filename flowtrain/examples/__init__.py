"""Whole programs to read and to run: ``python -m flowtrain.examples.digits``."""

from __future__ import annotations

__all__: list[str] = []
