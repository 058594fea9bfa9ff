"""Rules 12 and 13 as tests: the order of handlers, the barrier, and the serial result."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flowtrain.callback.access import Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, Event
from flowtrain.callback.phases import Phase, TrainingPhase
from flowtrain.callback.resolution import NoConflict
from flowtrain.callback.view import LearnerView
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing.equivalence import assert_equivalent
from flowtrain.testing.probes import KINDS, ContractBase, Ping, Probe, Trace, waits
from flowtrain.testing.tiny import tiny_learner

__all__ = ["OrderPromises"]


class _Total(Callback):
    """Writes an entry that `_Follower` reads, and draws random numbers."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def state_access(self) -> Mapping[str, Any]:
        """Declare the entry, what it is made of, and the random numbers."""
        return {"batch.loss": Read(), "cbstate.total": Write(), "resource.rng": Write()}

    def setup(self, learner: LearnerView) -> None:
        """Begin at zero."""
        learner.cbstate.total = 0.0

    @on(BatchEnd)
    def add(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Add the loss and a random number."""
        self.drawn.append(torch.rand(()).item())
        learner.cbstate.total += float(learner.batch.loss) + self.drawn[-1]


class _Follower(Callback):
    """Keeps what `_Total` wrote."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def state_access(self) -> Mapping[str, Any]:
        """Declare what it reads."""
        return {"cbstate.total": Read()}

    @on(BatchEnd)
    def keep(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Keep the total of this batch."""
        self.seen.append(learner.cbstate.total)


class _Noisy(Callback):
    """Draws random numbers of its own, into an attribute."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def state_access(self) -> Mapping[str, Any]:
        """Declare the random numbers."""
        return {"resource.rng": Write()}

    @on(BatchEnd)
    def draw(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Draw."""
        self.drawn.append(torch.rand(()).item())


class OrderPromises(ContractBase):
    """What an executor promises about order."""

    def test_rule_12_a_chain_runs_in_its_order(self) -> None:
        """Rule 12: an edge holds also against the order of the list. Each handler starts when the one before ended."""
        trace = self.trace()
        a, b, c = (KINDS[number](trace, waits, after=KINDS[number + 1 : number + 2]) for number in range(3))
        trace.before = {"ProbeA": ["ProbeB", "ProbeC"], "ProbeB": ["ProbeC"]}
        with self.learner(a, b, c) as learner:
            for number in self.fire_in_rounds(learner, trace):
                _same(trace.started, ["ProbeC", "ProbeB", "ProbeA"], number)

    def test_rule_12_no_handler_starts_before_those_it_waits_for(self) -> None:
        """Rule 12: with branches that join, and edges of every kind: ``run_after``, writer to reader, resources."""
        trace = self.trace()
        probes = [
            KINDS[0](trace, waits, access={"batch.mark": Write()}),
            KINDS[1](trace, waits, access={"batch.mark": Read(optional=True)}),
            KINDS[2](trace, waits, after=[KINDS[0]], access={"resource.one": Write()}),
            KINDS[3](trace, waits),
            KINDS[4](trace, waits, access={"resource.one": Write()}),
            KINDS[5](trace, after=[KINDS[1], KINDS[3]]),
            KINDS[6](trace, after=[KINDS[4], KINDS[5]]),
        ]
        trace.before = {
            "ProbeB": ["ProbeA"],
            "ProbeC": ["ProbeA"],
            "ProbeE": ["ProbeA", "ProbeC"],
            "ProbeF": ["ProbeA", "ProbeB", "ProbeD"],
            "ProbeG": ["ProbeA", "ProbeB", "ProbeC", "ProbeD", "ProbeE", "ProbeF"],
        }
        with self.learner(*probes) as learner:
            for number in self.fire_in_rounds(learner, trace):
                _same(sorted(trace.started), [probe.name for probe in probes], number)

    def test_rule_12_every_handler_gets_its_event_phase_and_view(self) -> None:
        """Rule 12: each handler of the plan runs once, with the event and phase that were fired and its own view."""
        trace, got = self.trace(), dict[str, tuple[Event, Phase | None, LearnerView]]()

        def note(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Keep what the handler was called with."""
            got[probe.name] = (event, probe.phase, learner)

        with self.learner(*(kind(trace, note) for kind in KINDS[:4])) as learner:
            plan = learner.callbacks.plan(Ping, TrainingPhase)
            for number in range(self.rounds):
                trace.clear()
                got.clear()
                event = Ping()
                learner.fire(event, TrainingPhase())
                _same(sorted(trace.started), [step.node.name for step in plan.steps], number)
                for step in plan.steps:
                    name = step.node.name
                    found, phase, view = got[name]
                    assert found is event, f"{name} got {found!r} and not the event that was fired"
                    assert phase is TrainingPhase(), f"{name} got {phase!r} and not the phase that was fired"
                    assert view is step.view, f"{name} got the view of another handler"

    def test_rule_13_an_event_ends_when_all_its_handlers_have(self) -> None:
        """Rule 13: when `fire` returns no handler still runs, or the loop would go on under it."""
        trace = self.trace()
        with self.learner(*(kind(trace, waits) for kind in KINDS[:3])) as learner:
            for number in range(self.rounds):
                trace.clear()
                learner.fire(Ping(), TrainingPhase())
                running = trace.running()
                trace.complain("the event ended")
                assert not running, f"fire returned in round {number + 1} while {running} had not"
                _same(sorted(trace.ended), ["ProbeA", "ProbeB", "ProbeC"], number)

    def test_rule_13_an_event_raises_when_all_its_handlers_have_ended(self) -> None:
        """Rule 13: the same where `fire` raises."""
        trace = self.trace()

        def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Raise when the others have started."""
            trace.wait_for_start("ProbeB", "ProbeC")
            raise ValueError("at once")

        with self.learner(KINDS[0](trace, fail), *(kind(trace, waits) for kind in KINDS[1:3])) as learner:
            for number in range(self.rounds):
                trace.clear()
                raised = False
                try:
                    learner.fire(Ping(), TrainingPhase())
                except ValueError:
                    raised = True
                running = trace.running()
                trace.complain("the event ended")
                assert raised, f"the ValueError of ProbeA was not raised in round {number + 1}"
                assert not running, f"fire raised in round {number + 1} while {running} had not returned"

    def test_rule_13_no_conflict_pairs_never_run_together(self) -> None:
        """Rule 13: two writers with `NoConflict` run one after the other, in serial order."""
        trace = self.trace()
        access = {"cbstate.best": Write()}
        probes = [kind(trace, waits, access=access, answers=NoConflict()) for kind in KINDS[:3]]
        self._in_serial_order(trace, probes)

    def test_rule_13_users_of_one_resource_never_run_together(self) -> None:
        """Rule 13: what uses one resource runs one after the other, in serial order."""
        trace = self.trace()
        self._in_serial_order(trace, [kind(trace, waits, access={"resource.pen": Write()}) for kind in KINDS[:3]])

    def test_rule_13_random_numbers_are_drawn_on_the_training_thread(self) -> None:
        """Rules 6 and 13: a handler with ``resource.rng`` runs on the thread that trains, beside others or not."""
        trace = self.trace()
        access = {"resource.rng": Write()}
        probes = [kind(trace, waits, access=access if kind in KINDS[1:4:2] else None) for kind in KINDS[:5]]
        with self.learner(*probes) as learner:
            for number in self.fire_in_rounds(learner, trace):
                for name in ("ProbeB", "ProbeD"):
                    here = trace.threads[name] == threading.get_ident()
                    assert here, f"{name} drew random numbers on another thread in round {number + 1}"
                assert trace.started.index("ProbeB") < trace.started.index("ProbeD"), "random numbers in another order"

    def test_rule_13_it_comes_to_the_serial_result(self) -> None:
        """Rule 13: parameters, ``cbstate``, attributes and random numbers are those of the serial run, to the bit."""

        def make_learner(executor: Executor) -> Learner:
            """Make a learner with the default callbacks and some of our own."""
            return tiny_learner(_Follower(), _Noisy(), _Total(), executor=executor, optimizer=torch.optim.AdamW)

        assert_equivalent(make_learner, executors=[self.make_executor], interleavings=0, epochs=2)

    def _in_serial_order(self, trace: Trace, probes: Sequence[Probe]) -> None:
        names = ["ProbeA", "ProbeB", "ProbeC"]
        trace.before = {"ProbeB": ["ProbeA"], "ProbeC": ["ProbeA", "ProbeB"]}
        with self.learner(*probes) as learner:
            for number in self.fire_in_rounds(learner, trace):
                _same(trace.started, names, number)


def _same(found: Sequence[str], wanted: Sequence[str], number: int) -> None:
    assert list(found) == list(wanted), f"in round {number + 1} ran {found}; wanted is {wanted}"
