"""How many entries make a batch (rules 23 and 24)."""

from __future__ import annotations

from collections import deque

import pytest

from flowtrain import BatchEnd, TrainingPhase
from flowtrain_dask.lanes.driver import Batches
from flowtrain_dask.lanes.work import Entry


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
