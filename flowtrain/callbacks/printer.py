"""MetricsPrinter: the metrics of each epoch, and why training was stopped, as lines of text."""

from __future__ import annotations

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import EpochEnd, FitEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.terminal import console
from flowtrain.state.by_phase import epoch_of

__all__ = ["MetricsPrinter"]


class MetricsPrinter(Callback):
    """Print what `Metrics` recorded for an epoch when it ends: one line, on a terminal or in a file.

    If a callback such as `EarlyStopping` ends the fit, its reason is the last line.

    The number is that of the training epoch; an evaluation has that of the one after which it ran.
    Reads ``cbstate.metrics_epoch`` and ``cbstate.history`` at `EpochEnd`, so it runs after `Metrics` and `Recorder`.
    Writes to the terminal, ``resource.terminal``, and no state. Costs a line of output for each epoch.

    >>> from flowtrain.testing import tiny_learner
    >>> tiny_learner(MetricsPrinter()).fit(1)  # doctest: +ELLIPSIS
    epoch   1  TrainingPhase     Loss ...
    epoch   1  ValidationPhase   Loss ...
    """

    audited = False

    def state_access(self) -> Access:
        return {"cbstate.history": Read(), "cbstate.metrics_epoch": Read(), "resource.terminal": Write()}

    @on(EpochEnd)
    def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Print the line, if anything was recorded for this epoch."""
        history = learner.cbstate.history
        if not history[phase].steps_epoch:
            return  # no batch was completed: the newest values are those of another epoch
        epochs = epoch_of(history, phase)
        newest = {name: series.last() for name, series in learner.cbstate.metrics_epoch[phase].items() if len(series)}
        values = [f"{name} {_number(value)}" for name, (epoch, value) in newest.items() if epoch == epochs]
        if values:
            line = f"epoch {epochs:3}  {phase!r:16}  {'  '.join(values)}"
            console().print(line, markup=False, highlight=False, soft_wrap=True)

    @on(FitEnd, access={"resource.terminal": Write()})
    def show_reason(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Print why the fit was stopped, if it was."""
        if event.stopped:
            console().print(event.stopped, markup=False, highlight=False, soft_wrap=True)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
