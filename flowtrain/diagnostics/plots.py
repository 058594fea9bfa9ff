"""Plots of the recorded metrics, with matplotlib: what ``learner.plot`` does.

One axis for each metric, a colour for each phase: the values of the training batches, and the means of the epochs where
each ended. `flowtrain.diagnostics.plots` says which numbers, `flowtrain.diagnostics.figure` draws them.

Curves: what there is to draw of the recorded metrics, as numbers.

Everything lies over the number of training batches completed. So the mean of a training epoch is where the epoch ended,
and that of a validation epoch where training stood then. Where nothing is trained, a phase's own batches count.
Several evaluations may belong to one training epoch: the newest values go with the newest of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.errors import UsageError, is_a, nearest

__all__ = [
    "Curve",
    "Ends",
    "curves",
    "find_names",
    "plot",
    "save",
]


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
        from flowtrain.diagnostics.figure import CurveFigure
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


Ends: TypeAlias = Sequence[tuple[int, int, int]]
"""For each epoch of a phase its number, and how many batches were completed at its end: in the phase, and in training.

The number is that of `flowtrain.state.by_phase.epoch_of`."""


@dataclass(frozen=True)
class Curve:
    """The values of one metric in one phase.

    Attributes:
        metric: The metric's name.
        phase: The phase.
        each: What a value belongs to: ``"batch"`` or ``"epoch"``.
        x: Batches completed, one number for each value.
        y: The values.
    """

    metric: str
    phase: Phase
    each: str
    x: Sequence[float]
    y: Sequence[float]


def find_names(wanted: Sequence[str], cbstate: Any) -> list[str]:
    """Return the names of recorded metrics that are meant; all of them if none is given.

    Capital letters need not be right, if only one name fits.

    Raises:
        UsageError: Nothing is recorded, or nothing of that name.
    """
    known = list(dict.fromkeys(name for each in _containers(cbstate) for series in each.values() for name in series))
    known = [name for name in known if any(_series(each, name) for each in _containers(cbstate))]
    if not known:
        raise UsageError("There is nothing to plot: no metric has been recorded yet. Call fit() first.")
    return [_find(name, known) for name in wanted] or known


def curves(metric: str, cbstate: Any, ends: Mapping[str, Ends]) -> list[Curve]:
    """Return the curves of one metric: by batch, then by epoch, for each phase.

    Args:
        metric: Its name.
        cbstate: What callbacks share.
        ends: Where the epochs of each phase ended, by the phase's name.
    """
    by_batch, by_epoch = _containers(cbstate)
    trained = any(isinstance(phase, AbstractTrainingPhase) for phase in (*by_batch, *by_epoch))
    found: list[Curve] = []
    for phase in dict.fromkeys([*by_batch, *by_epoch]):
        ended = ends.get(repr(phase), ())
        batches, epochs = _pairs(by_batch, phase, metric), _pairs(by_epoch, phase, metric)
        if batches and (not trained or isinstance(phase, AbstractTrainingPhase)):  # others stand still in between
            shifts = _shifts([step for step, _ in batches], ended) if trained else [0] * len(batches)
            x = [step + shift for (step, _), shift in zip(batches, shifts, strict=True)]
            found.append(Curve(metric, phase, "batch", x, [value for _, value in batches]))
        placed = _placed(epochs, [(epoch, total if trained else own) for epoch, own, total in ended])
        if placed:
            found.append(Curve(metric, phase, "epoch", [x for x, _ in placed], [y for _, y in placed]))
    return found


def _shifts(steps: Iterable[int], ended: Ends) -> list[int]:
    """Return, for each batch of a training phase, how many batches other phases had trained before its epoch ended."""
    last = [own for _, own, _ in ended]
    shifts = [total - own for _, own, total in ended]
    # What lies behind the last end belongs to an epoch that did not end; it counts on from there.
    return [shifts[min(bisect_left(last, step), len(last) - 1)] if last else 0 for step in steps]


def _placed(epochs: Sequence[tuple[int, float]], ended: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
    """Return ``(x, value)`` of each value whose epoch is known; both arguments begin with the number of the epoch."""
    places: dict[int, list[int]] = {}
    for epoch, x in ended:
        places.setdefault(epoch, []).append(x)
    found = [(places[epoch].pop(), value) for epoch, value in reversed(epochs) if places.get(epoch)]
    return found[::-1]


def _containers(cbstate: Any) -> tuple[Any, Any]:
    """Return what `Metrics` has recorded, by batch and by epoch."""
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
