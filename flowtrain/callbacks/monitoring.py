"""Monitoring: the metric that a callback watches, its phase, and its value in the epoch that has ended.

`EarlyStopping`, `Checkpointer` and `reduce_on_plateau` watch a metric, and all find it with these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, is_type
from flowtrain.state.by_phase import Counts, epoch_of

__all__ = [
    "UNKNOWN_METRIC",
    "Mode",
    "check_monitor",
    "direction",
    "not_recorded",
    "value_of_epoch",
    "watched_phase",
]

Mode = Literal["min", "max"]

UNKNOWN_METRIC = (
    "Name a metric that is recorded, as in monitor='Loss', or give Metrics one of this name. A name has no prefix such "
    "as 'val_': the phase is an argument of its own, phase=ValidationPhase."
)
"""The remedy for a metric that does not exist (`Callback.missing`)."""


def check_monitor(call: str, monitor: object, phase: object, mode: object) -> None:
    """Check the arguments that say which metric is watched.

    Args:
        call: The name of the class or function that was called, for messages.
        monitor: The name of the metric.
        phase: The type of the phase.
        mode: ``"min"``, ``"max"`` or ``None``.

    Raises:
        UsageError: One of them has another form.
    """
    if not is_a(monitor, str) or not all(str(monitor).split(".")):
        raise UsageError(f"{call}(monitor={monitor!r}): monitor is the name of a metric, such as 'Loss'.")
    if not is_type(phase, Phase):
        raise UsageError(f"{call}(phase={phase!r}) is no phase type. Write phase=ValidationPhase.")
    if mode not in ("min", "max", None):
        raise UsageError(
            f"{call}(mode={mode!r}): mode is 'min' if small values of {monitor} are good, otherwise 'max'."
        )


def direction(call: str, monitor: str, mode: Mode | None, callbacks: Iterable[Any]) -> Mode:
    """Return whether small or large values of a metric are good.

    Args:
        call: The call that watches the metric, without its end: ``"EarlyStopping(..."``.
        monitor: The name of the metric, or of one of its values.
        mode: The mode that the user gave, or ``None``.
        callbacks: All callbacks of the learner. Each returns the modes of its metrics (`Callback.metric_modes`).

    Raises:
        UsageError: `mode` is ``None``, and no callback knows the mode of the metric.
    """
    metric = monitor.partition(".")[0]  # "F1.cat" is a value of the metric "F1"
    known: Mode | None = "min" if monitor == "Loss" else None
    for callback in callbacks:
        modes = callback.metric_modes()
        known = modes.get(monitor, modes.get(metric, known))
    if mode is not None or known is not None:
        return mode or known or "min"
    raise UsageError(
        f"{call}, monitor={monitor!r}) does not know whether large values of {monitor} are good or small ones. Write "
        f'{call}, monitor={monitor!r}, mode="max") if large ones are, or mode="min" if small ones are; or say it where '
        f'the metric is made: Metric(f, name={metric!r}, mode="max").'
    )


def watched_phase(who: str, call: str, wanted: type[Phase], phases: Sequence[Phase], *, last: bool = False) -> Phase:
    """Return the phase of exactly this type, or the only phase of a subclass.

    Args:
        who: The callback, for messages.
        call: The call that names the phase, without its end: ``"EarlyStopping(..."``.
        wanted: The type of the phase.
        phases: The phases of the data.
        last: Whether the last one of several phases of subclasses is taken.

    Raises:
        UsageError: There is no such phase; or, without `last`, there are several of subclasses and none of exactly this
            type.
    """
    fitting = [phase for phase in phases if isinstance(phase, wanted)]
    exact = [phase for phase in fitting if type(phase) is wanted]
    found = exact or fitting
    if len(found) == 1 or (found and last):
        return found[-1]
    missing = "and the data has several of that kind" if found else "which the data does not have"
    listed, example = ", ".join(map(repr, phases)) or "nothing", repr(phases[-1]) if phases else "TrainingPhase"
    raise UsageError(
        f"{who} watches {wanted.__name__}, {missing}. The data has {listed}. Write {call}, phase={example})."
    )


def value_of_epoch(
    who: str, call: str, monitor: str, phase: Phase, metrics: Any, history: Mapping[Phase, Counts]
) -> tuple[int, float] | None:
    """Return the number of the epoch that has just ended, and the value of the metric in it.

    ``None`` if the epoch has no value of its own, because no batch in it was complete, or because the metric is not
    recorded in every epoch.

    Args:
        who: The callback, for messages.
        call: The call of the callback, without its end: ``"EarlyStopping(..."``.
        monitor: The name of the metric.
        phase: The phase whose epoch has ended.
        metrics: ``cbstate.metrics_epoch``.
        history: ``cbstate.history``.

    Raises:
        UsageError: The metric was never recorded in this phase, though the epoch has complete batches.
    """
    if not history[phase].steps_epoch:
        return None
    series = metrics[phase].get(monitor)
    if not series:
        raise not_recorded(who, call, monitor, phase, metrics)
    epoch, value = series.last()
    return (epoch, float(value)) if epoch == epoch_of(history, phase) else None


def not_recorded(who: str, call: str, monitor: str, phase: Phase, metrics: Any) -> UsageError:
    """Return the error for a metric that was never recorded in a phase; the arguments are those of `value_of_epoch`."""
    others = ", ".join(repr(other) for other in metrics if metrics[other].get(monitor))
    values = [name for name in metrics[phase] if name.startswith(f"{monitor}.")]
    there = f"; it is recorded in {others}" if others else ""
    if values and not others:
        there = f"; {monitor} has several values: {', '.join(values)}. Write monitor={values[0]!r}"
    return UsageError(
        f"{who} needs {monitor!r} of {phase!r}, and nothing was recorded by the end of its first epoch{there}. Give "
        f"Metrics a metric that is computed in this phase, or name another phase: {call}, phase=...). If the metric is "
        f"recorded in every n-th epoch only, write throttle({call}), EpochEnd, every=n)."
    )
