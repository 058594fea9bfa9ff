"""Lanes in this process: order, bounds, stalls, drops, failures (rules 23, 24, 25 and 27)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, CancelFittingException, FitEnd, LearnerView, Phase, TrainingPhase, on
from flowtrain.errors import DeferredCancelError, UsageError
from flowtrain.logging.backend import LoggerBackend, Value
from flowtrain.logging.records import Identity, identity, log
from flowtrain_dask.lanes import transport as transport_module
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.threads import LaneThreads
from flowtrain_dask.lanes.transport import OnError, ThreadTransport
from tests.support.interrupts import interrupted
from tests.support.lanes import MakeWorkable, Memory, WorkableContract, job_of
from tests.support.waiting import wait_for


class Logger(Callback):
    """Logs each number that it gets; stops at those in `bad`; waits while `blocked` is set."""

    def __init__(self, backend: LoggerBackend, name: str = "Logger") -> None:
        self.backends = (backend,)
        self.name = name
        self.seen: list[int] = []
        self.bad: dict[int, BaseException] = {}
        self.blocked = threading.Event()
        self.identities: list[Identity | None] = []

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Take one number."""
        number: int = learner.batch.inputs
        while self.blocked.is_set():
            time.sleep(0.001)
        if number in self.bad:
            raise self.bad[number]
        self.seen.append(number)
        self.identities.append(identity())
        log(self.backends, Value(number), "Number", number, ("Step", "TrainingPhase"))


MakeLane = Callable[..., Lane]


@pytest.fixture
def make_lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLane]:
    monkeypatch.setattr(transport_module, "SLOW", 60.0)  # on a slow machine too, events gather
    made: list[Lane] = []
    threads = LaneThreads()

    def make(
        *callbacks: Callback,
        limits: Limits | None = None,
        on_error: OnError = "raise",
        linger: float = 0.01,
        **kwargs: Any,
    ) -> Lane:
        job = job_of(*callbacks)
        urgent: list[Callable[[], None]] = []
        kwargs.setdefault("raise_on_training_thread", urgent.append)
        transport = ThreadTransport(job, callbacks, linger)
        lane = Lane(job, transport, limits or Limits(), threads, on_error=on_error, **kwargs)
        lane.urgent = urgent  # type: ignore[attr-defined]  # for the test
        made.append(lane)
        return lane

    yield make
    for lane in made:
        lane.close()
    threads.close()


def put(lane: Lane, number: int, handler: int = 0, nbytes: int = 8) -> bool:
    return lane.put(handler, BatchEnd(), TrainingPhase(), {("batch", "inputs"): number}, nbytes)


def urgent(lane: Lane) -> list[Callable[[], None]]:
    return lane.urgent  # type: ignore[attr-defined,no-any-return]  # see `make_lane`


def test_events_are_processed_one_at_a_time_in_order(make_lane: MakeLane) -> None:
    """Rule 23: two callbacks in one lane take turns as the events came; rule 25: each event has its identity."""
    backend = Memory()
    one, two = Logger(backend, "one"), Logger(backend, "two")
    lane = make_lane(one, two)
    for number in range(500):
        assert put(lane, number, handler=number % 2)
    assert lane.flush(20)
    assert one.seen == list(range(0, 500, 2))
    assert two.seen == list(range(1, 500, 2))
    assert backend.records == [f"Number {number} {number}" for number in range(500)]
    assert two.identities[:2] == [Identity("run", "one+two", 1), Identity("run", "one+two", 3)]
    report = lane.report()
    assert (report.events, report.done, report.pending, report.bytes) == (500, 500, 0, 0)
    assert (report.counts.records, report.where, report.callbacks) == (500, "thread", ("one", "two"))


