"""Copies as a snapshot takes them, and values to copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flowtrain_dask.snapshots.copiers import Copying, Pool


class Box:
    """A type that nobody knows."""

    def __init__(self, content: Any) -> None:
        self.content = content


@dataclass(frozen=True)
class Frozen:
    """A dataclass whose fields cannot be set."""

    x: Any
    y: int = 0


def tensor(size: int = 400) -> torch.Tensor:
    """Return a tensor whose elements all differ."""
    return torch.arange(float(size))


def copying() -> Copying:
    """Return a new pass of copying, with memory of its own."""
    return Copying(Pool(1 << 20))


def copied(value: Any) -> Any:
    """Return a copy of what an entry of the batch holds."""
    return copying().entry(value, ("batch", "x"))
