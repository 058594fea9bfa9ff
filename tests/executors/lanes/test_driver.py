"""What a lane's thread does (rules 23, 25, 27 and 30); most tests call it on their own thread, to the end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from flowtrain import BatchEnd, Callback, FitEnd, LearnerView, Phase, TrainingPhase, on
from flowtrain.callback.events import Event
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import LoggerBackend, Run, Value, log
from flowtrain_dask.lanes.driver import Batches, Driver, OnError
from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.transport import Abandoned, ThreadTransport
from flowtrain_dask.lanes.work import BatchResult, Entry, Job
from tests.support.lanes import Memory, job_of
from tests.support.waiting import wait_for


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

    end: Callable[[], None]
    error: BaseException | None = None
    closed = 0
    asked = 0

    def __init__(self, job: Job, callbacks: Sequence[Callback], linger: float = 0.0) -> None:
        super().__init__(job, callbacks, linger)
        self.batches: list[int] = []

    def process(
        self, entries: Sequence[Entry], gate: AbstractContextManager[Any], closing: Callable[[], bool], tally: Tally
    ) -> BatchResult:
        self.batches.append(len(entries))
        return super().process(entries, gate, closing, tally)

    def collect(self, closing: Callable[[], bool], tally: Tally) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        self.end()

    def close(self) -> None:
        self.closed += 1


class Repeating(Ending):
    """Hands back the records of all earlier events as well."""

    def __init__(self, job: Job, callbacks: Sequence[Callback]) -> None:
        super().__init__(job, callbacks)
        self.records: list[Any] = []

    def process(
        self, entries: Sequence[Entry], gate: AbstractContextManager[Any], closing: Callable[[], bool], tally: Tally
    ) -> BatchResult:
        result = super().process(entries, gate, closing, tally)
        self.records += result.records
        return BatchResult(list(self.records), result.done, result.failure)


NOTE, END = 0, 1
"""The first callback's handlers."""


def make(
    *callbacks: Logger,
    kind: Callable[[Job, Sequence[Callback]], Ending] = Ending,
    surface: Callable[[Callable[[], None]], None] = lambda raise_it: raise_it(),
    on_error: OnError = "raise",
    hurry: int = 1000,
) -> tuple[Driver, Ending]:
    job = job_of(*callbacks)
    assert [each.handler.attribute for each in job.handlers[:2]] == ["note", "end"]
    transport = kind(job, callbacks)
    driver = Driver(job, transport, 1 << 30, hurry, surface, on_error)
    transport.end = driver.end
    return driver, transport


def put(driver: Driver, *numbers: int, handler: int = NOTE, event: Event | None = None) -> None:
    """Put events of 8 bytes, as the training thread does it."""
    for number in numbers:
        payload = {("batch", "inputs"): number}
        number, total = driver.received
        driver.queue.append(Entry(number, handler, event or BatchEnd(), TrainingPhase(), payload, 8, None, total + 8))


def drive(driver: Driver) -> None:
    """Do what a lane's thread does, until the transport has been asked for the state."""
    driver.rush = True
    driver.drive()


def test_what_waits_is_processed_in_order_and_counted() -> None:
    sink = Together()
    callback = Logger(sink)
    driver, transport = make(callback)
    put(driver, *range(100))
    drive(driver)
    assert callback.seen == sink.numbers == list(range(100))
    assert (driver.received, driver.done, driver.collected, driver.tally.records) == ((100, 800), 100, 100, 100)
    assert driver.done_bytes == 800
    assert not driver.rush, "it is at home"
    assert (len(transport.batches), transport.asked, transport.closed) == (2, 1, 1), "64 events, then the others"


def test_records_are_written_together_but_not_too_many() -> None:
    sink = Together()
    driver, _ = make(Logger(sink, times=600))
    put(driver, 7)
    drive(driver)
    assert sink.together == [256, 256, 88]


def test_an_abandoned_lane_writes_no_more_than_it_has_begun() -> None:
    """By then the sinks are being closed."""
    sink = Together()
    driver, _ = make(Logger(sink, times=600))

    def abandon() -> None:
        driver.abandoned = True

    sink.after = abandon
    put(driver, 7)
    drive(driver)
    assert sink.together == [256]


