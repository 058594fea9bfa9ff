"""Rules 15 to 18 as tests: failures, cancels and what they close, `FitEnd`, and events that handlers fire."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from flowtrain.errors import UsageError
from flowtrain.events import BatchBegin, BatchEnd, EpochBegin, EpochEnd, Event, FitBegin, FitEnd
from flowtrain.execution import Executor, SerialExecutor
from flowtrain.learner import Learner
from flowtrain.phases import TrainingPhase
from flowtrain.protect import LearnerView
from flowtrain.signals import CancelBatchException, CancelEpochException, CancelFittingException
from flowtrain.testing.probes import KINDS, ContractBase, Everywhere, Ping, Probe, catching

__all__ = ["FailurePromises"]

_EVERYWHERE = tuple(type(f"Every{letter}", (Everywhere,), {}) for letter in "ABCD")

_Failing = Callable[[], BaseException]


class FailurePromises(ContractBase):
    """What an executor promises about handlers that raise, and about those that fire."""

    def test_rule_15_those_that_depend_on_no_failed_one_still_run(self) -> None:
        """Rule 15: all of them, also later ones; and none that depends on a failed one, over however many edges."""
        trace = self.trace()
        probes = [
            KINDS[0](trace),
            KINDS[1](trace, _raises(ValueError("broken"))),
            KINDS[2](trace, after=[KINDS[1]]),
            KINDS[3](trace, after=[KINDS[2], KINDS[0]]),
            KINDS[4](trace, _waits),
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

        probes = [KINDS[0](trace), KINDS[1](trace, late), KINDS[2](trace, _raises(KeyError("second")))]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                trace.clear()
                with catching(Exception) as found:
                    learner.fire(Ping(), TrainingPhase())
                _is_raised(found[0], "ValueError: first", ["KeyError: 'second'"], number)
                assert "also raised: KeyError: 'second'" in found[0].__notes__, f"no note on the other: {found[0]!r}"

    def test_rule_15_errors_go_before_cancels(self) -> None:
        """Rule 15: an error, then the widest cancel, whatever the order of their handlers."""
        cancels: list[_Failing] = [
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
            _EVERYWHERE[number](trace, _raises_at(BatchEnd, lambda: ValueError("broken"), batch=2))
            for number in range(2)
        ]
        with self.learner(*probes) as learner:
            with catching(ValueError) as found:
                learner.fit(1)
            for error, name in zip(_with_others(found[0]), ("EveryA", "EveryB"), strict=True):
                note = f"raised in {name}.act at (BatchEnd, TrainingPhase), epoch 1, batch 2"
                assert note in getattr(error, "__notes__", ()), f"the notes of {error!r} do not say {note!r}"

    def test_rule_15_the_next_event_runs_as_if_nothing_had_been(self) -> None:
        """Rule 15: a failure is over when it is raised."""
        trace = self.trace()
        probes = [KINDS[0](trace, _raises(ValueError("broken"))), KINDS[1](trace), KINDS[2](trace, after=[KINDS[0]])]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                probes[0].does = _raises(ValueError("broken"))
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

        with self.learner(KINDS[0](trace, interrupt), *(kind(trace, _waits) for kind in KINDS[1:3])) as learner:
            for number in range(self.rounds):
                trace.clear()
                with catching(KeyboardInterrupt):
                    learner.fire(Ping(), TrainingPhase())
                running = trace.running()
                trace.complain("the event ended")
                assert not running, f"fire was interrupted in round {number + 1} while {running} had not returned"

    def test_rule_16_every_begin_has_one_end(self) -> None:
        """Rule 16: whoever raises what, at whichever event, the events that follow are those of the serial run."""
        kinds = (CancelBatchException, CancelEpochException, CancelFittingException, ValueError)
        for event_type in (FitBegin, EpochBegin, BatchBegin, BatchEnd, EpochEnd):
            for kind in kinds:
                seen = self._events_of_a_fit(kind, event_type, self.make_executor())
                serial = self._events_of_a_fit(kind, event_type, SerialExecutor())
                what = f"after {kind.__name__} at {event_type.__name__}"
                assert seen == serial, f"{what} came {seen}; serially {serial}"
                for scope in ("Fit", "Epoch", "Batch"):
                    begun = seen.count(f"{scope}Begin")
                    ended = seen.count(f"{scope}End") + seen.count(f"{scope}Cancelled")
                    assert begun == ended, f"{what} {begun} {scope}Begin have {ended} ends: {seen}"

    def test_rule_17_fit_end_runs_for_every_callback(self) -> None:
        """Rule 17: also for those that depend on one that failed there; then the worst failure is raised."""
        for early in (None, ValueError("early")):
            trace = self.trace()
            ends: list[str] = []

            def does(probe: Probe, event: Event, learner: LearnerView, ends: list[str] = ends) -> None:
                """Note the end of the fit, and fail there."""
                if isinstance(event, FitEnd):
                    ends.append(probe.name)
                    raise ValueError(f"end {probe.name}")

            fails = _EVERYWHERE[3](trace, None if early is None else _raises_at(BatchEnd, _giving(early)))
            probes = [_EVERYWHERE[0](trace, does), _EVERYWHERE[1](trace, does, after=[_EVERYWHERE[0]])]
            with self.learner(*probes, _EVERYWHERE[2](trace, does), fails) as learner, catching(ValueError) as found:
                learner.fit(1)
            assert sorted(ends) == ["EveryA", "EveryB", "EveryC"], f"FitEnd ran for {sorted(ends)}"
            wanted = [*([] if early is None else ["early"]), "end EveryA", "end EveryB", "end EveryC"]
            said = [str(error) for error in _with_others(found[0])]
            assert said == wanted, f"raised and attached are {said}; they must be {wanted}"

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
                    _waits(probe, event, learner)
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
            KINDS[1](trace, _raises(ValueError("broken"))),
            _Listens(trace),
        ]
        with self.learner(*probes) as learner:
            for number in range(self.rounds):
                trace.clear()
                probes[1].does = _raises(ValueError("broken"))
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

        def starting(start: Callable[[Learner], object]) -> Callable[[Probe, Event, LearnerView], None]:
            """Return a handler that starts training."""
            return lambda probe, event, learner: (trace.wait_for_start("ProbeC"), start(held[0]))[0]

        probes = [kind(trace, starting(start)) for kind, start in zip(KINDS, starts, strict=False)]
        with self.learner(*probes) as learner:
            held.append(learner)
            for number in range(self.rounds):
                trace.clear()
                with catching(UsageError) as found:
                    learner.fire(Ping(), TrainingPhase())
                refused = len(_with_others(found[0]))
                assert refused == len(starts), f"in round {number + 1} only {refused} of {len(starts)} were refused"
        held.clear()

    def _fit_that_fails(
        self, makes: list[_Failing], at: type[Event], executor: Executor | None = None
    ) -> tuple[str, list[str]]:
        """Fit with one independent callback for each exception; return what was raised, or stopped it, and others."""
        trace = self.trace()
        probes = [kind(trace, _raises_at(at, make)) for kind, make in zip(_EVERYWHERE, makes, strict=False)]
        with self.learner(*probes, executor=executor) as learner:
            with suppress(ValueError):  # `stopped` holds it
                learner.fit(1)
            raised = learner.stopped
        return str(raised), [str(other) for other in getattr(raised, "others", ())]

    def _events_of_a_fit(self, kind: type[Exception], at: type[Event], executor: Executor) -> list[str]:
        """Fit with one callback that raises at an event among others that do not; return the events that came."""
        trace, events = self.trace(), list[str]()

        def note(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Keep the name of the event."""
            events.append(type(event).__name__)

        raising = _EVERYWHERE[1](trace, _raises_at(at, lambda: kind("here")))
        with self.learner(_EVERYWHERE[0](trace, note), raising, _EVERYWHERE[2](trace), executor=executor) as learner:
            with suppress(ValueError):  # one of those that are tried
                learner.fit(1)
        return events


