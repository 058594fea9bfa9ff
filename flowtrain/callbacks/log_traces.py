"""LogTraces: the values that `Traces` and other callbacks record, in logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochEnd, Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import LoggerBackend, Value
from flowtrain.logging.records import log
from flowtrain.logging.values import checked_backends, loggable, newest

__all__ = ["LogTraces"]


class LogTraces(Callback):
    """Log the values in ``cbstate.tracehistory`` at the end of each batch and epoch, in the group ``Step``.

    The newest value of each series that has grown is logged; a value with several elements as a histogram. Reads
    ``cbstate.tracehistory``, so it runs after `Traces` and all other callbacks that write it. Costs a record for each
    value and backend.

    Args:
        backends: The backends to log to.

    Raises:
        LoggingError: There is no backend, an argument is no backend, or one is given twice.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogTraces(JsonlBackend("runs/a/log.jsonl"))
    <LogTraces>
    """

    deferrable = True
    quiet = True
    renaming = "Give the trace another name"

    def __init__(self, *backends: LoggerBackend) -> None:
        self.backends = checked_backends("LogTraces", backends, Value)
        self._seen: dict[str, int] = {}  # by series: how many of its values have been logged or skipped

    def state_access(self) -> Access:
        """Declare a read of ``cbstate.tracehistory``."""
        return {"cbstate.tracehistory": Read()}

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series of all traces in every phase."""
        return (("Step", Phase, "cbstate.tracehistory"),)

    @on(BatchEnd)
    def log_step(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Log the values that were recorded up to the end of the batch."""
        self._log(event, phase, learner)

    @on(EpochEnd)
    def log_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Log the values that were recorded after the last batch."""
        self._log(event, phase, learner)

    def _log(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        group = ("Step", repr(phase))
        for name, step, value in newest(learner.cbstate.tracehistory[phase], group, self._seen):
            log(self.backends, loggable(value), name, step, group)

    def state_dict(self) -> dict[str, Any]:
        """Return how far each series has been logged."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._seen = dict(state["seen"])