@pytest.mark.parametrize(("nbytes", "limits", "count"), [(100, Limits(bytes=8000), 10), (0, Limits(pending=20), 10)])
def test_events_gather_until_there_are_enough_for_a_batch(
    make_lane: MakeLane, nbytes: int, limits: Limits, count: int
) -> None:
    """In bytes or in number; the linger is an hour, so nothing else can be why."""
    logger = Logger(Memory())
    lane = make_lane(logger, limits=limits, linger=3600)
    put(lane, 0, nbytes=nbytes)
    assert lane.flush(20), "the first event does not gather"
    for number in range(1, count):
        put(lane, number, nbytes=nbytes)
    time.sleep(0.05)
    assert logger.seen == [0]
    put(lane, count, nbytes=nbytes)
    wait_for(lambda: logger.seen == list(range(count + 1)))


def test_how_much_is_a_full_batch_is_up_to_the_transport_and_may_change(make_lane: MakeLane) -> None:
    logger = Logger(Memory())
    lane = make_lane(logger, linger=3600)
    transport: Any = lane._transport  # pyright: ignore[reportPrivateUsage]  # what it was made with
    transport.largest = 500
    put(lane, 0, nbytes=100)
    assert lane.flush(60)
    for number in range(1, 5):
        put(lane, number, nbytes=100)
    time.sleep(0.05)
    assert logger.seen == [0]
    put(lane, 5, nbytes=100)
    wait_for(lambda: logger.seen == list(range(6)))


def test_a_full_lane_makes_training_wait_and_says_who(make_lane: MakeLane) -> None:
    """Rule 24: bounded by count; the stall is in the report."""
    callback = Logger(Memory())
    callback.blocked.set()
    lane = make_lane(callback, limits=Limits(pending=10))
    for number in range(10):
        put(lane, number)
    threading.Timer(0.2, callback.blocked.clear).start()
    most = 0
    for number in range(10, 50):
        put(lane, number)
        most = max(most, lane.report().pending)
    assert most <= 10
    assert lane.flush(20)
    assert callback.seen == list(range(50))
    stall = lane.report().counts.stalls["Logger"]
    assert stall.count >= 1
    assert stall.seconds >= 0.1
    assert any(line.startswith("Logger made training wait") for line in lane.report().troubles())


def test_an_empty_lane_takes_an_event_of_any_size(make_lane: MakeLane) -> None:
    """Rule 24: bounded by bytes, but an event larger than the bound is processed alone."""
    callback = Logger(Memory())
    lane = make_lane(callback, limits=Limits(bytes=100))
    held = []
    for number in range(5):
        put(lane, number, nbytes=1000)
        held.append(lane.report().bytes)
    assert lane.flush(20)
    assert max(held) == 1000
    assert callback.seen == list(range(5))


def test_waiting_ends_when_training_is_to_stop(make_lane: MakeLane) -> None:
    """Rule 29: the flag is seen while training waits for room, and the event is not lost."""
    callback = Logger(Memory())
    callback.blocked.set()
    stop = threading.Event()
    lane = make_lane(callback, limits=Limits(pending=1), stopping=stop.is_set)
    put(lane, 0)
    threading.Timer(0.05, stop.set).start()
    assert put(lane, 1)  # returns although nothing has become free
    assert lane.report().pending == 2
    callback.blocked.clear()
    assert lane.flush(20)
    assert callback.seen == [0, 1]


def test_dropping_is_counted_by_callback(make_lane: MakeLane) -> None:
    backend = Memory()
    one, two = Logger(backend, "one"), Logger(backend, "two")
    one.blocked.set()
    lane = make_lane(one, two, limits=Limits(pending=2, when_full="drop"))
    assert [put(lane, number, handler=number % 2) for number in range(5)] == [True, True, False, False, False]
    one.blocked.clear()
    assert lane.flush(20)
    assert lane.report().counts.dropped == {"one": 2, "two": 1}
    assert put(lane, 5)
    assert lane.flush(20)
    assert (one.seen, two.seen) == ([0, 5], [1])


