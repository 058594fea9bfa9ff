"""LogMetrics: the loss and the metrics of batches and epochs in logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowtrain.callback.access import Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import LoggerBackend, Value
from flowtrain.logging.records import log
from flowtrain.logging.values import checked_backends, newest

__all__ = ["LogMetrics"]


class LogMetrics(Callback):
    """Log the loss and the metrics: of each batch in the group ``Step``, of each epoch in the group ``Epoch``.

    Reads ``cbstate.metrics_step`` at the end of a batch and ``cbstate.metrics_epoch`` at the end of an epoch, and runs
    after `Metrics`, which writes them. Costs a record for each value and backend. For fewer records write
    ``throttle(LogMetrics(backend), BatchEnd, every=10)``.

    Args:
        backends: The backends to log to.

    Raises:
        LoggingError: There is no backend, an argument is no backend, or one is given twice.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogMetrics(JsonlBackend("runs/a/log.jsonl"))
    <LogMetrics>
    """

    deferrable = True
    quiet = True

    def __init__(self, *backends: LoggerBackend) -> None:
        self.backends = checked_backends("LogMetrics", backends, Value)
        self._seen: dict[str, int] = {}  # by series: how many of its values have been logged or skipped

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series of all metrics, of batches and of epochs, in every phase."""
        return ("Step", Phase, "cbstate.metrics_step"), ("Epoch", Phase, "cbstate.metrics_epoch")

    @on(BatchEnd, access={"cbstate.metrics_step": Read()})
    def log_step(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Log the values that the batch has added."""
        group = ("Step", repr(phase))
        for name, step, value in newest(learner.cbstate.metrics_step[phase], group, self._seen):
            log(self.backends, Value(value), name, step, group)

    @on(EpochEnd, access={"cbstate.metrics_epoch": Read()})
    def log_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Log the values that the epoch has added."""
        group = ("Epoch", repr(phase))
        for name, step, value in newest(learner.cbstate.metrics_epoch[phase], group, self._seen):
            log(self.backends, Value(value), name, step, group)

    def state_dict(self) -> dict[str, Any]:
        """Return how far each series has been logged."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._seen = dict(state["seen"])
