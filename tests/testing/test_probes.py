"""The callbacks that watch an executor, and what the tests of the contract share."""

from __future__ import annotations

import threading

import pytest

from flowtrain import BatchBegin, BatchEnd, Callback, FitBegin, FitEnd, NoConflict, SerialExecutor, TrainingPhase, Write
from flowtrain.callback.events import Event
from flowtrain.callback.view import LearnerView
from flowtrain.errors import ExecutorError
from flowtrain.graph.executor import Executor
from flowtrain.testing.probes import (
    EVERYWHERE,
    KINDS,
    ContractBase,
    Ping,
    Probe,
    Trace,
    catching,
    raises,
    raises_at,
    waits,
    with_others,
)
from flowtrain.testing.tiny import tiny_learner

AGES = 60.0
"""Seconds that nothing here waits for."""


class Contract(ContractBase):
    patience = 0.0
    rounds = 2

    def make_executor(self) -> Executor:
        return SerialExecutor()


def test_a_trace_says_who_started_before_whom() -> None:
    trace = Trace(0.0)
    trace.before = {"c": ["a", "b"]}
    trace.start("a")
    trace.end("a")
    trace.start("c")
    assert trace.wrong == ["c started before b returned"]
    assert trace.started == ["a", "c"]
    assert trace.ended == ["a"]
    assert trace.running() == ["c"]
    assert trace.threads == dict.fromkeys("ac", threading.get_ident())


def test_who_ended_in_time_is_no_complaint() -> None:
    trace = Trace(0.0)
    trace.before = {"b": ["a"]}
    trace.start("a")
    trace.end("a")
    trace.start("b")
    assert not trace.wrong


def test_a_handler_that_runs_twice_at_once_is_running_until_both_have_ended() -> None:
    trace = Trace(0.0)
    trace.start("a")
    trace.start("a")
    assert trace.running() == ["a", "a"]
    trace.end("a")
    assert trace.running() == ["a"]
    trace.end("a")
    assert trace.running() == []


def test_a_cleared_trace_keeps_who_must_run_before_whom() -> None:
    trace = Trace(0.0)
    trace.before = {"b": ["a"]}
    trace.start("b")
    trace.end("b")
    trace.clear()
    assert trace.started == trace.ended == trace.wrong == []
    trace.start("b")
    assert trace.wrong == ["b started before a returned"]


def test_waits_that_are_in_vain_return_when_the_patience_is_over() -> None:
    trace = Trace(0.001)
    trace.wait_for_wrong()
    trace.wait_for_start("a")
    trace.wait_for_end("a")
    assert trace.started == trace.ended == trace.wrong == []


def test_each_wait_returns_when_another_thread_does_what_it_waits_for() -> None:
    trace, returned = Trace(AGES), list[str]()

    def wait() -> None:
        trace.wait_for_start("a", "b")
        returned.append("start")
        trace.wait_for_end("a")
        returned.append("end")
        trace.wait_for_wrong()
        returned.append("wrong")

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    trace.start("a")
    assert not returned
    trace.start("b")
    trace.end("a")
    trace.complain("something")
    waiting.join(AGES / 2)
    assert returned == ["start", "end", "wrong"]
    assert trace.wrong == ["something"]


def test_a_probe_declares_what_it_is_given() -> None:
    trace, other = Trace(0.0), KINDS[1](Trace(0.0))
    answer = NoConflict()
    probe = KINDS[0](trace, access={"cbstate.best": Write()}, after=[KINDS[1]], answers=answer)
    assert probe.state_access() == {"cbstate.best": Write()}
    assert probe.run_after() == (KINDS[1],)
    assert probe.resolve_conflict(other) is answer
    assert other.state_access() == {}
    assert other.run_after() == ()
    assert other.resolve_conflict(probe) is None


def test_a_probe_notes_its_end_also_when_it_raises() -> None:
    contract = Contract()
    trace, seen = contract.trace(), list[tuple[str, Event, list[str]]]()

    def does(probe: Probe, event: Event, learner: LearnerView) -> None:
        seen.append((probe.name, event, trace.running()))
        raise ValueError("broken")

    ping = Ping("text")
    with contract.learner(KINDS[0](trace, does)) as learner, pytest.raises(ValueError, match=r"^broken\n"):
        learner.fire(ping, TrainingPhase())
    assert seen == [("ProbeA", ping, ["ProbeA"])]
    assert ping.text == "text"
    assert trace.started == trace.ended == ["ProbeA"]


