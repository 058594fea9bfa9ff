"""Captures the output of rich's console."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import contextmanager

import rich


@contextmanager
def printed(width: int, *, terminal: bool = False) -> Generator[io.StringIO]:
    """Yield the output of rich's console as a file, or as a terminal of some columns; restore the console."""
    before = dict(rich.get_console().__dict__)
    written = io.StringIO()
    rich.reconfigure(file=written, force_terminal=terminal, width=width, _environ={})
    try:
        yield written
    finally:
        rich.get_console().__dict__ = before