def test_a_failure_surfaces_with_its_event_after_the_records_before_it(make_lane: MakeLane) -> None:
    """Rule 27; and what follows the failure is processed again once it has been raised."""
    backend = Memory()
    callback = Logger(backend)
    callback.bad[3] = ValueError("bad number")
    lane = make_lane(callback)
    for number in range(10):
        put(lane, number)
    wait_for(lambda: urgent(lane))
    assert backend.records == ["Number 0 0", "Number 1 1", "Number 2 2"]
    put(lane, 10)
    [surfaced] = urgent(lane)
    with pytest.raises(ValueError, match="bad number") as caught:
        surfaced()
    assert caught.value.__notes__ == [
        "raised in Logger.note at (BatchEnd, TrainingPhase), deferred as event 3 of lane Logger"
    ]
    surfaced()  # raised once
    put(lane, 11)
    assert lane.flush(20)
    assert callback.seen == [0, 1, 2, 11]
    assert lane.report().counts.skipped == 7
    assert lane.report().pending == 0


def test_flush_returns_when_the_lane_has_failed(make_lane: MakeLane) -> None:
    callback = Logger(Memory())
    callback.bad[0] = ValueError("bad")
    lane = make_lane(callback)
    put(lane, 0)
    put(lane, 1)
    assert lane.flush(20)
    with pytest.raises(ValueError, match="bad"):
        lane.raise_failure()


def test_a_cancel_is_an_error(make_lane: MakeLane) -> None:
    """Rule 27: what it wanted to end has gone on."""
    callback = Logger(Memory())
    callback.bad[0] = CancelFittingException("flat")
    lane = make_lane(callback)
    put(lane, 0)
    lane.flush(20)
    with pytest.raises(DeferredCancelError) as caught:
        lane.raise_failure()
    assert str(caught.value) == (
        "Logger.note raised CancelFittingException('flat') at (BatchEnd, TrainingPhase), but it is deferrable: "
        "in its lane it runs when training has gone on, and there is no fit left to end. Set deferrable = False in "
        "Logger."
    )


def test_with_warn_a_failing_lane_is_retired(make_lane: MakeLane, caplog: pytest.LogCaptureFixture) -> None:
    """Rule 27: on_error="warn" logs it, and training goes on without the lane."""
    callback = Logger(Memory())
    callback.bad[1] = ValueError("bad number")
    lane = make_lane(callback, on_error="warn")
    for number in range(3):
        put(lane, number)
    wait_for(lambda: lane.report().retired)
    assert not put(lane, 3)
    assert lane.flush(1) is not None
    assert urgent(lane) == []
    assert callback.seen == [0]
    wait_for(lambda: "retires lane Logger" in caplog.text)  # the lane retires after it has noted the failure
    assert "ValueError: bad number (raised in Logger.note" in caplog.text
    assert lane.report().counts.dropped == {"Logger": 1}


def test_a_lane_can_be_held_between_two_events(make_lane: MakeLane) -> None:
    """Rule 30: while it is held nothing runs and nothing is written."""
    callback = Logger(Memory())
    lane = make_lane(callback)
    for number in range(100_000):
        put(lane, number, nbytes=0) if number < 5_000 else None
    assert lane.gate.hold(5)
    before = len(callback.seen)
    time.sleep(0.05)
    assert len(callback.seen) == before
    lane.gate.release()
    assert lane.flush(20)
    assert len(callback.seen) == 5_000


def test_a_closed_lane_takes_no_event(make_lane: MakeLane) -> None:
    lane = make_lane(Logger(Memory()))
    put(lane, 0)
    lane.flush(20)
    lane.close()
    assert not put(lane, 1)
    assert lane.report().counts.dropped == {"Logger": 1}


