"""Copies made as a snapshot makes them, and values to copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool


class Box:
    """A type without a copier."""

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
    """Return a new copying pass, with an empty memory of copied objects."""
    return Copying(COPIERS, Pool(1 << 20))


def copied(value: Any) -> Any:
    """Return the copy that a snapshot would hold of an entry of the batch."""
    return copying().entry(value, ("batch", "x"))
