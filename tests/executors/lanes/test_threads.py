# pyright: reportPrivateUsage=false
# The tests count the threads, and look at which lanes are taken for waiting ones.
"""The threads of lanes: few of them for many lanes, one at a time for each, and enough for those that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from flowtrain_dask.lanes import threads as module
from flowtrain_dask.lanes.threads import MOST_THREADS, LaneThreads
from tests.support.interrupts import interrupted
from tests.support.lanes import MakeWorkable, WorkableContract
from tests.support.waiting import wait_for


class Works:
    """A lane that is due as often as it was woken, and notes which threads work on it."""

    name = "lane"

    def __init__(self, act: Callable[[], object] = lambda: None, *, is_remote: bool = False) -> None:
        self.is_remote = is_remote
        self.act = act
        self.wanted = 0
        self.done = 0
        self.after = 0.0  # when it is due
        self.seen: set[int] = set()
        self.turn = threading.Lock()
        self.failure: Exception | None = None

    def wake(self, threads: LaneThreads) -> None:
        self.wanted += 1
        threads.wake(self)

    def due(self) -> float | None:
        return self.after if self.done < self.wanted else None

    def begin(self) -> bool:
        return self.turn.acquire(blocking=False)

    def work(self) -> None:
        self.seen.add(threading.get_ident())
        try:
            self.act()
        except Exception as failure:  # a lane leaves it for the training thread; `idle` raises it here
            self.failure = failure
        self.done += 1
        self.turn.release()

    @property
    def idle(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.done == self.wanted


Make = Callable[[int], LaneThreads]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[LaneThreads] = []

    def threads(computing: int) -> LaneThreads:
        made.append(LaneThreads(computing))
        return made[-1]

    yield threads
    for each in made:
        each.close()


def test_many_lanes_share_few_threads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST", 60.0)  # on a slow machine too, no lane is taken for one that waits
    threads = make(3)
    lanes = [Works() for _ in range(256)]
    for _ in range(20):
        for lane in lanes:
            lane.wake(threads)
    wait_for(lambda: all(lane.idle for lane in lanes))
    assert len(set[int]().union(*(lane.seen for lane in lanes))) <= 3
    assert len(threads) <= 3


def test_one_lane_has_one_thread(make: Make) -> None:
    threads = make(3)
    lane = Works()
    for _ in range(100):
        lane.wake(threads)
    wait_for(lambda: lane.idle)
    assert (len(threads), len(lane.seen)) == (1, 1)


def test_lanes_that_wait_for_another_process_have_threads_beside_those_that_compute(make: Make) -> None:
    """Four of them meet: each waits until all are at work."""
    threads, meeting = make(1), threading.Barrier(4)
    lanes = [Works(lambda: meeting.wait(20), is_remote=True) for _ in range(4)]
    for lane in lanes:
        lane.wake(threads)
    wait_for(lambda: all(lane.idle for lane in lanes))
    assert len(threads) <= 5


def test_lanes_that_were_seen_to_wait_have_threads_of_their_own(make: Make) -> None:
    """They sleep once, one after the other, and then meet."""
    threads, meeting = make(1), threading.Barrier(3)
    lanes = [Works(lambda: time.sleep(0.02)) for _ in range(3)]
    for lane in lanes:
        lane.wake(threads)
    wait_for(lambda: all(lane.idle for lane in lanes))
    assert threads._waiting == set(lanes)
    for lane in lanes:
        lane.act = lambda: meeting.wait(20)
        lane.wake(threads)
    wait_for(lambda: all(lane.idle for lane in lanes))


def test_lanes_that_wait_for_each_other_do_not_for_ever(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of them yet: whoever waits for them sees that one event takes long."""
    monkeypatch.setattr(module, "_STUCK", 0.01)
    threads, meeting = make(1), threading.Barrier(3)
    lanes = [Works(lambda: meeting.wait(20)) for _ in range(3)]
    for lane in lanes:
        lane.wake(threads)

    def idle() -> bool:
        threads.relieve()
        return all(lane.idle for lane in lanes)

    wait_for(idle)


def test_there_are_never_more_threads_than_the_limit(make: Make) -> None:
    threads, end = make(1), threading.Event()
    lanes = [Works(lambda: end.wait(20), is_remote=True) for _ in range(100)]
    for lane in lanes:
        lane.wake(threads)
    wait_for(lambda: len(threads._at_work) == MOST_THREADS)
    for lane in lanes:
        lane.wake(threads)
    assert len(threads) == MOST_THREADS
    end.set()
    wait_for(lambda: all(lane.idle for lane in lanes))


def test_a_lane_is_worked_on_when_its_time_has_come_or_when_it_is_woken(make: Make) -> None:
    threads = make(1)
    later, soon, never = Works(), Works(), Works()
    later.after, soon.after, never.after = time.monotonic() + 0.05, time.monotonic() + 0.02, time.monotonic() + 3600
    order: list[str] = []
    for name, lane in (("later", later), ("soon", soon), ("never", never)):
        lane.act = lambda name=name: order.append(name)  # type: ignore[misc]  # a default that binds the name
        lane.wake(threads)
    wait_for(lambda: later.idle and soon.idle)
    assert order == ["soon", "later"]
    never.after = 0.0
    threads.wake(never)
    wait_for(lambda: never.idle)


def test_a_handler_knows_its_lane_and_the_training_thread_has_none(make: Make) -> None:
    threads = make(1)
    found: list[object] = []
    lane = Works(lambda: found.append(threads.lane_here()))
    lane.wake(threads)
    wait_for(lambda: lane.idle)
    assert (found, threads.lane_here()) == ([lane], None)


def test_threads_end_and_one_that_is_at_work_is_not_waited_for() -> None:
    threads, end = LaneThreads(1), threading.Event()
    stuck, other = Works(lambda: end.wait(20), is_remote=True), Works()
    other.wake(threads)
    wait_for(lambda: other.idle)
    stuck.wake(threads)
    wait_for(lambda: threads._at_work)
    threads.close()
    alive = [thread for thread in threads._threads if thread.is_alive()]
    assert len(alive) == 1
    end.set()
    wait_for(lambda: not any(thread.is_alive() for thread in threads._threads))


def test_no_interrupt_of_waking_leaves_a_lane_asleep(make: Make) -> None:
    threads = make(2)
    lane = Works()
    for raised in interrupted(lambda: lane.wake(threads), "lanes/threads.py", "parallel/threads.py", "contextlib.py"):
        assert raised
        threads.wake(lane)
        wait_for(lambda: lane.idle)


class TestWorks(WorkableContract):
    """The lane of these tests is like a lane in all that the threads see."""

    @pytest.fixture
    def make(self) -> MakeWorkable:
        def make(act: Callable[[], object]) -> tuple[Works, Callable[[], None]]:
            lane = Works(act)

            def give() -> None:
                lane.wanted += 1

            return lane, give

        return make