def test_the_kinds_handle_pings_and_those_for_everywhere_also_all_else() -> None:
    contract = Contract()
    trace = contract.trace()
    assert [kind.__name__ for kind in KINDS] == [f"Probe{letter}" for letter in "ABCDEFGH"]
    assert [kind.__name__ for kind in EVERYWHERE] == [f"Every{letter}" for letter in "ABCD"]
    with contract.learner(KINDS[0](trace), EVERYWHERE[0](trace)) as learner:
        learner.fire(Ping(), TrainingPhase())
        assert trace.started == ["ProbeA", "EveryA"]
        trace.clear()
        learner.fire(FitBegin(), TrainingPhase())
        assert trace.started == ["EveryA"]


def test_a_contract_makes_a_learner_of_its_callbacks_alone_and_closes_it() -> None:
    contract, given = Contract(), SerialExecutor()
    probe: Callback = KINDS[0](contract.trace())
    with contract.learner(probe) as learner, contract.learner(executor=given, n_batches=3) as other:
        assert list(learner.callbacks) == [probe]
        assert isinstance(learner.executor, SerialExecutor)
        assert other.executor is given
        assert len(learner.data[TrainingPhase]) == 2
        assert len(other.data[TrainingPhase]) == 3
    for each in (learner, other):
        with pytest.raises(ExecutorError, match="closed"):
            tiny_learner(executor=each.executor)


def test_the_trace_of_a_contract_has_its_patience() -> None:
    contract = Contract()
    contract.patience = 3.5
    assert contract.trace().patience == 3.5


def test_an_event_is_fired_in_each_round_on_a_cleared_trace() -> None:
    contract = Contract()
    trace, rounds = contract.trace(), list[int]()
    with contract.learner(KINDS[0](trace), KINDS[1](trace, waits)) as learner:
        for number in contract.fire_in_rounds(learner, trace):
            rounds.append(number)
            assert trace.started == trace.ended == ["ProbeA", "ProbeB"]
    assert rounds == [0, 1]


def test_a_round_in_which_something_came_too_early_fails() -> None:
    contract = Contract()
    trace = contract.trace()
    trace.before = {"ProbeA": ["ProbeB"]}
    early = r"^in round 1: ProbeA started before ProbeB returned"
    with contract.learner(KINDS[0](trace), KINDS[1](trace)) as learner, pytest.raises(AssertionError, match=early):
        list(contract.fire_in_rounds(learner, trace))


def test_a_round_that_ends_while_a_handler_runs_fails() -> None:
    contract = Contract()
    trace = contract.trace()
    probe = KINDS[0](trace, lambda probe, event, learner: trace.start("Other"))
    left = r"^in round 1 the event ended while \['Other'\] had not returned"
    with contract.learner(probe) as learner, pytest.raises(AssertionError, match=left):
        list(contract.fire_in_rounds(learner, trace))


def test_catching_gives_the_exception_that_came() -> None:
    error = KeyError("here")
    with catching(LookupError) as found:
        assert not found
        raise error
    assert found == [error]


def test_catching_fails_where_nothing_came() -> None:
    with pytest.raises(AssertionError, match=r"^no ValueError was raised"), catching(ValueError):
        pass


def test_catching_lets_other_exceptions_through() -> None:
    with pytest.raises(KeyError, match="other"), catching(ValueError):
        raise KeyError("other")


def test_a_handler_that_raises_makes_a_new_error_each_time() -> None:
    contract = Contract()
    error, found = ValueError("broken", 2), list[BaseException]()
    with contract.learner(KINDS[0](contract.trace(), raises(error))) as learner:
        for _ in range(2):
            with catching(ValueError) as caught:
                learner.fire(Ping(), TrainingPhase())
            found += caught
    assert [each.args for each in found] == [("broken", 2)] * 2
    assert len({id(each) for each in (error, *found)}) == 3


def test_a_handler_raises_once_at_the_event_that_is_asked_for() -> None:
    contract = Contract()
    does = raises_at(BatchEnd, lambda: ValueError("here"), batch=2)
    with contract.learner(EVERYWHERE[0](contract.trace(), does)) as learner:
        learner.fire(BatchBegin(), TrainingPhase())
        learner.fire(BatchEnd(), TrainingPhase())
        learner.fire(FitEnd(), TrainingPhase())
        with pytest.raises(ValueError, match=r"^here\n"):
            learner.fire(BatchEnd(), TrainingPhase())
        learner.fire(BatchEnd(), TrainingPhase())


def test_all_that_is_attached_is_found_however_deep() -> None:
    a, b, c, d = (ValueError(letter) for letter in "abcd")
    vars(a)["others"] = [b, d]
    vars(b)["others"] = [c]
    assert with_others(a) == [a, b, c, d]
    assert with_others(d) == [d]
