"""Deferrable callbacks that run in place may do no more than in a lane, so that a program never depends on the cost.

In a lane a callback cannot end a batch, fire an event or request a checkpoint, since training has passed the event.
`ConsumersOnly` refuses the same in place, and `retiring` ends a callback that fails where failures are only logged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.errors import CancelException, UsageError
from flowtrain.graph.executor import Site
from flowtrain.graph.plan import Call, Failed, Plan, PlannedHandler
from flowtrain_dask.deferred.placement import Placement
from flowtrain_dask.lanes.work import cancel_error

__all__ = ["ConsumersOnly", "retiring"]


def retiring(call: Call, placement: Placement, handler: PlannedHandler) -> Call:
    """Return the call of a handler that runs in place, which retires the lane if the handler fails."""

    def run(event: Event, phase: Phase, view: Any) -> None:
        """Run the handler."""
        try:
            call(event, phase, view)
        except Exception as failure:  # a handler may raise anything
            where = f"({type(event).__name__}, {phase!r})"
            if isinstance(failure, CancelException):
                failure = cancel_error(failure, handler.label, type(handler.callback).__name__, where)
            failure.add_note(f"raised in {handler.label} at {where}, in place")
            placement.retire(failure)

    return run


class ConsumersOnly:
    """The loop of a learner to the runners of its executor: here deferrable callbacks steer training nowhere.

    A cancel, a fired event and a requested checkpoint of a callback for which cost decides are errors. All other
    attributes are those of the loop.

    Args:
        site: The loop.
        names: Returns the names of the callbacks for which cost decides.
    """

    def __init__(self, site: Site, names: Callable[[], Collection[str]]) -> None:
        self._site = site
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
        """Raise the worst failure of an event, with an error for each cancel of a deferrable callback.

        Raises:
            DeferredCancelError: A deferrable callback raised a cancel.
        """
        where, names = f"({type(event).__name__}, {phase!r})", self._names()
        failures = [
            (each, cancel_error(failure, each.label, type(each.callback).__name__, where))
            if isinstance(failure, CancelException) and each.node.name in names
            else (each, failure)
            for each, failure in failures
        ]
        try:
            self._site.fail(plan, event, phase, failures)
        finally:
            del failures  # see `flowtrain.errors.raise_worst`

    def drain(self, phase: Phase) -> None:
        """Fire the events in `Site.fired`, then take the checkpoints in `Site.requests`.

        Raises:
            UsageError: A deferrable callback fired an event or requested a checkpoint.
        """
        site, names = self._site, self._names()
        for queue, method in ((site.fired, "fire"), (site.requests, "request_checkpoint")):
            refused = [one for one in queue if one[0] in names]
            if refused:
                name, what = refused[0]
                queue[:] = [one for one in queue if one[0] not in names]  # type: ignore[misc]  # each its own type
                raise UsageError(
                    f"{name} calls learner.{method}({what!r}), but it is deferrable: in its lane it runs later than "
                    f'the event. Set deferrable = False on the callback, or write DaskExecutor(defer="never").'
                )
        site.drain(phase)
