"""Traces: series of values that functions of the learner return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import HandlerError
from flowtrain.errors.arguments import is_a, is_type, whole_number
from flowtrain.errors.describing import describe

__all__ = ["Traces"]


class Traces(Callback):
    """Record the values that functions of the learner return, in ``cbstate.tracehistory[phase][name]``.

    Reads ``cbstate.history`` and the state that `access` declares, so it runs after `Recorder` and the callbacks that
    write that state. Writes the series of its names in ``cbstate.tracehistory``; the step is the number of complete
    batches. Costs the time of the functions, and an entry of the series for each.

    Args:
        traces: Functions by name; each is called with the view of the learner and returns a number, a tensor, or
            ``None`` to record nothing. A tensor with one element is recorded as a number, a tensor with more elements
            as a copy.
        phase_type: The phase, subclasses included; all phases by default.
        event_type: The event, subclasses included.
        access: The state that the functions read; all of ``batch`` by default.
        keep: How many of the newest values of each function to keep, so that memory and checkpoints stay small in a
            long run; all by default. Older values are dropped once there are twice as many.

    Raises:
        UsageError: `keep` is no number of values.
        HandlerError: `traces` is no such mapping, a name has a dot, or `event_type` or `phase_type` is no such type. At
            the event: a function returns another type.

    >>> from flowtrain import TrainingPhase
    >>> Traces({"LossSquared": lambda learner: learner.batch.loss**2}, TrainingPhase)
    <Traces>
    """

    renaming = "Give the trace another name"

    def __init__(
        self,
        traces: Mapping[str, Callable[[LearnerView], Any]],
        phase_type: type[Phase] = Phase,
        event_type: type[Event] = BatchEnd,
        access: Access | None = None,
        *,
        keep: int | None = None,
    ) -> None:
        if not is_a(traces, Mapping) or not traces or not all(callable(trace) for trace in traces.values()):
            example = "Traces({'Norm': f}, TrainingPhase)"
            raise HandlerError(f"Traces({traces!r}, ...) takes functions by name: {example}.")
        for kind, base in ((phase_type, Phase), (event_type, Event)):
            if not is_type(kind, base):
                raise HandlerError(
                    f"Traces got {kind!r} where a subclass of {base.__name__} belongs. "
                    f"Write Traces({{'Norm': f}}, TrainingPhase, BatchEnd)."
                )
        for name in traces:
            if not is_a(name, str) or not name or "." in name:
                raise HandlerError(f"The trace {name!r} needs a name without dots, because it is part of a path.")
        self.keep = None if keep is None else whole_number("Traces(): keep", keep)
        self.traces = dict(traces)
        self.event_type = event_type
        self.phase_type = phase_type
        self._access: Access = {"batch": Read()} if access is None else access
        self.access_argument = self._access

    def state_access(self) -> Access:
        """Declare the state that the user says the functions read, a read of the counts, and a write of each series."""
        writes = {f"cbstate.tracehistory.{name}": Write() for name in self.traces}
        return {**self._access, "cbstate.history": Read(), **writes}

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series of every trace."""
        return [("cbstate.tracehistory", self.phase_type, name) for name in self.traces]

    @on("event_type", "phase_type")
    def trace(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Call the functions and record their values; the step is the number of complete batches."""
        step = learner.cbstate.history[phase].steps
        series = learner.cbstate.tracehistory[phase]
        for name, function in self.traces.items():
            value = function(learner)
            if value is None:
                continue
            number = getattr(value, "shape", None) == ()  # also a truth value of NumPy, which is no number for Python
            if not hasattr(value, "numel") and not is_a(value, Real) and not number:
                raise HandlerError(
                    f"The trace {name!r} returned {describe(value)}: return a number or a tensor, or None to record "
                    f"nothing."
                )
            series.push(name, value, step)
            if self.keep is not None:
                series[name].shorten(self.keep)