class _Later(Event):
    """Fired by an event that fails."""


class _Listens(Everywhere):
    """Notes each `_Later`."""

    def do(self, event: Event, learner: LearnerView) -> None:
        """Note the event."""
        if isinstance(event, _Later):
            self.trace.start("later")
            self.trace.end("later")


def _waits(probe: Probe, event: Event, learner: LearnerView) -> None:
    probe.trace.wait_for_wrong()


def _raises(error: Exception) -> Callable[[Probe, Event, LearnerView], None]:
    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Raise an error like it."""
        raise type(error)(*error.args)

    return fail


def _raises_at(at: type[Event], make: _Failing, batch: int = 1) -> Callable[[Probe, Event, LearnerView], None]:
    """Return a handler that raises once: at the n-th event of a type."""
    met: list[Event] = []

    def fail(probe: Probe, event: Event, learner: LearnerView) -> None:
        """Count, and raise."""
        if isinstance(event, at):
            met.append(event)
            if len(met) == batch:
                raise make()

    return fail


def _giving(error: BaseException) -> _Failing:
    return lambda: error


def _with_others(error: BaseException) -> list[BaseException]:
    """Return an exception and those attached to it; one of these may have others of its own."""
    found = [error]
    for other in getattr(error, "others", ()):
        found += _with_others(other)
    return found


def _is_raised(error: BaseException, wanted: str, others: list[str], number: int) -> None:
    said = f"{type(error).__name__}: {error}"
    attached = [f"{type(other).__name__}: {other}" for other in getattr(error, "others", ())]
    assert said == wanted, f"in round {number + 1} was raised {said!r}; the first in serial order is {wanted!r}"
    assert attached == others, f"in round {number + 1} {attached} were attached; they must be {others}"
