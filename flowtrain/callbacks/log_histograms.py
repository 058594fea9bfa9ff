"""LogHistograms: histograms of weights and gradients in logs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flowtrain.callback.access import Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.conditions import Every
from flowtrain.callback.events import BatchEnd, UpdateBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors.arguments import switch, whole_number
from flowtrain.logging.backend import Group, Histogram, LoggerBackend
from flowtrain.logging.records import log
from flowtrain.logging.values import checked_backends

__all__ = ["LogHistograms"]


class LogHistograms(Callback):
    """Log a histogram of each parameter at every n-th training batch, and optionally of each gradient.

    Parameters are logged at the end of a batch, as ``Weights/<parameter>``; this reads ``params``. Gradients are logged
    before an update, complete, unscaled and not yet clipped, as ``Gradients/<parameter>``; this reads ``batch.grads``.
    Complex ones are logged as absolute values, under ``<parameter>.abs``.
    The step is the number of the batch, from ``cbstate.history``. So the callback runs after `Recorder`, and after
    callbacks that write the model or the gradients at these events. Writes only to its backends. Costs a pass over all
    parameters, and a copy of them if it is deferred.

    Args:
        backends: The backends to log to.
        every: Log at the n-th, 2n-th, ... batch, and gradients at the n-th, 2n-th, ... update.
        gradients: Whether to log gradients too.
        bins: The number of bins of a histogram.

    Raises:
        LoggingError: There is no backend, an argument is no backend or takes no histograms, or one is given twice.
        UsageError: `every` or `bins` is no whole number, or below 1, or `gradients` is not ``True`` or ``False``.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogHistograms(JsonlBackend("runs/a/log.jsonl"), every=10, gradients=True)
    <LogHistograms>
    """

    deferrable = True
    quiet = True
    may_cancel = False

    def __init__(self, *backends: LoggerBackend, every: int = 100, gradients: bool = False, bins: int = 64) -> None:
        self.backends = checked_backends("LogHistograms", backends, Histogram)
        self.gradients = switch("LogHistograms", "gradients", gradients)
        self.bins = whole_number("LogHistograms(): bins", bins)
        every = whole_number("LogHistograms(): every", every)
        self.conditions = (Every(BatchEnd, every), Every(UpdateBegin, every))

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series of the weights, and with `gradients` those of the gradients, of all training phases."""
        names = ("Weights", "Gradients") if self.gradients else ("Weights",)
        return [("Step", AbstractTrainingPhase, name) for name in names]

    @on(BatchEnd, AbstractTrainingPhase, access={"params": Read(gather=True), "cbstate.history": Read()})
    def log_weights(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Log the parameters after a batch."""
        step, group = learner.cbstate.history[phase].steps, ("Step", repr(phase))
        for name, param in learner.params.items():
            self._log(f"Weights/{name}", param, step, group)

    @on(
        UpdateBegin,
        AbstractTrainingPhase,
        access={"batch.grads": Read(gather=True), "cbstate.history": Read()},
        enabled="gradients",
    )
    def log_gradients(self, event: UpdateBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Log the gradients of an update; the step is the number of the batch that makes the update."""
        # `Recorder` counts this batch only at its end. An update after the last batch of an epoch is in no batch.
        step, group = learner.cbstate.history[phase].steps + event.in_batch, ("Step", repr(phase))
        for name, gradient in learner.batch.grads.items():
            self._log(f"Gradients/{name}", gradient, step, group)

    def _log(self, name: str, values: torch.Tensor, step: int, group: Group) -> None:
        if values.is_complex():
            name, values = f"{name}.abs", values.abs()
        log(self.backends, Histogram(values, self.bins), name, step, group)
