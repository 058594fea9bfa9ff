"""Rule 18 as tests: events that handlers fire."""

from __future__ import annotations

from collections.abc import Callable

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase, TrainingPhase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.learner import Learner
from flowtrain.testing.probes import (
    KINDS,
    ContractBase,
    Does,
    Everywhere,
    Ping,
    Probe,
    catching,
    raises,
    waits,
    with_others,
)

__all__ = ["QueueingPromises"]


class QueueingPromises(ContractBase):
    """What an executor promises about events that its handlers fire."""

    def test_rule_18_fired_events_wait_for_the_current_one(self) -> None:
        """Rule 18: they come when the event has ended, in serial order of who fired, first in, first out."""
        trace = self.trace()
        order: list[str] = []

        def fires(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Fire two events, and then the last of them one more."""
            assert isinstance(event, Ping)
            if not event.text:
                if probe.name == "ProbeB":  # fires last if it can
                    trace.wait_for_end("ProbeC")
                for number in range(2):
                    learner.fire(Ping(f"{probe.name} {number}"))
                    waits(probe, event, learner)
            elif probe.name == "ProbeB":
                order.append(event.text)
                if event.text == "ProbeB 0":
                    learner.fire(Ping("nested"))
            if event.text and len(trace.ended) < 3:
                trace.complain(f"{event.text!r} was handled while its asker's event was running")

        with self.learner(*(kind(trace, fires) for kind in KINDS[:3])) as learner:
            for number in range(self.rounds):
                order.clear()
                trace.clear()
                learner.fire(Ping(), TrainingPhase())
                assert not trace.wrong, f"in round {number + 1}: {trace.wrong[0]}"
                wanted = [f"Probe{letter} {each}" for letter in "ABC" for each in range(2)]
                assert order == [*wanted, "nested"], f"fired in round {number + 1}: {order}; wanted {wanted}, nested"

    def test_rule_18_fired_events_are_dropped_if_the_event_raises(self) -> None:
        """Rule 18: what was asked for belongs to an event that did not come to its end; and it does not come later."""
        trace = self.trace()
        probes = [
            KINDS[0](trace, lambda probe, event, learner: learner.fire(_Later())),
            KINDS[1](trace, raises(ValueError("broken"))),
            _Listens(trace),
        ]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                trace.clear()
                probes[1].does = raises(ValueError("broken"))
                with catching(ValueError):
                    learner.fire(Ping(), TrainingPhase())
                heard = trace.started.count("later")
                assert not heard, f"in round {number + 1} an event was handled that a raising one had fired"
                probes[1].does = None
                learner.fire(Ping(), TrainingPhase())
                heard = trace.started.count("later")
                assert heard == 1, f"in round {number + 1} the event that was fired next came {heard} times"

    def test_rule_18_training_cannot_be_started_in_a_handler(self) -> None:
        """Rule 18: `fit`, `epoch` and `step` in a handler are errors, on whatever thread it runs."""
        trace = self.trace()
        held: list[Learner] = []
        starts: list[Callable[[Learner], object]] = [
            lambda learner: learner.fit(1),
            lambda learner: learner.epoch(TrainingPhase),
            lambda learner: learner.step(TrainingPhase, learner.data[TrainingPhase][0]),
        ]

        def starting(start: Callable[[Learner], object]) -> Does:
            """Return a handler that starts training."""

            def does(probe: Probe, event: Event, learner: LearnerView) -> None:
                """Start training when the others run too."""
                trace.wait_for_start("ProbeC")
                start(held[0])

            return does

        probes = [kind(trace, starting(start)) for kind, start in zip(KINDS, starts, strict=False)]
        with self.learner(*probes) as learner:
            held.append(learner)
            for number in range(self.rounds):
                trace.clear()
                with catching(UsageError) as found:
                    learner.fire(Ping(), TrainingPhase())
                refused = len(with_others(found[0]))
                assert refused == len(starts), f"in round {number + 1} only {refused} of {len(starts)} were refused"
        held.clear()


class _Later(Event):
    """Fired by an event that fails."""


class _Listens(Everywhere):
    """Notes each `_Later`."""

    def do(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Note the event."""
        if isinstance(event, _Later):
            self.trace.start("later")
            self.trace.end("later")
