"""Loggables: what can be logged. Each holds what a callback gives it; a backend turns it into bytes.

What is logged has a name, a step and a group, which says what the step counts: ``("Step", "TrainingPhase")``,
``("Epoch", "ValidationPhase")``. Backends show the three parts as one path: ``Step/TrainingPhase/Loss``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

__all__ = ["Figure", "File", "Group", "Histogram", "Image", "Loggable", "Settings", "Text", "Value"]


Group: TypeAlias = tuple[str, ...]
"""What a step counts, and where: ``("Step", "TrainingPhase")``."""


@dataclass(frozen=True, eq=False)
class Loggable:
    """Base of what can be logged."""


@dataclass(frozen=True, eq=False)
class Value(Loggable):
    """A number.

    Args:
        value: A number, or a tensor or array with one element. NaN and infinite values are values like any other.
    """

    value: Any


@dataclass(frozen=True, eq=False)
class Image(Loggable):
    """A picture.

    Args:
        image: A tensor or array of shape (height, width), (channels, height, width) or (height, width, channels), with
            1, 3 or 4 channels; floating values from 0 to 1, or whole numbers from 0 to 255. What lies outside of that
            is cut off, and NaN is black. A shape that fits two of these has its channels first.
    """

    image: Any


@dataclass(frozen=True, eq=False)
class Text(Loggable):
    """A text; backends that can show Markdown do."""

    text: str


@dataclass(frozen=True, eq=False)
class Histogram(Loggable):
    """How values are distributed.

    Args:
        values: A tensor or array of any shape. NaN and infinite values are left out, and counted where the backend can
            say so.
        bins: How many bins of equal width there are.
    """

    values: Any
    bins: int = 64


@dataclass(frozen=True, eq=False)
class Figure(Loggable):
    """A drawing of matplotlib: a ``matplotlib.figure.Figure``, made without pyplot."""

    figure: Any


@dataclass(frozen=True, eq=False)
class File(Loggable):
    """A whole file, kept under the name it is logged with.

    Args:
        path: Where it is now; it is read when it is logged.
    """

    path: str | PathLike[str]


@dataclass(frozen=True, eq=False)
class Settings(Loggable):
    """The settings of a run, such as the batch size: trackers list and compare runs by them.

    Args:
        values: By name: numbers, texts, ``None``, and lists and mappings of these.
    """

    values: Mapping[str, Any]
