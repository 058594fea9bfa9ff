"""Plots of the recorded metrics, with matplotlib: what ``learner.plot`` does.

One axis for each metric, a colour for each phase: the values of the training batches, and the means of the epochs where
each ended. `flowtrain.curves` says which numbers, `flowtrain.figure` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from flowtrain.curves import Ends, curves, find_names
from flowtrain.errors import UsageError
from flowtrain.phases import AbstractTrainingPhase

__all__ = ["plot", "save"]


def plot(metrics: Sequence[str], cbstate: Any, ends: Mapping[str, Ends], to: str | PathLike[str] | None = None) -> Any:
    """Draw metrics; return a ``matplotlib.figure.Figure``, made without pyplot.

    Args:
        metrics: Their names; all that are recorded if there is none.
        cbstate: What callbacks share.
        ends: Where the epochs of each phase ended; see `flowtrain.callbacks.Recorder`.
        to: A file to write it to as well; its ending says in which format. Folders that are missing are made.

    Raises:
        UsageError: matplotlib is not installed, no such metric is recorded, or matplotlib does not write such files.
    """
    try:
        from flowtrain.figure import CurveFigure
    except ImportError as error:
        raise UsageError(
            f"plot() draws with matplotlib, and {error.name} is not installed: pip install 'flowtrain[plot]'"
        ) from error
    panels = [curves(name, cbstate, ends) for name in find_names(metrics, cbstate)]
    trained = any(isinstance(curve.phase, AbstractTrainingPhase) for panel in panels for curve in panel)
    figure = CurveFigure(panels, "training batches" if trained else "batches")
    if to is not None:
        save(figure, Path(to))
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file; folders that are missing are made.

    Raises:
        UsageError: matplotlib does not write such files.
    """
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"plot(to={str(path)!r}): the ending says in which format the file is written, and {path.suffix!r} is "
            f"none of {', '.join(formats)}. Write plot(to='loss.png')."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
