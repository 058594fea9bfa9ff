"""LogTraces: what `Traces` records, in logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochEnd, Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import LoggerBackend, Value, log
from flowtrain.logging.values import checked_backends, loggable, newest

__all__ = ["LogTraces"]


class LogTraces(Callback):
    """Log what `Traces` has recorded, at the end of each batch and epoch, in the group ``Step``.

    The newest value of each trace that has grown is logged; a trace with several elements as a histogram. Reads
    ``cbstate.tracehistory``, and runs after `Traces`, which writes it. Costs about 20 microseconds for each value and
    backend of files.

    Args:
        backends: Where to log to.

    Raises:
        LoggingError: No backend, something that is none, or one twice.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogTraces(JsonlBackend("runs/a/log.jsonl"))
    <LogTraces>
    """

    deferrable = True
    quiet = True
    renaming = "Give the trace another name"

    def __init__(self, *backends: LoggerBackend) -> None:
        self.backends = checked_backends("LogTraces", backends, Value)
        self._seen: dict[str, int] = {}

    def state_access(self) -> Access:
        return {"cbstate.tracehistory": Read()}

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        return (("Step", Phase, "cbstate.tracehistory"),)

    @on(BatchEnd)
    def log_step(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Log what has been traced up to the end of the batch."""
        self._log(event, phase, learner)

    @on(EpochEnd)
    def log_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Log what has been traced after the last batch."""
        self._log(event, phase, learner)

    def _log(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        group = ("Step", repr(phase))
        for name, step, value in newest(learner.cbstate.tracehistory[phase], group, self._seen):
            log(self.backends, loggable(value), name, step, group)

    def state_dict(self) -> dict[str, Any]:
        """Return how far each series has been logged."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._seen = dict(state["seen"])
