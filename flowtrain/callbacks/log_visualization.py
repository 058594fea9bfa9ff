"""LogVisualization: images, figures and texts that a function makes of the learner's state, in logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.conditions import Every
from flowtrain.callback.events import BatchEnd, EpochEnd, Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import LoggingError
from flowtrain.errors.arguments import is_a, is_type, whole_number
from flowtrain.logging.backend import Loggable, LoggerBackend
from flowtrain.logging.records import log
from flowtrain.logging.values import checked_backends
from flowtrain.state.by_phase import epoch_of

__all__ = ["LogVisualization"]


class LogVisualization(Callback):
    """Log what a function returns at every n-th event, such as misclassified images, a figure, or a text.

    The function is called with the view of the learner, and returns a loggable, a mapping from names to loggables, a
    sequence of loggables, or ``None``. Reads the state that `access` declares, and ``cbstate.history`` for the step, so
    it runs after `Recorder` and the callbacks that write that state. Writes only to its backends. Random numbers that
    the function draws come from generators of its own, so that the numbers of training stay the same. Costs the time of
    the function, and a copy of the state that it reads if it is deferred. To be deferred to another process the
    function must be importable: a function of a module, no lambda.

    The group is ``Epoch`` at the end of an epoch, with the number of the epoch as step, and ``Step`` at every other
    event, with the number of complete batches. One of several loggables has the name ``<name>/<its name or number>``.

    Args:
        f: The function.
        backends: The backends to log to; each gets the types of loggables that it takes.
        every: Call the function at the n-th, 2n-th, ... event, counted for each phase.
        access: The state that the function reads; all of ``batch`` by default.
        name: The name to log under; the name of the function by default.
        phase_type: The phase, subclasses included.
        event_type: The event, subclasses included.

    Raises:
        LoggingError: `f` is no function, there is no backend, an argument is no backend, one is given twice,
            `name` is no text or empty, or `event_type` or `phase_type` is no such type.
        UsageError: `every` is no whole number, or below 1.

    >>> from flowtrain.logging import Image, JsonlBackend
    >>> def first_input(learner):
    ...     return Image(learner.batch.inputs[0])
    >>> LogVisualization(first_input, JsonlBackend("runs/a/log.jsonl"), every=10)
    <LogVisualization>
    """

    deferrable = True
    renaming = "Give one another name, as in LogVisualization(f, backend, name='Other')"

    def __init__(
        self,
        f: Callable[[LearnerView], Any],
        *backends: LoggerBackend,
        every: int = 100,
        access: Access | None = None,
        name: str | None = None,
        phase_type: type[Phase] = Phase,
        event_type: type[Event] = BatchEnd,
    ) -> None:
        if not callable(f) or is_a(f, LoggerBackend):
            raise LoggingError(
                f"LogVisualization({f!r}, ...) takes a function of the learner first, then backends: "
                f"LogVisualization(f, TensorBoardBackend('runs/a'))."
            )
        for kind, base in ((phase_type, Phase), (event_type, Event)):
            if not is_type(kind, base):
                raise LoggingError(f"LogVisualization got {kind!r} where a subclass of {base.__name__} belongs.")
        if name is not None and (not is_a(name, str) or not name):
            raise LoggingError(f"LogVisualization(name={name!r}): name is a text that is not empty, as 'Mistakes'.")
        self.f = f
        self.backends = checked_backends("LogVisualization", backends, Loggable)
        self.label = name if name is not None else _label(f)
        self.phase_type = phase_type
        self.event_type = event_type
        self.conditions = (Every(event_type, whole_number("LogVisualization(): every", every)),)
        self._access: Access = {"batch": Read()} if access is None else access
        self.access_argument = self._access

    def state_access(self) -> Access:
        """Declare the state that the user says the function reads, and a read of ``cbstate.history``."""
        return {**self._access, "cbstate.history": Read()}

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the one series, which has the name of the function."""
        return (("Epoch" if issubclass(self.event_type, EpochEnd) else "Step", self.phase_type, self.label),)

    @on("event_type", "phase_type")
    def visualize(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Call the function and log the loggables that it returns."""
        counts = learner.cbstate.history[phase]
        if isinstance(event, EpochEnd):
            group, step = ("Epoch", repr(phase)), epoch_of(learner.cbstate.history, phase)
        else:
            group, step = ("Step", repr(phase)), counts.steps
        for name, loggable in self._named(self.f(learner)):
            log(self.backends, loggable, name, step, group)

    def _named(self, found: Any) -> Iterator[tuple[str, Any]]:
        """Yield the loggables that the function has returned, with the names to log them under.

        Raises:
            LoggingError: A returned object is no loggable.
        """
        if found is None:
            return
        if isinstance(found, Loggable):
            yield self.label, found
            return
        if isinstance(found, Mapping):
            several = [(f"{self.label}/{name}", each) for name, each in found.items()]
        elif isinstance(found, Sequence) and not isinstance(found, (str, bytes)):
            several = [(f"{self.label}/{number}", each) for number, each in enumerate(found)]
        else:
            several = [(self.label, found)]
        for name, each in several:
            if not is_a(each, Loggable):
                raise LoggingError(
                    f"LogVisualization({self.label}) logs {each!r} as {name!r}, which is no loggable. Return "
                    f"Image(...), Figure(...), Text(...), several of them by name, or None."
                )
            yield name, each


def _label(f: Any) -> str:
    inner = getattr(f, "func", f)  # a functools.partial
    name = str(getattr(inner, "__name__", type(inner).__name__))
    if name == "<lambda>":
        return "Visualization"
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))  # "first_input" becomes "FirstInput"