def test_records_that_are_handed_back_again_are_written_once() -> None:
    """Rule 25: whatever was run again."""
    sink = Together()
    driver, transport = make(Logger(sink), kind=Repeating)
    put(driver, *range(100))
    drive(driver)
    assert len(transport.batches) > 1
    assert sink.numbers == list(range(100))


def test_events_gather_until_there_are_enough() -> None:
    """The linger is an hour, so nothing else can be why."""
    callback = Logger(Together())
    driver, transport = make(callback, hurry=5)
    transport.linger = 3600
    driver.taken_at = time.monotonic()
    put(driver, *range(4))
    thread = threading.Thread(target=driver.drive)
    thread.start()
    try:
        time.sleep(0.05)
        assert transport.batches == []
        put(driver, 4)
        driver.wake.set()
        wait_for(lambda: driver.done == 5)
        assert transport.batches == [5]
    finally:
        driver.end()
        thread.join(20)
    assert (thread.is_alive(), transport.closed) == (False, 1)


def test_a_sink_that_fails_surfaces_and_the_next_event_is_written() -> None:
    sink = Together()
    sink.full = True
    raised: list[str] = []

    def surface(raise_it: Callable[[], None]) -> None:
        with pytest.raises(OSError, match="no space left") as caught:
            raise_it()
        raised.append(str(caught.value))
        sink.full = False
        put(driver, 2)

    driver, _ = make(Logger(sink), surface=surface)
    put(driver, 1)
    drive(driver)
    assert raised == ["no space left"]
    assert sink.numbers == [2]
    assert (driver.done, driver.failure) == (2, None)


def test_a_sink_that_fails_keeps_no_records_of_the_batch_from_another() -> None:
    """Whichever callback of the lane they are of, and however many; the one that failed gets nothing behind the gap."""
    failing, other = Together(), Together()
    failing.full = True

    def recover() -> None:
        failing.full = False  # too late: it has missed something

    other.after = recover
    failures: list[Callable[[], None]] = []
    driver, transport = make(Logger(failing, other, name="both"), Logger(other, name="one"), surface=failures.append)
    for number in range(0, 500, 2):
        put(driver, number)
        put(driver, number + 1, handler=2)  # the second callback's
    drive(driver)
    assert other.numbers == list(range(transport.batches[0]))
    assert len(other.records) == 64
    assert failing.records == []
    with pytest.raises(OSError, match="no space left"):
        failures[0]()


def test_what_waits_behind_a_failure_is_skipped_but_for_the_end_of_the_fit() -> None:
    """Rules 17 and 27; what came before it is written first, and what is put after it was raised is processed."""
    sink = Together()
    callback = Logger(sink, bad=[2])
    written: list[list[int]] = []

    def surface(raise_it: Callable[[], None]) -> None:
        written.append(list(sink.numbers))
        put(driver, 4)
        with pytest.raises(ValueError, match="bad number 2"):
            raise_it()
        raise_it()  # raised once
        put(driver, 5)

    driver, _ = make(callback, surface=surface)
    put(driver, 0, 1, 2, 3)
    put(driver, 0, handler=END, event=FitEnd())
    drive(driver)
    assert written == [[0, 1]]
    assert callback.seen == [0, 1, "end", 5]
    assert driver.tally.skipped == 2
    assert driver.tally.last_error == "ValueError: bad number 2"
    assert (driver.done, driver.done_bytes) == driver.received


def test_until_the_failure_is_raised_nothing_else_is_run() -> None:
    failures: list[Callable[[], None]] = []
    callback = Logger(Together(), bad=[0])
    driver, _ = make(callback, surface=failures.append)
    put(driver, 0, 1)
    put(driver, 0, handler=END, event=FitEnd())
    thread = threading.Thread(target=driver.drive)
    thread.start()
    try:
        wait_for(lambda: failures)
        put(driver, 2)
        driver.wake.set()
        wait_for(lambda: driver.tally.skipped == 2)
        assert callback.seen == []
        assert driver.received[0] - driver.done == 1, "the end of the fit waits"
        with pytest.raises(ValueError, match="bad number 0"):
            driver.raise_failure()
        wait_for(lambda: callback.seen == ["end"])
    finally:
        driver.end()
        thread.join(20)


