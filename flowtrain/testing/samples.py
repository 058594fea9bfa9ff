"""What the contract of backends logs: one loggable of each kind, and numbers as sinks keep them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from flowtrain.logging.backend import Figure, File, Histogram, Image, Loggable, Settings, Text, Value

__all__ = ["rounded", "samples", "single"]


def samples(folder: Path) -> Iterator[Loggable]:
    """Yield one loggable of each kind."""
    path = folder / "sample.txt"
    path.write_text("sample", "utf-8")
    yield Value(0.5)
    yield Image(torch.linspace(0, 1, 12).reshape(3, 2, 2))
    yield Text("**text**")
    yield Histogram(torch.arange(10.0))
    yield File(path)
    yield Settings({"batch_size": 32, "optimizer": {"name": "SGD", "momentum": None}, "tags": ["a", "b"]})
    if find_spec("matplotlib"):
        from matplotlib.figure import Figure as Drawing

        drawing = Drawing((1, 1))
        drawing.subplots().plot([1, 2])
        yield Figure(drawing)


def single(value: float) -> float:
    """Return a number as sinks with single precision keep it."""
    return float(torch.tensor(value, dtype=torch.float32))


def rounded(entries: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the values of ``(step, value)`` in the same way."""
    return [(step, single(value)) for step, value in entries]
