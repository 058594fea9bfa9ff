"""Plots of the recorded metrics, drawn with matplotlib for ``learner.plot``.

A figure has a panel for each metric and a colour for each phase, with the values of the training batches and the means
of the epochs. `curves` returns these numbers, `draw` draws them.

The horizontal axis is the number of complete training batches. The mean of a training epoch is drawn at the end of the
epoch, the mean of a validation epoch at the number of training batches before it. Without a training phase, each phase
counts its own batches. If several evaluations belong to one training epoch, the newest value belongs to the newest one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.errors.describing import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "Ends",
    "curves",
    "draw",
    "figure_type",
    "find_names",
    "plot",
    "save",
]


def plot(metrics: Sequence[str], cbstate: Any, ends: Mapping[str, Ends], to: str | PathLike[str] | None = None) -> Any:
    """Draw metrics; return a ``matplotlib.figure.Figure``, made without pyplot.

    Args:
        metrics: The names of the metrics; all recorded metrics if it is empty.
        cbstate: The shared state of the callbacks.
        ends: The ends of the epochs of each phase; see `flowtrain.callbacks.Recorder`.
        to: The path of a file to write as well, in the format of its suffix. Missing folders are made.

    Raises:
        UsageError: matplotlib is not installed, a metric is not recorded, or matplotlib does not write files with this
            suffix.
    """
    figure_type()  # before the metrics are looked for, so that a missing matplotlib is the first error
    panels = [curves(name, cbstate, ends) for name in find_names(metrics, cbstate)]
    trained = any(isinstance(curve.phase, AbstractTrainingPhase) for panel in panels for curve in panel)
    figure = draw(panels, "training batches" if trained else "batches")
    if to is not None:
        save(figure, Path(to))
    return figure


def figure_type() -> type[Figure]:
    """Return the type of figures for plots. A notebook shows such a figure as a picture.

    A figure of this type is made without pyplot, so it has no window and no state that another thread could draw into,
    and need not be closed. The type is made here because flowtrain imports matplotlib only when a plot is drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"plot() draws with matplotlib, and {error.name} is not installed: pip install 'flowtrain[plot]'"
        ) from error

    class PlotFigure(Figure):
        """A figure that a notebook shows."""

        def _repr_png_(self) -> bytes:
            """Return the picture, for a notebook."""
            file = BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return PlotFigure


def draw(panels: Sequence[Sequence[Curve]], over: str) -> Figure:
    """Draw the curves of several metrics, one panel below the other over one horizontal axis.

    Values of batches are thin and pale lines, the means of epochs are dots on a line; each phase has its colour.

    Args:
        panels: The curves of each metric.
        over: The label of the horizontal axis.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = figure_type()(figsize=(7.0, 0.5 + 2.5 * len(panels)), layout="constrained")
    from matplotlib.ticker import MaxNLocator

    phases = list(dict.fromkeys(curve.phase for panel in panels for curve in panel))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        for curve in panel:
            colour = f"C{phases.index(curve.phase)}"
            if curve.each == "batch":
                axes.plot(
                    curve.x, curve.y, color=colour, linewidth=0.8, alpha=0.4, label=f"{curve.phase!r}, each batch"
                )
            else:
                axes.plot(curve.x, curve.y, color=colour, marker="o", markersize=4, label=repr(curve.phase))
        axes.set_ylabel(panel[0].metric if panel else "")
        axes.grid(alpha=0.3)
        if panel:
            axes.legend()
    grid[-1, 0].set_xlabel(over)
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file. Missing folders are made.

    Raises:
        UsageError: matplotlib does not write files with this suffix.
    """
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"plot(to={str(path)!r}): the ending says in which format the file is written, and {path.suffix!r} is "
            f"none of {', '.join(formats)}. Write plot(to='loss.png')."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


Ends: TypeAlias = Sequence[tuple[int, int, int, int]]
"""A tuple for each epoch of a phase: its number, and the numbers at its end of the complete batches of the phase, the
complete batches of training, and the updates of training.

The number of an epoch is defined by `flowtrain.state.by_phase.epoch_of`."""


@dataclass(frozen=True)
class Curve:
    """The values of one metric in one phase.

    Attributes:
        metric: The name of the metric.
        phase: The phase.
        each: ``"batch"`` if there is a value for each batch, ``"epoch"`` if there is one for each epoch.
        x: The number of complete batches at each value.
        y: The values.
    """

    metric: str
    phase: Phase
    each: str
    x: Sequence[float]
    y: Sequence[float]


