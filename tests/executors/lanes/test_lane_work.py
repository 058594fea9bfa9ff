# pyright: reportPrivateUsage=false
# The tests do the work of the threads, and look at the numbers that the two sides share.
"""What the thread that works on a lane does (rules 23 to 27). Tests work on the lane themselves, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, FitEnd, LearnerView, Phase, TrainingPhase, on
from flowtrain.callback.events import Event
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import LoggerBackend, Run, Value
from flowtrain.logging.records import log
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.threads import LaneThreads, Workable
from flowtrain_dask.lanes.transport import Abandoned, LaneContext, OnError, ThreadTransport
from flowtrain_dask.lanes.work import BatchResult, Entry, Job
from tests.support.lanes import Memory, job_of


class Together(Memory):
    """Notes how many records come together; `full` makes it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.together: list[int] = []
        self.full = False
        self.after: Callable[[], None] = lambda: None

    @property
    def numbers(self) -> list[int]:
        return [int(record.rpartition(" ")[2]) for record in self.records]

    def write(self, record: bytes) -> None:
        raise AssertionError("the records of a batch come together")

    def write_all(self, records: Sequence[bytes]) -> None:
        if self.full:
            raise OSError("no space left")
        self.records += [record.decode() for record in records]
        self.together.append(len(records))
        self.after()


class Logger(Callback):
    """Logs each number that it gets, `times` times; fails at those in `bad`."""

    def __init__(self, *backends: LoggerBackend, name: str = "Logger", bad: Sequence[int] = (), times: int = 1) -> None:
        self.backends = backends
        self.name = name
        self.bad = bad
        self.times = times
        self.seen: list[int | str] = []

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Take one number."""
        number: int = learner.batch.inputs
        if number in self.bad:
            raise ValueError(f"bad number {number}")
        self.seen.append(number)
        for _ in range(self.times):
            log(self.backends, Value(number), "Number", number, ("Step", "TrainingPhase"))

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Note the end."""
        self.seen.append("end")


class Ending(ThreadTransport):
    """Ends the lane when it is asked for the state, which comes after all else; `error` is what it raises then."""

    error: BaseException | None = None
    closed = 0
    asked = 0

    def __init__(self, job: Job, callbacks: Sequence[Callback], linger: float = 0.0) -> None:
        super().__init__(job, callbacks, linger)
        self.batches: list[int] = []

    def run_batch(self, entries: Sequence[Entry], context: LaneContext) -> BatchResult:
        self.batches.append(len(entries))
        return super().run_batch(entries, context)

    def bring_state_back(self, context: LaneContext) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        context.closed = True

    def close(self) -> None:
        self.closed += 1


class Repeating(Ending):
    """Hands back the records of all earlier events as well."""

    def __init__(self, job: Job, callbacks: Sequence[Callback]) -> None:
        super().__init__(job, callbacks)
        self.records: list[Any] = []

    def run_batch(self, entries: Sequence[Entry], context: LaneContext) -> BatchResult:
        result = super().run_batch(entries, context)
        self.records += result.records
        return BatchResult(list(self.records), result.done, result.failure)


NOTE, END = 0, 1
"""The first callback's handlers."""


class NoThreads(LaneThreads):
    """The tests work on the lane themselves."""

    def wake(self, lane: Workable) -> None: ...

    def relieve(self) -> None: ...


def make(
    *callbacks: Logger,
    kind: Callable[[Job, Sequence[Callback]], Ending] = Ending,
    leave: Callable[[Callable[[], None]], None] = lambda raise_it: raise_it(),
    on_error: OnError = "raise",
    linger_events: int = 1000,
) -> tuple[Lane, Ending]:
    job = job_of(*callbacks)
    assert [each.handler.attribute for each in job.handlers[:2]] == ["note", "end"]
    transport = kind(job, callbacks)
    lane = Lane(
        job, transport, Limits(), NoThreads(), raise_on_training_thread=leave, on_error=on_error,
        linger_events=linger_events,
    )  # fmt: skip
    return lane, transport


def put(lane: Lane, *numbers: int, handler: int = NOTE, event: Event | None = None) -> None:
    """Put events of 8 bytes."""
    for number in numbers:
        lane.put(handler, event or BatchEnd(), TrainingPhase(), {("batch", "inputs"): number}, 8)


def work(lane: Lane) -> bool:
    """Work on the lane once, as a thread of lanes does it, if it is due; return whether it was."""
    due = lane.due()
    if due is None or due > time.monotonic():
        return False
    assert lane.begin()
    assert not lane.begin(), "one thread at a time"
    lane.work()
    return True


def drive(lane: Lane) -> None:
    """Work on the lane until the transport has been asked for the state, which ends the lane."""
    lane.process_soon()
    while not lane._ended:
        assert work(lane)


