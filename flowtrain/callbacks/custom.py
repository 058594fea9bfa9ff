"""CustomCallback: a function as a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowtrain.callback.access import Access
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import HandlerError
from flowtrain.errors.arguments import is_type, runs_nothing

__all__ = ["CustomCallback"]


class CustomCallback(Callback):
    """Call a function at an event.

    Reads and writes the state that `access` declares, and runs after the callbacks that write what it reads. Costs the
    time of `f`.

    Args:
        f: The function; it is called with the view of the learner.
        event_type: The event, subclasses included.
        phase_type: The phase, subclasses included.
        access: The state that `f` reads and writes; none by default.

    Raises:
        HandlerError: `f` is not callable, `event_type` is no event type, or `phase_type` is no phase type.

    >>> from flowtrain import EpochEnd, Read, TrainingPhase
    >>> CustomCallback(lambda learner: print(learner.batch.loss), EpochEnd, TrainingPhase, {"batch.loss": Read()})
    <CustomCallback>
    """

    def __init__(
        self,
        f: Callable[[LearnerView], Any],
        event_type: type[Event],
        phase_type: type[Phase] = Phase,
        access: Access | None = None,
    ) -> None:
        if not callable(f) or runs_nothing(f):
            why = ", and this one has async or yield in it, so that a call runs nothing of it" if callable(f) else ""
            raise HandlerError(
                f"CustomCallback({f!r}, ...) takes a function of the learner first{why}. Write def f(learner): ..."
            )
        for kind, base in ((event_type, Event), (phase_type, Phase)):
            if not is_type(kind, base):
                raise HandlerError(
                    f"CustomCallback got {kind!r} where a subclass of {base.__name__} belongs. "
                    f"Write CustomCallback(f, EpochEnd, TrainingPhase, access={{...}})."
                )
        self.f = f
        self.event_type = event_type
        self.phase_type = phase_type
        self._access: Access = {} if access is None else access
        self.access_argument = self._access  # `suggest_access` proposes a value for this argument

    def state_access(self) -> Access:
        """Declare the state that the user says the function touches."""
        return self._access

    @on("event_type", "phase_type")
    def call(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Call the function."""
        self.f(learner)
