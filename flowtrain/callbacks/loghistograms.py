"""LogHistograms: how weights and gradients are distributed, in logs."""

from __future__ import annotations

from collections.abc import Iterable

from flowtrain.callback.access import Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.conditions import Every
from flowtrain.callback.events import BatchEnd, UpdateBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import Histogram, LoggerBackend, log
from flowtrain.logging.values import checked_backends

__all__ = ["LogHistograms"]


class LogHistograms(Callback):
    """Log a histogram of each parameter, and of its gradient when asked, now and then in training.

    Weights are those at the end of a batch, as ``Weights/<parameter>``; reads ``params``. Gradients are those of an
    update, complete, unscaled and not yet clipped, as ``Gradients/<parameter>``; reads ``batch.grads``. The step is the
    number of the batch, from ``cbstate.history``. So it runs after `Recorder`, and after those that write the model or
    the gradients at these events. Writes to its backends only. Costs a pass over all parameters, and a copy of them
    where it is deferred.

    Args:
        backends: Where to log to.
        every: Log at the n-th, 2n-th, ... batch, and gradients at the n-th, 2n-th, ... update.
        gradients: Whether to log gradients too.
        bins: How many bins a histogram has.

    Raises:
        LoggingError: No backend, something that is none, one twice, or one that takes no histograms.
        UsageError: `every` is no whole number from 1.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogHistograms(JsonlBackend("runs/a/log.jsonl"), every=10, gradients=True)
    <LogHistograms>
    """

    deferrable = True
    quiet = True

    def __init__(self, *backends: LoggerBackend, every: int = 100, gradients: bool = False, bins: int = 64) -> None:
        self.backends = checked_backends("LogHistograms", backends, Histogram)
        self.gradients = gradients
        self.bins = bins
        self.conditions = (Every(BatchEnd, every), Every(UpdateBegin, every))

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        names = ("Weights", "Gradients") if self.gradients else ("Weights",)
        return [("Step", AbstractTrainingPhase, name) for name in names]

    @on(BatchEnd, AbstractTrainingPhase, access={"params": Read(), "cbstate.history": Read()})
    def log_weights(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Log the parameters after a batch."""
        step, group = learner.cbstate.history[phase].steps, ("Step", repr(phase))
        for name, param in learner.params.items():
            log(self.backends, Histogram(param, self.bins), f"Weights/{name}", step, group)

    @on(
        UpdateBegin,
        AbstractTrainingPhase,
        access={"batch.grads": Read(), "cbstate.history": Read()},
        enabled="gradients",
    )
    def log_gradients(self, event: UpdateBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Log the gradients of an update, at the batch that it is part of."""
        step, group = learner.cbstate.history[phase].steps + event.in_batch, ("Step", repr(phase))
        for name, gradient in learner.batch.grads.items():
            log(self.backends, Histogram(gradient, self.bins), f"Gradients/{name}", step, group)
