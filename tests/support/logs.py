"""Reads the log of a `JsonlBackend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def log_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without the time of each."""
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in found]


def log_fields(path: Path, *names: str) -> list[tuple[Any, ...]]:
    """Return some fields of each record of a log."""
    return [tuple(record[name] for name in names) for record in log_records(path)]


def log_steps(path: Path) -> list[int]:
    """Return the step of each record of a log."""
    return [record["step"] for record in log_records(path)]