def test_the_phase_reaches_the_handler(make_lane: MakeLane) -> None:
    """Handlers are called as in place, with the event itself and the phase itself."""

    class Watcher(Callback):
        name = "Watcher"

        def __init__(self) -> None:
            self.calls: list[tuple[object, Phase]] = []

        @on(BatchEnd)
        def watch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.calls.append((event, phase))

    watcher = Watcher()
    lane = make_lane(watcher)
    event, phase = BatchEnd(), TrainingPhase()
    lane.put(0, event, phase, {}, 0)
    assert lane.flush(20)
    assert watcher.calls == [(event, phase)]


def test_an_event_put_after_the_failure_was_raised_is_processed(make_lane: MakeLane) -> None:
    """Rule 27: `FitEnd` has its turn, also when the failure is raised before the lane's thread has handed it over."""
    callback = Logger(Memory())
    callback.bad[0] = ValueError("bad")
    surfaced, go_on = threading.Event(), threading.Event()

    def leave(raise_it: Callable[[], None]) -> None:
        surfaced.set()
        assert go_on.wait(20)

    lane = make_lane(callback, raise_on_training_thread=leave)
    put(lane, 0)
    assert surfaced.wait(20)
    with pytest.raises(ValueError, match="bad"):
        lane.raise_failure()
    put(lane, 1)
    go_on.set()
    assert lane.flush(20)
    assert callback.seen == [1]
    assert lane.report().counts.skipped == 0


def test_what_is_not_done_when_the_lane_is_closed_is_dropped_and_counted(make_lane: MakeLane) -> None:
    """The event at work ends, its records are written; those behind it, of the same batch, are not begun."""
    backend = Memory()
    callback = Logger(backend)
    callback.blocked.set()
    lane = make_lane(callback)
    for number in range(10):
        put(lane, number)
    wait_for(lambda: lane.gate._inside)  # pyright: ignore[reportPrivateUsage]  # a handler is at work
    closing = threading.Thread(target=lane.close)
    closing.start()
    wait_for(lambda: lane.over)
    callback.blocked.clear()
    closing.join(20)
    assert backend.records == ["Number 0 0"]
    assert lane.report().counts.dropped == {"Logger": 9}


def test_a_handler_that_outlives_its_lane_writes_nothing(make_lane: MakeLane) -> None:
    """By then the sinks are closed."""
    backend = Memory()
    callback = Logger(backend)
    callback.blocked.set()
    lane = make_lane(callback)
    put(lane, 0)
    wait_for(lambda: lane.gate._inside)  # pyright: ignore[reportPrivateUsage]  # a handler is at work
    lane.close(0.01)
    callback.blocked.clear()
    wait_for(lambda: lane._ended)  # pyright: ignore[reportPrivateUsage]  # by the thread that worked on it
    assert callback.seen == [0]
    assert backend.records == []


def test_records_of_slow_handlers_do_not_wait_for_those_behind_them(make_lane: MakeLane) -> None:
    """Rule 25: who is killed loses what is at work, not a minute of records; a batch that takes long is cut."""
    backend = Memory()

    class Slow(Logger):
        @on(BatchEnd, TrainingPhase)
        def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            time.sleep(0.6)
            if len(self.seen) >= 2:
                assert backend.records
            super().note(event, phase, learner)

    lane = make_lane(Slow(backend))
    for number in range(4):
        put(lane, number)
    assert lane.flush(20)
    lane.raise_failure()
    assert backend.records == [f"Number {number} {number}" for number in range(4)]


def test_a_handler_that_flushes_is_refused(make_lane: MakeLane) -> None:
    """It would wait for itself for ever."""
    lanes: list[Lane] = []

    class Flushing(Logger):
        @on(BatchEnd, TrainingPhase)
        def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            lanes[0].flush()

    lanes.append(make_lane(Flushing(Memory())))
    put(lanes[0], 0)
    assert lanes[0].flush(20)
    with pytest.raises(UsageError, match=r"flush\(\) in a deferred handler of lane Logger would wait"):
        lanes[0].raise_failure()