def test_what_waits_is_processed_in_order_and_counted() -> None:
    sink = Together()
    callback = Logger(sink)
    lane, transport = make(callback)
    put(lane, *range(100))
    drive(lane)
    assert callback.seen == sink.numbers == list(range(100))
    report = lane.report()
    assert (report.events, report.done, report.bytes, report.counts.records) == (100, 100, 0, 100)
    assert (lane._brought_back, lane._flushing) == (100, False)
    assert (len(transport.batches), transport.asked, transport.closed) == (2, 1, 1), "64 events, then the others"


def test_records_are_written_together_but_not_too_many() -> None:
    sink = Together()
    lane, _ = make(Logger(sink, times=600))
    put(lane, 7)
    drive(lane)
    assert sink.together == [256, 256, 88]


def test_an_abandoned_lane_writes_no_more_than_it_has_begun() -> None:
    """By then the sinks are being closed."""
    sink = Together()
    lane, _ = make(Logger(sink, times=600))

    def abandon() -> None:
        lane._records.abandon()

    sink.after = abandon
    put(lane, 7)
    drive(lane)
    assert sink.together == [256]


def test_records_that_are_handed_back_again_are_written_once() -> None:
    """Rule 25: whatever was run again."""
    sink = Together()
    lane, transport = make(Logger(sink), kind=Repeating)
    put(lane, *range(100))
    drive(lane)
    assert len(transport.batches) > 1
    assert sink.numbers == list(range(100))


def test_events_gather_until_there_are_enough() -> None:
    """The linger is an hour, so nothing else can be why."""
    lane, transport = make(Logger(Together()), linger_events=5)
    transport.linger = 3600
    put(lane, *range(4))
    assert not work(lane)
    put(lane, 4)
    assert work(lane)
    assert transport.batches == [5]


def test_the_linger_begins_with_the_first_event_or_with_the_last_batch() -> None:
    lane, transport = make(Logger(Together()))
    transport.linger = 3600
    assert lane.due() is None
    begin = time.monotonic()
    put(lane, 0)
    first = lane.due()
    assert first is not None
    assert begin + 3600 <= first <= time.monotonic() + 3600
    put(lane, 1)
    assert lane.due() == first
    lane.process_soon()
    assert work(lane)
    lane._flushing, transport.linger = False, 3600
    put(lane, 2)
    second = lane.due()
    assert second is not None
    assert first < second


def test_a_lane_that_stands_still_is_not_due_and_another_event_sets_it_going() -> None:
    callback = Logger(Together())
    lane, _ = make(callback)
    put(lane, 0)
    assert lane.pause(0)
    lane._flushing = True
    assert not work(lane)
    assert lane.unprocessed()[0][0].sequence == 0
    put(lane, 1)
    assert work(lane)
    assert callback.seen == [0, 1]


def test_a_state_that_was_not_brought_back_because_of_a_pause_is_asked_for_again() -> None:
    """Rule 26: the callbacks would keep an older state."""
    lane, transport = make(Logger(Together()))
    put(lane, 0)
    assert lane.due() is not None
    lane.process_soon()
    assert work(lane)
    transport.error = Abandoned()
    assert work(lane)
    assert (lane._brought_back, lane._flushing, transport.asked) == (0, True, 1)
    transport.error = None
    assert work(lane)
    assert (lane._brought_back, transport.asked) == (1, 2)


def test_a_sink_that_fails_surfaces_and_the_next_event_is_written() -> None:
    sink = Together()
    sink.full = True
    raised: list[str] = []

    def leave(raise_it: Callable[[], None]) -> None:
        with pytest.raises(OSError, match="no space left") as caught:
            raise_it()
        raised.append(str(caught.value))
        sink.full = False
        put(lane, 2)

    lane, _ = make(Logger(sink), leave=leave)
    put(lane, 1)
    drive(lane)
    assert raised == ["no space left"]
    assert sink.numbers == [2]
    assert (lane.report().done, lane.failure) == (2, None)


def test_a_sink_that_fails_keeps_no_records_of_the_batch_from_another() -> None:
    """Whichever callback of the lane they are of, and however many; the one that failed gets nothing behind the gap."""
    failing, other = Together(), Together()
    failing.full = True

    def recover() -> None:
        failing.full = False  # too late: it has missed something

    other.after = recover
    failures: list[Callable[[], None]] = []
    lane, transport = make(Logger(failing, other, name="both"), Logger(other, name="one"), leave=failures.append)
    for number in range(0, 500, 2):
        put(lane, number)
        put(lane, number + 1, handler=2)  # the second callback's
    drive(lane)
    assert other.numbers == list(range(transport.batches[0]))
    assert len(other.records) == 64
    assert failing.records == []
    with pytest.raises(OSError, match="no space left"):
        failures[0]()


