"""What running handlers in parallel, or deferring them, would save: the result of ``learner.what_if()``.

Both are estimates from the times of a fit with a timeline, and both are bounds: two handlers that compute in Python
share the interpreter's lock and save less, or nothing. ``executor="dask"`` measures both ways itself and takes the
quicker one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["DeferredSavings", "ParallelSavings", "WhatIf", "shown"]


@dataclass(frozen=True)
class ParallelSavings:
    """What running the handlers of one event at the same time would save, at best.

    Attributes:
        event: The name of the event type.
        phase: The name of the phase type.
        firings: The firings whose times are known, at most the last 1,000.
        serial: The seconds of all handlers one after the other: the sum of their medians.
        critical: The seconds of the handlers on the longest path through the graph, which no number of threads saves.
        path: The names of these handlers, in their order.
        strands: The names of the handlers on each thread, the training thread first.
        parallel: The seconds until all threads have ended.
        why_not: Why it is not worth it; empty if it is.
    """

    event: str
    phase: str
    firings: int
    serial: float
    critical: float
    path: tuple[str, ...]
    strands: tuple[tuple[str, ...], ...]
    parallel: float
    why_not: str = ""

    @property
    def saves(self) -> float:
        """The seconds that each firing would save at best; 0 if it is not worth it."""
        return 0.0 if self.why_not else self.serial - self.parallel

    def __str__(self) -> str:
        head = f"{self.event}, {self.phase}: {shown(self.serial)} one after the other"
        if self.why_not:
            return f"{head}: not worth it, {self.why_not}"
        threads = " | ".join(", ".join(each) for each in self.strands)
        return (
            f"{head}, {shown(self.critical)} on the longest path ({' → '.join(self.path)}), {shown(self.parallel)} on "
            f"{len(self.strands)} threads ({threads}): saves up to {shown(self.saves)}"
        )


@dataclass(frozen=True)
class DeferredSavings:
    """What deferring one handler would save in each of its events, at best.

    Attributes:
        handler: The names of the callback and of the handler: ``"LogHistograms.log"``.
        event: The name of the event type.
        phase: The name of the phase type.
        in_place: The median seconds of a call in place, or in its lane if it is deferred already.
        handing_over: The seconds to hand an event over: of snapshot and queue if they were measured in a fit, otherwise
            of a snapshot of the present state; ``None`` if the callback cannot be deferred.
        why_not: Why it is not worth it; empty if it is.
    """

    handler: str
    event: str
    phase: str
    in_place: float
    handing_over: float | None
    why_not: str = ""

    @property
    def saves(self) -> float:
        """The seconds that each event would save at best; 0 if it is not worth it."""
        return 0.0 if self.why_not or self.handing_over is None else self.in_place - self.handing_over

    def __str__(self) -> str:
        costs = f"{shown(self.in_place)} to run"
        if self.handing_over is not None:
            costs += f", {shown(self.handing_over)} to hand over"
        end = f"not worth it, {self.why_not}" if self.why_not else f"saves up to {shown(self.saves)}"
        return f"{self.handler} at {self.event}, {self.phase}: {costs}: {end}"


@dataclass(frozen=True)
class WhatIf:
    """What ``executor="dask"`` would save with the callbacks of a learner; ``print`` shows it.

    Attributes:
        workers: How many handlers can run at the same time, one on the training thread included.
        parallel: For each event with several handlers, what running them at the same time would save.
        deferred: For each handler of a deferrable callback, what deferring it would save.
    """

    workers: int
    parallel: tuple[ParallelSavings, ...]
    deferred: tuple[DeferredSavings, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        threads = f"{self.workers} thread{'s' if self.workers > 1 else ''}"
        yield f"In parallel, on {threads} at most, for each event:"
        yield from (f"  {each}" for each in self.parallel)
        if not self.parallel:
            yield "  no event has two handlers with known times"
        yield "Deferred, for each event:"
        yield from (f"  {each}" for each in self.deferred)
        if not self.deferred:
            yield "  no handler with known times is of a deferrable callback"
        if not any([each.saves for each in self.parallel] + [each.saves for each in self.deferred]):
            yield 'Nothing is worth it: keep executor="serial".'
        else:
            yield "At best: handlers that compute in Python share the interpreter's lock, and then save less."
            yield 'executor="dask" measures both ways in a fit, and takes the quicker one.'


def shown(seconds: float) -> str:
    """Return a time as text: in milliseconds, or in microseconds if it is less than one."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"