def test_fit_end_runs_after_a_failure_whenever_it_was_put(make_lane: MakeLane) -> None:
    """Rules 17 and 27: training may be over before the failure comes. What is put between the two does not run."""

    class Ending(Logger):
        ended = 0

        @on(FitEnd)
        def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            self.ended += 1
            log(self.backends, Value(0), "End", 0, ("Fit",))

    backend = Memory()
    callback = Ending(backend)
    callback.bad[1] = ValueError("bad")
    callback.blocked.set()
    lane = make_lane(callback)
    labels = [each.label for each in lane.job.handlers]
    note, end = labels.index("Logger.note"), labels.index("Logger.end")
    for number in range(4):
        put(lane, number, note)
    lane.put(end, FitEnd(), Phase(), {}, 0)
    put(lane, 4, note)
    callback.blocked.clear()
    wait_for(lambda: urgent(lane))
    time.sleep(0.05)
    assert callback.ended == 0  # first the failure is raised
    with pytest.raises(ValueError, match="bad"):
        lane.raise_failure()
    assert lane.flush(20)
    assert (callback.seen, callback.ended) == ([0], 1)
    assert backend.records == ["Number 0 0", "End 0 0"]
    assert (lane.report().counts.skipped, lane.report().pending) == (3, 0)
    put(lane, 5, note)
    assert lane.flush(20)
    assert backend.records == ["Number 0 0", "End 0 0", "Number 5 5"]


def test_no_interrupt_of_put_loses_or_doubles_an_event(make_lane: MakeLane) -> None:
    """Python raises Ctrl-C after any call: an event is then in the lane, counted and processed, or it is not there."""
    callback = Logger(Memory())
    lane = make_lane(callback)
    number = 0

    def act() -> None:
        put(lane, number)
        if number % 2:
            lane.flush(20)

    files = ("lanes/lane.py", "lanes/event_queue.py", "lanes/threads.py", "parallel/threads.py", "contextlib.py")
    for raised in interrupted(act, *files):
        assert raised
        assert lane.flush(20)
        report = lane.report()
        assert (len(callback.seen), report.done, report.pending, report.bytes) == (report.events, report.events, 0, 0)
        number += 1
    assert number > 100
    assert callback.seen == sorted(set(callback.seen))


def test_no_interrupt_of_raising_a_failure_leaves_the_lane_hanging(make_lane: MakeLane) -> None:
    callback = Logger(Memory())
    lane = make_lane(callback)

    def fail() -> None:
        put(lane, 0)
        put(lane, 1)
        lane.flush(20)
        with contextlib.suppress(ValueError):
            lane.raise_failure()

    callback.bad[0] = ValueError("bad")
    for raised in interrupted(fail, "lanes/lane.py", "lanes/event_queue.py", "lanes/threads.py"):
        assert raised
        assert lane.flush(20) or lane.over
        with contextlib.suppress(ValueError):
            lane.raise_failure()
        put(lane, 2)
        assert lane.flush(20)
        assert callback.seen[-1] == 2
        assert lane.report().pending == 0


class Acts(Callback):
    """Calls a function at each event."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.name = act, "Acts"

    @on(BatchEnd, TrainingPhase)
    def call(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.act()


class TestLane(WorkableContract):
    """A lane keeps what the threads of lanes rely on."""

    @pytest.fixture
    def make(self) -> Iterator[MakeWorkable]:
        made: list[Lane] = []
        threads = LaneThreads(0)  # none of them starts

        def make(act: Callable[[], object]) -> tuple[Lane, Callable[[], None]]:
            callback = Acts(act)
            job = job_of(callback)
            raised: list[Callable[[], None]] = []
            transport = ThreadTransport(job, [callback], 0.01)
            lane = Lane(job, transport, Limits(), threads, raise_on_training_thread=raised.append)
            made.append(lane)

            def give() -> None:
                lane.put(0, BatchEnd(), TrainingPhase(), {("batch", "inputs"): 1}, 8)

            return lane, give

        yield make
        for lane in made:
            lane.close(0.0)
        threads.close()