def find_names(wanted: Sequence[str], cbstate: Any) -> list[str]:
    """Return the names of the recorded metrics that a user names, or of all recorded metrics.

    Upper and lower case need not match if only one name fits.

    Args:
        wanted: The names by the user; all recorded metrics if it is empty.
        cbstate: The shared state of the callbacks.

    Raises:
        UsageError: No metric is recorded, or none of that name.
    """
    known = list(dict.fromkeys(name for each in _containers(cbstate) for series in each.values() for name in series))
    # A lookup alone may have made a series, so empty ones are left out.
    known = [name for name in known if any(_series(each, name) for each in _containers(cbstate))]
    if not known:
        raise UsageError("There is nothing to plot: no metric has been recorded yet. Call fit() first.")
    return [_find(name, known) for name in wanted] or known


def curves(metric: str, cbstate: Any, ends: Mapping[str, Ends]) -> list[Curve]:
    """Return the curves of one metric: for each phase the curve of batches and then the curve of epochs.

    Args:
        metric: The name of the metric.
        cbstate: The shared state of the callbacks.
        ends: The ends of the epochs of each phase, by the name of the phase.
    """
    by_batch, by_epoch = _containers(cbstate)
    trained = any(isinstance(phase, AbstractTrainingPhase) for phase in (*by_batch, *by_epoch))
    found: list[Curve] = []
    for phase in dict.fromkeys([*by_batch, *by_epoch]):
        ended = ends.get(repr(phase), ())
        batches, epochs = _pairs(by_batch, phase, metric), _pairs(by_epoch, phase, metric)
        # The batches of an evaluation are left out beside training, since no training batch separates them.
        if batches and (not trained or isinstance(phase, AbstractTrainingPhase)):
            shifts = _shifts([step for step, _ in batches], ended) if trained else [0] * len(batches)
            x = [step + shift for (step, _), shift in zip(batches, shifts, strict=True)]
            found.append(Curve(metric, phase, "batch", x, [value for _, value in batches]))
        placed = _placed(epochs, [(epoch, total if trained else own) for epoch, own, total, _ in ended])
        if placed:
            found.append(Curve(metric, phase, "epoch", [x for x, _ in placed], [y for _, y in placed]))
    return found


def _shifts(steps: Iterable[int], ended: Ends) -> list[int]:
    """Return, for each batch of a training phase, how many batches of other training phases come before it."""
    last = [own for _, own, *_ in ended]
    shifts = [total - own for _, own, total, _ in ended]
    # A batch after the last end belongs to an epoch that did not end, and has the shift of the last end.
    return [shifts[min(bisect_left(last, step), len(last) - 1)] if last else 0 for step in steps]


def _placed(epochs: Sequence[tuple[int, float]], ended: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """Return the position and value of each epoch whose end is known.

    Args:
        epochs: The number of the epoch and the value.
        ended: The number of each epoch that has ended and its position.
    """
    places: dict[int, list[int]] = {}
    for epoch, x in ended:
        places.setdefault(epoch, []).append(x)
    # Backwards, because of several values of one epoch the newest belongs to its newest end.
    found = [(places[epoch].pop(), value) for epoch, value in reversed(epochs) if places.get(epoch)]
    return found[::-1]


def _containers(cbstate: Any) -> tuple[Any, Any]:
    """Return the maps of series that `Metrics` has recorded, of batches and of epochs."""
    return (
        cbstate.metrics_step if "metrics_step" in cbstate else {},
        cbstate.metrics_epoch if "metrics_epoch" in cbstate else {},
    )


def _series(container: Any, name: str) -> bool:
    return any(len(series[name]) for series in container.values() if name in series)


def _pairs(container: Any, phase: Phase, name: str) -> list[tuple[int, float]]:
    series = container.get(phase, {})
    return list(series[name]) if name in series else []


def _find(name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    text = name.lower() if is_a(name, str) else ""
    alike = [each for each in known if each.lower() == text]
    if len(alike) == 1:
        return alike[0]
    raise UsageError(
        f"There is no metric {name!r} to plot; recorded are {', '.join(known)}.{nearest(str(name), known)}"
    )