def test_with_warn_it_retires(caplog: pytest.LogCaptureFixture) -> None:
    """Rule 27: nothing is raised, and nothing runs any more."""
    failures: list[Callable[[], None]] = []
    sink = Together()
    callback = Logger(sink, bad=[1])
    driver, _ = make(callback, surface=failures.append, on_error="warn")
    put(driver, 0, 1, 2)
    put(driver, 0, handler=END, event=FitEnd())
    drive(driver)
    assert (callback.seen, sink.numbers, failures) == ([0], [0], [])
    assert (driver.retired, driver.refuses, driver.failure) == (True, True, None)
    assert (driver.done, driver.tally.skipped) == (4, 2)
    assert driver.tally.last_error == "ValueError: bad number 1"
    assert "retires lane Logger, its callbacks see no more events: ValueError: bad number 1 (raised in" in caplog.text


def test_a_state_that_cannot_be_brought_home_is_not_asked_for_again_and_again() -> None:
    """Whoever waits for it gets the failure."""
    failures: list[Callable[[], None]] = []

    def surface(raise_it: Callable[[], None]) -> None:
        failures.append(raise_it)
        driver.end()

    driver, transport = make(Logger(Together()), surface=surface)
    transport.error = ConnectionError("it is gone")
    put(driver, 0)
    drive(driver)
    assert (driver.collected, driver.rush, transport.asked) == (1, False, 1)
    with pytest.raises(ConnectionError, match="it is gone"):
        failures[0]()


def test_it_ends_without_a_failure_when_the_transport_has_stopped_waiting() -> None:
    failures: list[Callable[[], None]] = []
    driver, transport = make(Logger(Together()), surface=failures.append)
    transport.error = Abandoned()
    put(driver, 0)
    drive(driver)
    assert (failures, driver.failure, transport.closed) == ([], None, 1)


def test_the_copy_in_a_forked_child_finds_no_lock_taken_and_nothing_to_do(tmp_path: Path) -> None:
    """Rule 30: whoever held its gate is not there."""
    backend = JsonlBackend(tmp_path / "log.jsonl")
    backend.open(Run("run"))
    driver, transport = make(Logger(backend))
    file = vars(backend)["_file"]
    try:
        put(driver, 0, 1)
        assert driver.gate.hold(0)
        driver.orphan()
        assert driver.gate.hold(0)
        assert (driver.closed, driver.refuses, transport.closed) == (True, True, 1)
        assert (list(driver.queue), driver.done, driver.done_bytes) == ([], 2, 16)
        assert vars(backend)["_file"] is None, "it never writes"
    finally:
        file.close()


# --- how many entries make a batch (rules 23 and 24)


def entries(count: int, nbytes: int = 8) -> deque[Entry]:
    return deque(Entry(number, 0, BatchEnd(), TrainingPhase(), None, nbytes) for number in range(count))


@pytest.mark.parametrize(
    ("seconds", "events", "taken"),
    [(0.0, 0, 64), (2.0, 1, 1), (1.0, 100, 100), (1e-6, 1, 4096)],
    ids=["not known yet", "slower than a second", "a second's worth", "never more"],
)
def test_a_batch_takes_about_a_second(seconds: float, events: int, taken: int) -> None:
    batches = Batches(entries(5000), 1 << 30)
    if events:
        batches.took(seconds, events)
    assert len(batches.take()) == taken


def test_a_batch_is_a_small_part_of_the_limit_and_one_entry_at_least() -> None:
    batches = Batches(entries(10, nbytes=50), 1000)
    assert [one.sequence for one in batches.take()] == [0, 1]
    assert [one.sequence for one in Batches(entries(3, nbytes=5000), 1000).take()] == [0]


def test_what_is_put_back_comes_next_in_its_order() -> None:
    queue = entries(4)
    batches = Batches(queue, 1 << 30)
    batch = batches.take()
    queue.append(Entry(4, 0, BatchEnd(), TrainingPhase(), None, 8))
    batches.put_back(batch[1:])
    assert [one.sequence for one in batches.take()] == [1, 2, 3, 4]


def test_all_is_drained() -> None:
    batches = Batches(entries(100), 1 << 30)
    assert len(batches.drain()) == 100
    assert batches.take() == []


def test_how_large_a_batch_is_may_change_within_what_the_limit_allows() -> None:
    batches = Batches(entries(100, nbytes=10), 1000, largest=50)
    assert (batches.largest, len(batches.take())) == (50, 5)
    batches.fill(100)
    assert (batches.largest, len(batches.take())) == (100, 10)
    batches.fill(1 << 30)
    assert (batches.largest, len(batches.take())) == (125, 12)
