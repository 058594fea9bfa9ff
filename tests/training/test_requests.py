"""Handlers' requests for checkpoints wait in a queue (rules 18, 28); those of other threads wait in a mailbox."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowtrain import (
    BatchEnd,
    Callback,
    CallbackError,
    CancelEpochException,
    EpochEnd,
    Event,
    ExecutorError,
    LearnerView,
    Phase,
    TrainingPhase,
    UsageError,
    on,
)
from flowtrain.graph.executor import Executor, Mailbox, Resumable, SerialExecutor, find_executor
from flowtrain.testing import ShuffledExecutor, tiny_learner
from flowtrain_dask import DaskExecutor

EXECUTORS: dict[str, Callable[[], Executor]] = {
    "serial": SerialExecutor,
    "shuffled": ShuffledExecutor,
    "dask": lambda: DaskExecutor(workers=3, parallel="always"),
}


class Mine(Event):
    """A user's event."""

    def __init__(self, number: int) -> None:
        self.number = number


class Asks(Callback):
    """Runs functions of the test at the end of the epoch and at the user's events."""

    def __init__(self, name: str, do: Callable[[Event, LearnerView], None]) -> None:
        self.name = name
        self.do = do

    @on(EpochEnd, TrainingPhase, access={})
    def end(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.do(event, learner)

    @on(Mine, access={})
    def mine(self, event: Mine, phase: Phase, learner: LearnerView) -> None:
        self.do(event, learner)


def taken(*callbacks: Callback, executor: str = "serial", fails: type[Exception] | None = None) -> list[str]:
    """Run an epoch; return the file names of the checkpoints that were written."""
    found: list[str] = []
    learner = tiny_learner(*callbacks, executor=EXECUTORS[executor](), n_batches=1, default_callbacks=False)
    learner.loop.dispatch.checkpoint = lambda requests: found.extend(request.path for request in requests)
    with learner:
        if fails is None:
            learner.fit(1)
        else:
            with pytest.raises(fails):
                learner.fit(1)
        assert learner.state.requests == learner.state.fired == []
    return found


@pytest.mark.parametrize("executor", EXECUTORS)
def test_checkpoints_are_written_in_the_serial_order_of_their_requests(executor: str) -> None:
    """B makes its request earlier in time if it can; requests of fired events come after those of the event itself."""
    asked = threading.Event()

    def late(event: Event, learner: LearnerView) -> None:
        if isinstance(event, Mine):
            learner.request_checkpoint(f"A of {event.number}")
            if event.number == 1:
                learner.fire(Mine(3))
            return
        if executor == "dask":
            assert asked.wait(60)
        learner.request_checkpoint("A 1")
        learner.fire(Mine(1))
        learner.request_checkpoint("A 2")

    def early(event: Event, learner: LearnerView) -> None:
        if isinstance(event, EpochEnd):
            learner.request_checkpoint("B 1")
            learner.fire(Mine(2))
            asked.set()

    wanted = ["A 1", "A 2", "B 1", "A of 1", "A of 2", "A of 3"]
    assert taken(Asks("A", late), Asks("B", early), executor=executor) == wanted


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_drops_the_requests_and_a_cancel_does_not(executor: str) -> None:
    def asks(event: Event, learner: LearnerView) -> None:
        learner.request_checkpoint("one")
        if isinstance(event, EpochEnd):
            learner.fire(Mine(1))

    def raises(failure: Exception, at: type[Event]) -> Callable[[Event, LearnerView], None]:
        def do(event: Event, learner: LearnerView) -> None:
            if isinstance(event, at):
                raise failure

        return do

    for at in (EpochEnd, Mine):  # checkpoints come after the event and those that it fired
        failing = Asks("B", raises(ValueError("no"), at))
        assert taken(Asks("A", asks), failing, executor=executor, fails=ValueError) == []
        cancelling = Asks("B", raises(CancelEpochException("enough"), at))
        assert taken(Asks("A", asks), cancelling, executor=executor) == ["one"]


def test_a_setup_cannot_ask_for_one() -> None:
    class Early(Callback):
        def setup(self, learner: LearnerView) -> None:
            learner.request_checkpoint("a.ckpt")

    learner = tiny_learner()
    with pytest.raises(CallbackError) as caught:
        learner.add_callback(Early())
    assert (
        str(caught.value) == "Early.setup asks for a checkpoint, and no learner is built yet. Ask for it at FitBegin."
    )
    assert learner.state.requests == []


class Late(Callback):
    """A deferred callback that makes a request which only the training thread can grant."""

    deferrable = True
    stochastic = False

    @on(BatchEnd, access={})
    def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.request_checkpoint("a.ckpt")


def test_a_deferred_handler_cannot_ask_for_one() -> None:
    with pytest.raises(UsageError, match=r"Late calls learner\.request_checkpoint\(.*a\.ckpt.*\), but it is deferred"):
        tiny_learner(Late(), executor=DaskExecutor(), n_batches=1).fit(1)


# --- the mailbox


def test_calls_are_made_in_order_and_what_they_put_in_waits() -> None:
    mailbox, made = Mailbox(), list[str]()

    def first() -> None:
        made.append("first")
        mailbox.put(lambda: made.append("third"))

    mailbox.put(first)
    thread = threading.Thread(target=mailbox.put, args=(lambda: made.append("second"),))
    thread.start()
    thread.join()
    mailbox.empty()
    assert made == ["first", "second"]
    assert len(mailbox.calls) == 1
    mailbox.empty()
    assert made == ["first", "second", "third"]


def test_what_a_call_raises_leaves_the_others_for_the_next_time() -> None:
    mailbox, made = Mailbox(), list[str]()
    calls = mailbox.calls

    def fails() -> None:
        raise ValueError("no")

    mailbox.put(fails)
    mailbox.put(lambda: made.append("second"))
    with pytest.raises(ValueError, match="no"):
        mailbox.empty()
    mailbox.empty()
    assert made == ["second"]
    mailbox.put(fails)
    mailbox.stopping = True
    mailbox.clear()
    assert not mailbox.stopping
    assert mailbox.calls is calls == [], "the loop keeps a reference to this list"


# --- an executor's part of a checkpoint


def test_an_executor_has_a_part_in_checkpoints_or_none() -> None:
    assert isinstance(DaskExecutor(), Resumable)
    assert not isinstance(SerialExecutor(), Resumable)

    class Half(SerialExecutor):
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(
        ExecutorError, match=r"has state_dict alone, so nothing of it could be resumed\. An executor has"
    ):
        find_executor(Half())


class Counting(SerialExecutor):
    """An executor that counts its flushes, and keeps the state that is restored to it."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = 0
        self.given: list[Any] = []

    def flush(self) -> None:
        self.flushed += 1


class Keeping(Counting):
    """An executor with state of its own in checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        return {"events": 7}

    def load_state_dict(self, state: Any) -> None:
        self.given.append(dict(state))


def test_an_executor_with_a_state_is_not_flushed_and_gets_its_state_back(tmp_path: Path) -> None:
    def asks(event: Event, learner: LearnerView) -> None:
        learner.request_checkpoint(tmp_path / "a.ckpt")

    flushed: dict[type[Counting], int] = {}
    for kind in (Counting, Keeping):
        executor = kind()
        with tiny_learner(Asks("A", asks), executor=executor, n_batches=1) as learner:
            learner.fit(1)
            flushed[kind] = executor.flushed
    assert flushed[Counting] == flushed[Keeping] + 1  # one flush more, for the checkpoint
    for other, given in ((Keeping(), [{"events": 7}]), (Counting(), [])):
        with tiny_learner(Asks("A", asks), executor=other, n_batches=1) as learner:
            learner.fit(2, resume=tmp_path / "a.ckpt")
            assert other.given == given
