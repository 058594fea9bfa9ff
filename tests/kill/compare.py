"""What a training leaves, compared with what the training has left that nobody killed."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.kill.training import LOGS
from tests.support.logs import log_records

__all__ = ["differences"]


def differences(whole: Path, found: Path) -> list[str]:
    """Return the kinds of things in which a training differs from the one that nobody has killed."""
    wanted, got = (torch.load(each / "result.pt", weights_only=True) for each in (whole, found))
    kinds = [kind for kind in wanted if not equal(wanted[kind], got[kind])]
    kinds += [log for log in LOGS if records(whole / log) != records(found / log)]
    return kinds + [f"left {each.name}" for each in found.rglob("*tmp")]


def records(log: Path) -> Any:
    """Return the records of a log in their order, without the times."""
    if log.suffix == ".jsonl":
        return log_records(log)
    if log.suffix == ".csv":
        with log.open(newline="") as file:
            return [{**row, "time": ""} for row in csv.DictReader(file)]
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, Any] = {}
    for path in sorted(log.rglob("*tfevents*")):
        events = [event for event in reader.EventFileLoader(str(path)).Load() if event.HasField("summary")]
        own = [(event.step, each.tag, str(each.tensor)) for event in events for each in event.summary.value]
        found.setdefault(path.parent.name, []).extend(own)
    return found


def equal(one: Any, other: Any) -> bool:
    """Tell whether two values of nested containers are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or repr(one) == repr(other)
