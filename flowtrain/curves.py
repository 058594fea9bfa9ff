"""Curves: what there is to draw of the recorded metrics, as numbers.

Everything lies over the number of training batches completed. So the mean of a training epoch is where the epoch ended,
and that of a validation epoch where training stood then. Where nothing is trained, a phase's own batches count.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flowtrain.errors import UsageError, is_a, nearest
from flowtrain.phases import AbstractTrainingPhase, Phase

__all__ = ["Curve", "Ends", "curves", "find_names"]

Ends: TypeAlias = Mapping[int, tuple[int, int]]
"""For each epoch of a phase, how many batches were completed at its end: in the phase, and in all training."""


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
        ended = ends.get(repr(phase), {})
        batches, epochs = _pairs(by_batch, phase, metric), _pairs(by_epoch, phase, metric)
        if batches and (not trained or isinstance(phase, AbstractTrainingPhase)):  # others stand still in between
            shifts = _shifts([step for step, _ in batches], ended) if trained else [0] * len(batches)
            x = [step + shift for (step, _), shift in zip(batches, shifts, strict=True)]
            found.append(Curve(metric, phase, "batch", x, [value for _, value in batches]))
        placed = [(ended[epoch][1 if trained else 0], value) for epoch, value in epochs if epoch in ended]
        if placed:
            found.append(Curve(metric, phase, "epoch", [x for x, _ in placed], [y for _, y in placed]))
    return found


def _shifts(steps: Iterable[int], ended: Ends) -> list[int]:
    """Return, for each batch of a training phase, how many batches other phases had trained before its epoch ended."""
    last = [own for own, _ in ended.values()]
    shifts = [total - own for own, total in ended.values()]
    # What lies behind the last end belongs to an epoch that did not end; it counts on from there.
    return [shifts[min(bisect_left(last, step), len(last) - 1)] if last else 0 for step in steps]


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
