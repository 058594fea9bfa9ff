"""Rule 15 as tests: who runs when a handler fails, and what is raised."""

from __future__ import annotations

from contextlib import suppress

from flowtrain.callback.events import BatchBegin, BatchEnd, Event
from flowtrain.callback.phases import TrainingPhase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import CancelBatchException, CancelEpochException, CancelFittingException
from flowtrain.graph.executor import Executor, SerialExecutor
from flowtrain.testing.probes import (
    EVERYWHERE,
    KINDS,
    ContractBase,
    Make,
    Ping,
    Probe,
    catching,
    raises,
    raises_at,
    waits,
    with_others,
)

__all__ = ["FailurePromises"]


class FailurePromises(ContractBase):
    """What an executor promises about handlers that raise."""

    def test_rule_15_those_that_depend_on_no_failed_one_still_run(self) -> None:
        """Rule 15: all of them, also later ones; and none that depends on a failed one, over however many edges."""
        trace = self.trace()
        probes = [
            KINDS[0](trace),
            KINDS[1](trace, raises(ValueError("broken"))),
            KINDS[2](trace, after=[KINDS[1]]),
            KINDS[3](trace, after=[KINDS[2], KINDS[0]]),
            KINDS[4](trace, waits),
            KINDS[5](trace, after=[KINDS[0], KINDS[4]]),
        ]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                trace.clear()
                with catching(ValueError):
                    learner.fire(Ping(), TrainingPhase())
                ran = sorted(trace.started)
                wanted = ["ProbeA", "ProbeB", "ProbeE", "ProbeF"]
                assert ran == wanted, f"in round {number + 1} ran {ran}; without a failed ancestor are {wanted}"

    def test_rule_15_the_first_in_serial_order_is_raised(self) -> None:
        """Rule 15: not the first in time. The others are in ``others`` and in the notes."""
        trace = self.trace()

        def late(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Fail when the others have."""
            trace.wait_for_end("ProbeC")
            raise ValueError("first")

        probes = [KINDS[0](trace), KINDS[1](trace, late), KINDS[2](trace, raises(KeyError("second")))]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                trace.clear()
                with catching(Exception) as found:
                    learner.fire(Ping(), TrainingPhase())
                _is_raised(found[0], "ValueError: first", ["KeyError: 'second'"], number)
                assert "also raised: KeyError: 'second'" in found[0].__notes__, f"no note on the other: {found[0]!r}"

    def test_rule_15_errors_go_before_cancels(self) -> None:
        """Rule 15: an error, then the widest cancel, whatever the order of their handlers."""
        cancels: list[Make] = [
            lambda: CancelBatchException("batch"),
            lambda: CancelEpochException("epoch"),
            lambda: CancelFittingException("fit"),
        ]
        for makes, wanted in (
            ([*cancels, lambda: ValueError("error")], ["error", "fit", "epoch", "batch"]),
            (cancels, ["fit", "epoch", "batch"]),
            (cancels[:2], ["epoch", "batch"]),
        ):
            outcome = self._fit_that_fails(makes, BatchBegin)
            serial = self._fit_that_fails(makes, BatchBegin, SerialExecutor())
            assert outcome == serial, f"{wanted} were raised by independent handlers: {outcome}, serially {serial}"
            if len(wanted) > 2:
                assert outcome[0] == wanted[0], f"raised is {outcome[0]!r}, of {wanted} it must be the first"
                assert outcome[1] == wanted[1:], f"attached are {outcome[1]}, they must be {wanted[1:]}"

    def test_rule_15_every_exception_says_where_it_was_raised(self) -> None:
        """Rule 15: callback, handler, event, phase, epoch and batch, on the one raised and on the others."""
        trace = self.trace()
        probes = [
            EVERYWHERE[number](trace, raises_at(BatchEnd, lambda: ValueError("broken"), batch=2)) for number in range(2)
        ]
        with self.learner(*probes) as learner:
            with catching(ValueError) as found:
                learner.fit(1)
            raised = with_others(found[0])
            for error, name in zip(raised, ("EveryA", "EveryB"), strict=False):
                note = f"raised in {name}.act at (BatchEnd, TrainingPhase), epoch 1, batch 2"
                assert note in getattr(error, "__notes__", ()), f"the notes of {error!r} do not say {note!r}"
            assert len(raised) == 2, f"two handlers failed, and what was raised with what is attached is {raised}"

    def test_rule_15_the_next_event_runs_as_if_nothing_had_been(self) -> None:
        """Rule 15: a failure is over when it is raised."""
        trace = self.trace()
        probes = [KINDS[0](trace, raises(ValueError("broken"))), KINDS[1](trace), KINDS[2](trace, after=[KINDS[0]])]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                probes[0].does = raises(ValueError("broken"))
                with catching(ValueError):
                    learner.fire(Ping(), TrainingPhase())
                probes[0].does = None
                trace.clear()
                learner.fire(Ping(), TrainingPhase())
                assert sorted(trace.started) == ["ProbeA", "ProbeB", "ProbeC"], f"round {number + 1}: {trace.started}"

    def test_rule_15_an_interrupt_leaves_no_handler_running(self) -> None:
        """Rules 13 and 15: a `KeyboardInterrupt` goes through, as itself, when no handler of the event still runs."""
        trace = self.trace()

        def interrupt(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Interrupt when the others have started."""
            trace.wait_for_start("ProbeB", "ProbeC")
            raise KeyboardInterrupt

        with self.learner(KINDS[0](trace, interrupt), *(kind(trace, waits) for kind in KINDS[1:3])) as learner:
            for number in range(self.rounds):
                trace.clear()
                with catching(KeyboardInterrupt):
                    learner.fire(Ping(), TrainingPhase())
                running = trace.running()
                trace.complain("the event ended")
                assert not running, f"fire was interrupted in round {number + 1} while {running} had not returned"

    def _fit_that_fails(
        self, makes: list[Make], at: type[Event], executor: Executor | None = None
    ) -> tuple[str, list[str]]:
        """Fit with one independent callback for each exception; return what was raised, or stopped it, and others."""
        trace = self.trace()
        probes = [kind(trace, raises_at(at, make)) for kind, make in zip(EVERYWHERE, makes, strict=False)]
        with self.learner(*probes, executor=executor) as learner:
            with suppress(ValueError):  # `stopped` holds it
                learner.fit(1)
            raised = learner.stopped
        return str(raised), [str(other) for other in getattr(raised, "others", ())]


def _is_raised(error: BaseException, wanted: str, others: list[str], number: int) -> None:
    said = f"{type(error).__name__}: {error}"
    attached = [f"{type(other).__name__}: {other}" for other in getattr(error, "others", ())]
    assert said == wanted, f"in round {number + 1} was raised {said!r}; the first in serial order is {wanted!r}"
    assert attached == others, f"in round {number + 1} {attached} were attached; they must be {others}"
