"""MetricsPrinter: the metrics of each epoch, and the reason of an early end of training, as lines of text."""

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
    """Print the metrics of each epoch in one line, on a terminal or into a file.

    If a callback such as `EarlyStopping` ends the fit, its reason is the last line. The number in a line is the number
    of the training epoch; an evaluation has the number of the training epoch before it.

    Reads ``cbstate.metrics_epoch`` and ``cbstate.history`` at `EpochEnd`, so it runs after `Metrics` and `Recorder`.
    Writes to the terminal, ``resource.terminal``, and no state. Costs a line of output for each epoch.

    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(MetricsPrinter()).fit(1)  # doctest: +ELLIPSIS
    epoch   1  TrainingPhase     Loss ...
    epoch   1  ValidationPhase   Loss ...
    """

    audited = False

    def state_access(self) -> Access:
        """Declare reads of the counts and of the metrics of epochs, and the terminal."""
        return {"cbstate.history": Read(), "cbstate.metrics_epoch": Read(), "resource.terminal": Write()}

    @on(EpochEnd)
    def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Print the line, if the epoch has recorded a metric."""
        history = learner.cbstate.history
        if not history[phase].steps_epoch:
            return  # an epoch without a complete batch records no value, so the newest values are of an earlier one
        epochs = epoch_of(history, phase)
        newest = {name: series.last() for name, series in learner.cbstate.metrics_epoch[phase].items() if len(series)}
        values = [f"{name} {_number(value)}" for name, (epoch, value) in newest.items() if epoch == epochs]
        if values:
            line = f"epoch {epochs:3}  {phase!r:16}  {'  '.join(values)}"
            console().print(line, markup=False, highlight=False, soft_wrap=True)

    @on(FitEnd, access={"resource.terminal": Write()})
    def show_reason(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Print the reason if a callback has ended the fit."""
        if event.stopped:
            console().print(event.stopped, markup=False, highlight=False, soft_wrap=True)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
