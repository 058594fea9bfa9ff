"""The events that wait in a lane: how many make a batch, and which are done (rules 23 and 24)."""

from __future__ import annotations

import pytest

from flowtrain import BatchEnd, FitEnd, TrainingPhase
from flowtrain_dask.lanes.event_queue import EventQueue
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.work import Entry


def put(queue: EventQueue, count: int, nbytes: int = 8, event: type[BatchEnd | FitEnd] = BatchEnd) -> None:
    """Put entries as the training thread does it."""
    for _ in range(count):
        number, total = queue.received
        queue.put(Entry(number, 0, event(), TrainingPhase(), None, nbytes, None, total + nbytes))


def queue_of(count: int, nbytes: int = 8, limit: int = 1 << 30, **options: int) -> EventQueue:
    queue = EventQueue(Limits(bytes=limit), **options)
    put(queue, count, nbytes)
    return queue


def take(queue: EventQueue) -> list[int]:
    return [entry.sequence for entry in queue.take()]


@pytest.mark.parametrize(
    ("seconds", "events", "taken"),
    [(0.0, 0, 64), (2.0, 1, 1), (1.0, 100, 100), (1e-6, 1, 4096)],
    ids=["not known yet", "slower than a second", "a second's worth", "never more"],
)
def test_a_batch_takes_about_a_second(seconds: float, events: int, taken: int) -> None:
    queue = queue_of(5000)
    if events:
        queue.took(seconds, events)
    assert len(queue.take()) == taken


def test_a_batch_is_a_small_part_of_the_limit_and_one_entry_at_least() -> None:
    assert take(queue_of(10, nbytes=50, limit=1000)) == [0, 1]
    assert take(queue_of(3, nbytes=5000, limit=1000)) == [0]


def test_how_large_a_batch_is_may_change_within_what_the_limit_allows() -> None:
    queue = queue_of(100, nbytes=10, limit=1000, largest=50)
    assert (queue.largest, len(queue.take())) == (50, 5)
    queue.fill(100)
    assert (queue.largest, len(queue.take())) == (100, 10)
    queue.fill(1 << 30)
    assert (queue.largest, len(queue.take())) == (125, 12)


def test_entries_of_a_batch_that_are_not_done_come_next_in_their_order() -> None:
    queue = queue_of(4)
    queue.take()
    put(queue, 1)
    assert [entry.sequence for entry in queue.finish(1)] == [0]
    queue.put_back()
    assert queue.numbers() == (5, 1, 32)
    assert [entry.sequence for entry in queue.waiting()] == [1, 2, 3, 4]
    assert take(queue) == [1, 2, 3, 4]


def test_skipped_entries_count_as_done_and_those_of_one_type_run() -> None:
    queue = queue_of(3)
    put(queue, 1, event=FitEnd)
    put(queue, 2)
    queue.take()
    put(queue, 1)
    assert queue.has_new
    assert len(queue.skip(5, FitEnd)) == 4
    assert (queue.has_new, queue.numbers()) == (False, (7, 4, 24))
    assert [entry.sequence for entry in queue.waiting()] == [3, 5, 6]
    assert [entry.sequence for entry in queue.skip(7, None)] == [3, 5, 6]
    assert (len(queue), queue.numbers()) == (0, (7, 7, 0))


def test_an_empty_queue_has_room_for_any_entry() -> None:
    queue = EventQueue(Limits(pending=2, bytes=100))
    assert not queue.is_full(1000, *queue.received)
    put(queue, 1, nbytes=60)
    assert (queue.is_full(41, *queue.received), queue.is_full(40, *queue.received)) == (True, False)
    put(queue, 1, nbytes=0)
    assert queue.is_full(0, *queue.received), "two entries wait"
    queue.take()
    queue.finish(1)
    assert not queue.is_full(100, *queue.received)


def test_all_is_drained_and_forgotten() -> None:
    queue = queue_of(100)
    assert len(queue.drain()) == 100
    assert (queue.take(), queue.done) == ([], 0)
    put(queue, 1)
    queue.forget()
    assert (len(queue), queue.numbers()) == (0, (101, 101, 0))
