"""A stand-in for the loop, for tests of an executor alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Runner
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Plan, Step
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState

__all__ = ["TinySite"]


class TinySite:
    """The loop as far as an executor sees it: a `flowtrain.graph.executor.Site` that notes what it is told.

    Attributes:
        failures: The failed handlers, each with its callback's name, as `Site.fail` got them.
        drained: What was in `fired` at each call of `Site.drain`.
        swapped: The runners given to `Site.swap`.
    """

    def __init__(self) -> None:
        self.state = LearnerState()
        self.nodes: Sequence[Node] = ()
        self.run = Run("tiny")
        self.open_sinks = object()
        self.stopping = False
        self.fired: list[tuple[str, Event]] = []
        self.urgent: list[Callable[[], None]] = []
        self.failures: list[tuple[str, BaseException]] = []
        self.drained: list[list[tuple[str, Event]]] = []
        self.swapped: list[Runner] = []

    def drain(self, phase: Phase) -> None:
        """Note what is in `fired`, and forget it."""
        self.drained.append(list(self.fired))
        self.fired.clear()

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[tuple[Step, BaseException]]) -> None:
        """Note the failures; nothing is raised."""
        self.failures += [(step.node.name, failure) for step, failure in failures]

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Find nothing: a test asks the executor itself."""
        return None

    def swap(self, plan: Plan, runner: Runner) -> None:
        """Note the runner."""
        self.swapped.append(runner)