def test_of_several_sinks_that_fail_no_error_is_lost() -> None:
    first, second = Together(), Together()
    first.full = second.full = True
    failures: list[Callable[[], None]] = []
    lane, _ = make(Logger(first, second), leave=failures.append)
    put(lane, 0)
    drive(lane)
    with pytest.raises(OSError, match="no space left") as raised:
        failures[0]()
    assert [str(other) for other in vars(raised.value)["others"]] == ["no space left"]


def test_what_waits_behind_a_failure_is_skipped_but_for_the_end_of_the_fit() -> None:
    """Rules 17 and 27; what came before it is written first, and what is put after it was raised is processed."""
    sink = Together()
    callback = Logger(sink, bad=[2])
    written: list[list[int]] = []

    def leave(raise_it: Callable[[], None]) -> None:
        written.append(list(sink.numbers))
        put(lane, 4)
        with pytest.raises(ValueError, match="bad number 2"):
            raise_it()
        raise_it()  # raised once
        put(lane, 5)

    lane, _ = make(callback, leave=leave)
    put(lane, 0, 1, 2, 3)
    put(lane, 0, handler=END, event=FitEnd())
    drive(lane)
    assert written == [[0, 1]]
    assert callback.seen == [0, 1, "end", 5]
    report = lane.report()
    assert (report.counts.skipped, report.counts.last_error) == (2, "ValueError: bad number 2")
    assert (report.pending, report.bytes) == (0, 0)


def test_until_the_failure_is_raised_nothing_else_is_run() -> None:
    failures: list[Callable[[], None]] = []
    callback = Logger(Together(), bad=[0])
    lane, _ = make(callback, leave=failures.append)
    put(lane, 0, 1)
    put(lane, 0, handler=END, event=FitEnd())
    assert work(lane)
    assert len(failures) == 1
    assert not work(lane), "the end of the fit waits, and nobody looks again and again"
    put(lane, 2)
    assert work(lane)
    assert (callback.seen, lane.report().counts.skipped, lane.report().pending) == ([], 2, 1)
    with pytest.raises(ValueError, match="bad number 0"):
        lane.raise_failure()
    assert work(lane)
    assert callback.seen == ["end"]


def test_with_warn_it_retires(caplog: pytest.LogCaptureFixture) -> None:
    """Rule 27: nothing is raised, and nothing runs any more."""
    failures: list[Callable[[], None]] = []
    sink = Together()
    callback = Logger(sink, bad=[1])
    lane, _ = make(callback, leave=failures.append, on_error="warn")
    put(lane, 0, 1, 2)
    put(lane, 0, handler=END, event=FitEnd())
    drive(lane)
    assert (callback.seen, sink.numbers, failures) == ([0], [0], [])
    report = lane.report()
    assert (report.retired, lane.refuses, lane.failure) == (True, True, None)
    assert (report.done, report.counts.skipped) == (4, 2)
    assert report.counts.last_error == "ValueError: bad number 1"
    assert "retires lane Logger, its callbacks see no more events: ValueError: bad number 1 (raised in" in caplog.text


def test_a_state_that_cannot_be_brought_home_is_not_asked_for_again_and_again() -> None:
    """Whoever waits for it gets the failure."""
    failures: list[Callable[[], None]] = []

    def leave(raise_it: Callable[[], None]) -> None:
        failures.append(raise_it)
        lane._context.close()

    lane, transport = make(Logger(Together()), leave=leave)
    transport.error = ConnectionError("it is gone")
    put(lane, 0)
    drive(lane)
    assert (lane._brought_back, lane._flushing, transport.asked) == (1, False, 1)
    with pytest.raises(ConnectionError, match="it is gone"):
        failures[0]()


def test_it_ends_without_a_failure_when_the_transport_has_stopped_waiting() -> None:
    class Closed(Ending):
        def bring_state_back(self, context: LaneContext) -> None:
            super().bring_state_back(context)
            raise Abandoned

    failures: list[Callable[[], None]] = []
    lane, transport = make(Logger(Together()), kind=Closed, leave=failures.append)
    put(lane, 0)
    drive(lane)
    assert (failures, lane.failure, transport.closed) == ([], None, 1)
    lane.close()
    assert transport.closed == 1


def test_the_copy_in_a_forked_child_finds_no_lock_taken_and_nothing_to_do(tmp_path: Path) -> None:
    """Rule 30: whoever held its gate is not there."""
    backend = JsonlBackend(tmp_path / "log.jsonl")
    backend.open(Run("run"))
    lane, transport = make(Logger(backend))
    file = vars(backend)["_file"]
    try:
        put(lane, 0, 1)
        assert lane.gate.hold(0)
        lane.become_forked_copy()
        assert lane.gate.hold(0)
        assert (work(lane), lane.refuses, transport.closed) == (False, True, 1)
        report = lane.report()
        assert (report.events, report.done, report.bytes) == (2, 2, 0)
        assert vars(backend)["_file"] is None, "it never writes"
    finally:
        file.close()
