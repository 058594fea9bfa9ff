"""The dry run: one batch of every phase with all handlers, on copies, and the time that each handler took.

The model, the loss function, the optimizer and all callbacks are copied, and the copies run a fit of one epoch with the
first batch of each phase. The conditions of the copies are removed, so that a handler runs that is throttled to every
hundredth batch. No record is written, no checkpoint is taken, and lines that handlers print are dropped. The learner,
the random number generators, the loaders, and the files and lanes of the learner do not change.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.scratch_learner import LearnerParts, copied, first_batches, same_rng, scratch_learner
from flowtrain.graph.plan import Call, PlannedHandler
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState

__all__ = ["DryRun", "HandlerTime", "dry_run"]

_HEADS = ("event", "phase", "handler", "milliseconds")


@dataclass(frozen=True)
class HandlerTime:
    """One call of a handler in a dry run.

    Attributes:
        event: The name of the event type.
        phase: The name of the phase.
        handler: The names of the callback and of the handler: ``"Printer.show"``.
        milliseconds: The time that the call took, on the host.
    """

    event: str
    phase: str
    handler: str
    milliseconds: float


class DryRun(tuple[HandlerTime, ...]):
    """The result of a dry run: a tuple of `HandlerTime` in the order of the calls. Its text is a table.

    Attributes:
        idle: The handlers that no event of the dry run reached, such as those of `BatchCancelled`.
        stopped: The exception of a handler that ended the dry run early, a cancel; ``None`` without one.
    """

    idle: tuple[str, ...] = ()
    stopped: BaseException | None = None

    def __repr__(self) -> str:
        rows = [_HEADS, *((each.event, each.phase, each.handler, f"{each.milliseconds:.3f}") for each in self)]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{event:{wide[0]}}  {phase:{wide[1]}}  {handler:{wide[2]}}  {took:>{wide[3]}}"
            for event, phase, handler, took in rows
        ]
        if self.stopped is not None:
            lines.append(f"A handler ended the dry run: {type(self.stopped).__name__}: {self.stopped}".rstrip(": "))
        if self.idle:
            lines.append(f"Not reached: {', '.join(self.idle)}.")
        return "\n".join(lines)


def dry_run(learner: LearnerParts) -> DryRun:
    """Run copies of all callbacks of a learner for one batch of every phase, and return the time of each handler.

    The first call of a handler may include work that later calls do not repeat, such as an import.

    Args:
        learner: The learner, which does not change.

    Raises:
        UsageError: The learner has no data, a loader can be iterated only once, or an object cannot be copied.
        Exception: A handler, the model or the loss function raised it. A note names the handler.
    """
    with same_rng():
        data = first_batches(learner.state.data, "learner.dry_run()")
        nodes = learner.state.callbacks.nodes
        model, lossfn, optimizer, callbacks = copied(learner, [node.callback for node in nodes], "learner.dry_run()")
        for callback in callbacks:
            callback.conditions = ()
        watch = _Watch()

        def build(state: LearnerState) -> Callbacks:
            """Return the callbacks, with a measurement around each call."""
            return Callbacks(callbacks, state, [type(phase) for phase in data], (), watch.around)

        with (
            redirect_stdout(io.StringIO()),
            scratch_learner(learner, (model, lossfn, optimizer), data, build) as scratch,
        ):
            watch.run(scratch)
            result = DryRun(watch.times)
            labels = _labels(scratch.state.callbacks)
            result.idle = tuple(label for label in labels if label not in {each.handler for each in result})
            result.stopped = scratch.stopped
    return result


def _labels(callbacks: Callbacks) -> Iterator[str]:
    for node in callbacks.nodes:
        for _, handler in node.handlers:
            yield f"{node.name}.{handler.attribute}"


class _Watch:
    """Measures the handlers of a scratch learner.

    Attributes:
        times: The calls that have ended, in their order.
    """

    def __init__(self) -> None:
        self.times: list[HandlerTime] = []

    def around(self, planned: PlannedHandler) -> Call:
        """Return the call of a handler, which is measured."""

        def call(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler."""
            begun = time.perf_counter()
            try:
                planned.call(event, phase, view)
            finally:
                took = 1000 * (time.perf_counter() - begun)
                self.times.append(HandlerTime(type(event).__name__, repr(phase), planned.label, took))

        return call

    def run(self, scratch: LearnerParts) -> None:
        """Fit the scratch learner for one epoch; an error gets a note that only copies have run."""
        try:
            scratch.fit(1)
        except Exception as error:
            error.add_note("raised in a dry run, on copies: the learner has not changed")
            raise
