"""The contract of executors as a test class: subclass it, define how to make an executor, and run pytest.

::

    class TestMyExecutor(ExecutorContract):
        def make_executor(self) -> Executor:
            return MyExecutor(workers=2)

The name of a test has the number of its rule in ``docs/rules.md``, and its docstring is the promise. An executor that
chooses between several ways to run an event is tested in each of them, by a subclass whose `make_executor` fixes the
choice. The class itself does not import pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch

from flowtrain.callback.access import Read, Write
from flowtrain.callback.events import BatchBegin, BatchEnd, EpochBegin, EpochEnd, Event, FitBegin, FitEnd
from flowtrain.callback.phases import TrainingPhase
from flowtrain.callback.resolution import NoConflict
from flowtrain.callback.view import LearnerView
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    ExecutorError,
    UsageError,
)
from flowtrain.graph.executor import Executor, find_executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.learner import Learner
from flowtrain.testing.equivalence import assert_equivalent
from flowtrain.testing.probes import (
    KINDS,
    TORCH_SETTINGS,
    ContractBase,
    Draws,
    Looks,
    Ping,
    Probe,
    Trace,
    catching,
    fails_beside,
    messages,
    raises,
    torch_state,
    waits,
)
from flowtrain.testing.tiny import tiny_learner

__all__ = ["ExecutorContract"]

_ABC = ["ProbeA", "ProbeB", "ProbeC"]


class ExecutorContract(ContractBase):
    """The promises of every executor, each as a test. A subclass defines `make_executor`."""

    # --- the executor and its learner

    def test_it_is_an_executor(self) -> None:
        """It has a name, can be passed to a learner, and `make_executor` makes a new one at each call."""
        executor = self.make_executor()
        assert find_executor(executor) is executor
        assert isinstance(executor.name, str), f"name is {executor.name!r}, and no text"
        assert executor.name, "name is empty; reports show it"
        assert self.make_executor() is not executor, "make_executor() returned the same executor again"
        executor.close()

    def test_bind_takes_one_learner(self) -> None:
        """An executor belongs to one learner: a second learner is refused, and the first one still works."""
        trace, executor = Trace(self.patience), self.make_executor()
        with self.learner(KINDS[0](trace), KINDS[1](trace), executor=executor) as learner:
            with catching(ExecutorError), self.learner(executor=executor):
                pass
            executor.bind(learner.loop.dispatch)  # binding to the same learner again is allowed
            learner.fire(Ping(), TrainingPhase())
            assert sorted(trace.started) == _ABC[:2], f"the first learner's event ran {trace.started}"

    def test_compile_needs_a_learner(self) -> None:
        """`compile` before `bind` is an error, because the runner could not report failures."""
        with self.learner(KINDS[0](Trace(self.patience))) as learner:
            unbound = self.make_executor()
            with catching(ExecutorError):
                unbound.compile(learner.callbacks.plan(Ping, TrainingPhase))
            unbound.close()

    def test_explain_is_one_line(self) -> None:
        """`explain` describes in one line how a plan is run, before it has run and after."""
        trace = Trace(self.patience)
        with self.learner(*(kind(trace) for kind in KINDS[:3])) as learner:
            for _ in range(self.rounds):
                said = learner.executor.explain(learner.callbacks.plan(Ping, TrainingPhase))
                assert isinstance(said, str), f"explain() returned {said!r}"
                assert "\n" not in said, f"explain() is more than a line: {said!r}"
                learner.fire(Ping(), TrainingPhase())

    def test_a_change_of_callbacks_counts_from_the_next_event_on(self) -> None:
        """After a change of callbacks the next event runs the new plan."""
        trace = Trace(self.patience)
        with self.learner(*(kind(trace) for kind in KINDS[:3])) as learner:
            for where in self.each_round():
                self.ping(learner, trace, where)
            learner.remove_callback("ProbeB")
            learner.add_callback(KINDS[3](trace))
            for where in self.each_round():
                self.ping(learner, trace, where)
                _same(where, "ran", sorted(trace.started), ["ProbeA", "ProbeC", "ProbeD"])

    def test_flush_and_close_may_be_repeated(self) -> None:
        """`flush` and `close` return at once if no work is pending, also a second time and without a learner."""
        unused, executor, trace = self.make_executor(), self.make_executor(), Trace(self.patience)
        with self.learner(*(kind(trace) for kind in KINDS[:3]), executor=executor) as learner:
            learner.fire(Ping(), TrainingPhase())
            executor.flush()
            executor.flush()
        for each in (unused, executor) * 2:
            each.close()

    def test_a_closed_executor_runs_nothing(self) -> None:
        """After `close` an event is an error, no handler runs, and no learner can use the executor."""
        trace, executor, unused = Trace(self.patience), self.make_executor(), self.make_executor()
        with self.learner(*(kind(trace) for kind in KINDS[:3]), executor=executor) as learner:
            learner.fire(Ping(), TrainingPhase())
            executor.close()
            trace.clear()
            with catching(ExecutorError):
                learner.fire(Ping(), TrainingPhase())
            with catching(ExecutorError):
                learner.fit(1)
            assert not trace.started, f"{trace.started} ran after close()"
        unused.close()
        with catching(ExecutorError), self.learner(executor=unused):
            pass

    def test_a_resumable_executor_flushes_and_continues_its_counts(self) -> None:
        """`state_dict` of a `Resumable` flushes; a new executor that loads its counts continues from there."""
        saved = self.counts(events=1)  # so few that an executor which measures callbacks first moves none meanwhile
        resumed, whole = self.counts(events=1, saved=saved), self.counts(events=2)
        assert resumed == whole, f"1 event, a resume and 1 event give the counts {resumed}; 2 events give {whole}"

    def test_close_ends_the_threads(self) -> None:
        """The threads of the executor have ended when `close` returns, also after a failure."""
        before, trace = set(threading.enumerate()), Trace(self.patience)
        with self.learner(KINDS[0](trace, fails_beside(ValueError)), *(kind(trace) for kind in KINDS[1:4])) as learner:
            for where in self.each_round():
                self.ping(learner, trace, where, ValueError)
        left = [thread.name for thread in threading.enumerate() if thread not in before]
        assert not left, f"these threads run after close(): {left}"

    # --- order

    def test_rule_12_no_handler_starts_before_those_it_waits_for(self) -> None:
        """Rule 12: edges of every kind hold, also against the order of the list, and where branches join."""
        trace = Trace(self.patience)
        probes = [
            KINDS[0](trace, waits, after=[KINDS[3]], access={"cbstate.mark": Write()}),
            KINDS[1](trace, waits, access={"cbstate.mark": Read(optional=True)}),
            KINDS[2](trace, waits, after=[KINDS[0]], access={"resource.one": Write()}),
            KINDS[3](trace, waits),
            KINDS[4](trace, waits, access={"resource.one": Write()}),
            KINDS[5](trace, after=[KINDS[1], KINDS[3]]),
            KINDS[6](trace, after=[KINDS[4], KINDS[5]]),
        ]
        trace.before = {
            "ProbeA": ["ProbeD"],
            "ProbeB": ["ProbeA", "ProbeD"],
            "ProbeC": ["ProbeA", "ProbeD"],
            "ProbeE": ["ProbeA", "ProbeC", "ProbeD"],
            "ProbeF": ["ProbeA", "ProbeB", "ProbeD"],
            "ProbeG": ["ProbeA", "ProbeB", "ProbeC", "ProbeD", "ProbeE", "ProbeF"],
        }
        with self.learner(*probes) as learner:
            for where in self.each_round():
                self.ping(learner, trace, where)
                _same(where, "ran", sorted(trace.started), [probe.name for probe in probes])

    def test_rule_12_every_handler_gets_its_event_phase_and_view(self) -> None:
        """Rule 12: each handler of the plan runs once, with the event and phase that were fired and its own view."""
        trace, got = Trace(self.patience), dict[str, tuple[Event, LearnerView]]()

        def note(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Keep the arguments of the call."""
            got[probe.name] = (event, learner)

        probes = [kind(trace, note) for kind in KINDS[:4]]
        with self.learner(*probes) as learner:
            plan, event = learner.callbacks.plan(Ping, TrainingPhase), Ping()
            for where in self.each_round():
                self.ping(learner, trace, where, event=event)
                _same(where, "ran", sorted(trace.started), [planned.node.name for planned in plan.handlers])
                for planned, probe in zip(plan.handlers, probes, strict=True):
                    found, view = got[probe.name]
                    assert found is event, f"{probe.name} got {found!r} and not the event that was fired"
                    assert probe.phase is TrainingPhase(), f"{probe.name} got {probe.phase!r}; TrainingPhase was fired"
                    assert view is planned.view, f"{probe.name} got the view of another handler"

    def test_rule_13_an_event_ends_when_all_its_handlers_have(self) -> None:
        """Rules 13 and 15: `fire` returns or raises, even an interrupt, only after every handler has ended."""
        for error in (None, ValueError, KeyboardInterrupt):
            trace = Trace(self.patience)
            first = KINDS[0](trace, waits if error is None else fails_beside(error))
            with self.learner(first, *(kind(trace, waits) for kind in KINDS[1:3])) as learner:
                for where in self.each_round():
                    self.ping(learner, trace, where, error)

    def test_rule_13_what_must_not_run_together_runs_in_the_serial_order(self) -> None:
        """Rule 13: writers of one path with `NoConflict`, and users of one resource, run one after the other."""
        for path, answer in (("cbstate.best", NoConflict()), ("resource.pen", None)):
            trace = Trace(self.patience)
            trace.before = {"ProbeB": ["ProbeA"], "ProbeC": ["ProbeA", "ProbeB"]}
            probes = [kind(trace, waits, access={path: Write()}, answers=answer) for kind in KINDS[:3]]
            with self.learner(*probes) as learner:
                for where in self.each_round():
                    self.ping(learner, trace, where)
                    _same(where, "ran", trace.started, _ABC)

    def test_rule_13_random_numbers_are_drawn_on_the_training_thread(self) -> None:
        """Rules 6 and 13: a handler with ``resource.rng`` runs on the thread that trains, beside others or not."""
        trace, draws = Trace(self.patience), {"resource.rng": Write()}
        trace.before = {"ProbeD": ["ProbeB"]}
        probes = [kind(trace, waits, access=draws if kind in KINDS[1:4:2] else None) for kind in KINDS[:5]]
        with self.learner(*probes) as learner:
            for where in self.each_round():
                self.ping(learner, trace, where)
                for name in ("ProbeB", "ProbeD"):
                    here = trace.threads[name] == threading.get_ident()
                    assert here, f"{name} drew random numbers on another thread {where}"

    def test_rule_13_it_comes_to_the_serial_result(self) -> None:
        """Rule 13: parameters, ``cbstate``, attributes and random numbers are those of the serial run, to the bit."""

        def make_learner(executor: Executor) -> Learner:
            """Make a learner with the default callbacks and some of our own."""
            ours = (Draws({"cbstate.total": Read()}), Draws({"cbstate.total": Write()}), Draws({}))
            return tiny_learner(*ours, executor=executor, optimizer=torch.optim.AdamW)

        assert_equivalent(make_learner, executors=[self.make_executor], interleavings=0, epochs=2)

    def test_rule_14_a_handler_sees_the_training_threads_state_of_torch(self) -> None:
        """Rule 14: a handler sees torch's settings of the training thread, within contexts that set them or not."""
        trace, seen, later = Trace(self.patience), dict[str, dict[str, object]](), Looks()
        names = [kind.__name__ for kind in KINDS[:4]]

        def look(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Wait for the other handlers, so that no thread runs two, and note the state of torch."""
            trace.wait_for_start(*names)
            seen[probe.name] = torch_state()

        with self.learner(*(kind(trace, look) for kind in KINDS[:4]), later) as learner:
            for where in self.each_round():
                for setting in TORCH_SETTINGS:
                    with ExitStack() as stack:
                        for enter in setting:
                            stack.enter_context(enter())
                        wanted = torch_state()
                        self.ping(learner, trace, where)
                        seen["the training thread, after the event,"] = torch_state()
                        learner.flush()
                        seen[later.name] = later.as_in_place(wanted)
                    for name, found in seen.items():
                        for what, value in wanted.items():
                            assert found[what] == value, f"{name} saw {what} {found[what]} {where}; wanted is {value}"

    # --- failures

    def test_rule_15_those_that_depend_on_no_failed_one_still_run(self) -> None:
        """Rule 15: every handler that depends on no failed one runs, no other; the next event runs all of them."""
        trace, broken = Trace(self.patience), raises(lambda: ValueError("broken"))
        probes = [
            KINDS[0](trace),
            KINDS[1](trace, broken),
            KINDS[2](trace, after=[KINDS[1]]),
            KINDS[3](trace, after=[KINDS[2], KINDS[0]]),
            KINDS[4](trace, waits),
            KINDS[5](trace, after=[KINDS[0], KINDS[4]]),
        ]
        with self.learner(*probes) as learner:
            for where in self.each_round():
                probes[1].does = broken
                self.ping(learner, trace, where, ValueError)
                _same(where, "ran", sorted(trace.started), ["ProbeA", "ProbeB", "ProbeE", "ProbeF"])
                probes[1].does = None
                self.ping(learner, trace, where)
                _same(where, "ran after a failure", sorted(trace.started), [probe.name for probe in probes])

    def test_rule_15_the_first_in_serial_order_is_raised(self) -> None:
        """Rule 15: the first in serial order, not in time, is raised; the others are in ``others`` and in the notes."""
        trace = Trace(self.patience)

        def late(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Fail after the other handler has failed."""
            trace.wait(lambda: "ProbeC" in trace.ended)
            raise ValueError("first")

        probes = [KINDS[0](trace), KINDS[1](trace, late), KINDS[2](trace, raises(lambda: KeyError("second")))]
        with self.learner(*probes) as learner:
            for where in self.each_round():
                raised = self.ping(learner, trace, where, Exception)
                _same(where, "were raised", messages(raised), ["first", "'second'"])
                notes = getattr(raised, "__notes__", [])
                assert "also raised: KeyError: 'second'" in notes, f"no note on the other: {raised!r}"

    def test_rule_15_errors_go_before_cancels(self) -> None:
        """Rule 15: an error is raised first, then the widest cancel, in any order of their handlers."""
        kinds = {
            "batch": CancelBatchException,
            "epoch": CancelEpochException,
            "fit": CancelFittingException,
            "error": ValueError,
        }
        for count in (3, 4):
            trace, makes = Trace(self.patience), [partial(make, text) for text, make in kinds.items()][:count]
            probes = [kind(trace, raises(make, BatchBegin)) for kind, make in zip(KINDS, makes, strict=False)]
            with self.learner(*probes) as learner:
                with suppress(ValueError):  # `stopped` has the exception too
                    learner.fit(1)
                _same("in a fit", "were raised", messages(learner.stopped), list(kinds)[count - 1 :: -1])

    def test_rule_15_every_exception_says_where_it_was_raised(self) -> None:
        """Rule 15: notes name callback, handler, event, phase, epoch and batch, also of the attached exceptions."""
        trace = Trace(self.patience)
        probes = [kind(trace, raises(lambda: ValueError("broken"), BatchEnd, 2)) for kind in KINDS[:2]]
        with self.learner(*probes) as learner:
            with catching(ValueError) as found:
                learner.fit(1)
            raised = [found[0], *getattr(found[0], "others", ())]
            assert len(raised) == 2, f"two handlers failed, and {raised} were raised, attached ones included"
            for error, name in zip(raised, _ABC, strict=False):
                note = f"raised in {name}.act at (BatchEnd, TrainingPhase), epoch 1, batch 2"
                assert note in getattr(error, "__notes__", ()), f"the notes of {error!r} do not say {note!r}"

    def test_rule_16_every_begin_has_one_end(self) -> None:
        """Rule 16: after any exception at any event, the events that follow are those of the serial run."""
        for at in (FitBegin, EpochBegin, BatchBegin, BatchEnd, EpochEnd):
            for kind in (CancelBatchException, CancelEpochException, CancelFittingException, ValueError):
                seen, serial = (self.events(kind, at, each) for each in (self.make_executor(), SerialExecutor()))
                assert seen == serial, f"after {kind.__name__} at {at.__name__} came {seen}; serially {serial}"

    def test_rule_17_fit_end_runs_for_every_callback(self) -> None:
        """Rule 17: `FitEnd` runs even for callbacks that depend on a failed one; then the worst failure is raised."""
        for early in ([], ["early"]):
            trace, ends = Trace(self.patience), list[str]()

            def fails(probe: Probe, event: Event, learner: LearnerView, ends: list[str] = ends) -> None:
                """Note the end of the fit, and fail at it."""
                if isinstance(event, FitEnd):
                    ends.append(probe.name)
                    raise ValueError(f"end {probe.name}")

            probes = [
                KINDS[0](trace, fails),
                KINDS[1](trace, fails, after=[KINDS[0]]),
                KINDS[2](trace, fails),
                KINDS[3](trace, raises(lambda: ValueError("early"), BatchEnd) if early else None),
            ]
            with self.learner(*probes) as learner, catching(ValueError) as found:
                learner.fit(1)
            _same("in a fit", "got FitEnd", sorted(ends), _ABC)
            _same("by a fit", "were raised", messages(found[0]), [*early, *(f"end {name}" for name in _ABC)])

    # --- events that handlers fire

    def test_rule_18_fired_events_wait_for_the_current_one(self) -> None:
        """Rule 18: they run after the event has ended, in the serial order of the firing handlers."""
        trace, order = Trace(self.patience), list[str]()

        def fires(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Fire two events, and another one at the first event of ProbeB."""
            assert isinstance(event, Ping)
            if not event.text:
                if probe.name == "ProbeB":  # on several threads ProbeB fires last in time
                    trace.wait(lambda: "ProbeC" in trace.ended)
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
            for where in self.each_round():
                self.ping(learner, trace, where)
                _same(where, "were fired", order, [f"{name} {each}" for name in _ABC for each in range(2)] + ["nested"])
                order.clear()

    def test_rule_18_fired_events_are_dropped_if_the_event_raises(self) -> None:
        """Rule 18: events that were fired in an event that raises never run, not even after a later event."""
        trace, heard, broken = Trace(self.patience), list[str](), raises(lambda: ValueError("broken"))

        def fires(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Fire an event with a text at an event without one; note the texts."""
            assert isinstance(event, Ping)
            if event.text:
                heard.append(event.text)
            else:
                learner.fire(Ping("later"))

        probes = [KINDS[0](trace, fires), KINDS[1](trace, broken)]
        with self.learner(*probes) as learner:
            for where in self.each_round():
                probes[1].does = broken
                self.ping(learner, trace, where, ValueError)
                _same(where, "were handled although their event raised", heard, [])
                probes[1].does = None
                self.ping(learner, trace, where)
                _same(where, "were handled after the next event", heard, ["later"])
                heard.clear()

    def test_rule_18_training_cannot_be_started_in_a_handler(self) -> None:
        """Rule 18: `fit`, `epoch` and `step` in a handler are errors on every thread."""
        trace, held = Trace(self.patience), list[Learner]()

        def starts(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Start training while the other handlers run."""
            trace.wait_for_start("ProbeC")
            batch = held[0].data[TrainingPhase][0]
            if probe.name == "ProbeA":
                held[0].fit(1)
            elif probe.name == "ProbeB":
                held[0].epoch(TrainingPhase)
            else:
                held[0].step(TrainingPhase, batch)

        with self.learner(*(kind(trace, starts) for kind in KINDS[:3])) as learner:
            held.append(learner)
            for where in self.each_round():
                raised = self.ping(learner, trace, where, UsageError)
                refused = len(messages(raised))
                assert refused == 3, f"{where} only {refused} of fit, epoch and step were refused"
        held.clear()


def _same(where: str, what: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    assert list(found) == list(wanted), f"{where} {what} {list(found)}; wanted are {list(wanted)}"
