"""How a batch gets to a worker: what is sent, what is left in memory, and what is done where that is not found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flowtrain import BatchEnd, TrainingPhase
from flowtrain_dask.cluster import shipping as shipping_module
from flowtrain_dask.cluster.entries import load_entries
from flowtrain_dask.cluster.readings import Readings
from flowtrain_dask.cluster.shipping import LEFT, SENT, Shipment, Shipping
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.parcels import Parcel, possible
from flowtrain_dask.snapshots.pool import Pool

MB = torch.zeros(1 << 18)


@pytest.fixture
def shipping() -> Iterator[Shipping]:
    made = Shipping()
    yield made
    made.close()


def entries_of(*tensors: torch.Tensor) -> list[Entry]:
    return [
        Entry(number, 0, BatchEnd(), TrainingPhase(), {("batch", "inputs"): tensor}, tensor.nbytes)
        for number, tensor in enumerate(tensors)
    ]


def arrived(shipment: Shipment) -> list[Any]:
    """Return what a worker on this machine finds in the events."""
    tickets = [*shipment.parcels, *([] if shipment.buffers is None else [shipment.buffers])]
    with Readings(tickets) as readings:
        assert not readings.missing
        memories = readings.memories
        buffers = None if shipment.buffers is None else memories.pop()
        return [entry.payload["batch", "inputs"] for entry in load_entries(shipment.events, buffers, memories)]


def test_what_is_small_is_sent(shipping: Shipping) -> None:
    shipment = shipping.pack(entries_of(torch.ones(3), torch.zeros(2)))
    assert (shipment.buffers, shipment.parcels) == (None, ())
    assert [found.tolist() for found in arrived(shipment)] == [[1.0, 1.0, 1.0], [0.0, 0.0]]


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_snapshots_stay_where_they_are_and_the_rest_gets_a_parcel(shipping: Shipping) -> None:
    pool = Pool(1 << 26, share=True)
    lent, other = pool.like(MB).fill_(3.0), torch.full((200_000,), 4.0)
    shipment = shipping.pack(entries_of(lent, other, torch.ones(2)))
    assert len(shipment.events) < 10_000
    assert len(shipment.parcels) == 1
    assert shipment.buffers is not None
    assert shipment.buffers.size < 900_000
    one, two, three = arrived(shipment)
    assert torch.equal(one, lent)
    assert torch.equal(two, other)
    assert three.tolist() == [1.0, 1.0]


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_snapshots_are_found_until_they_have_arrived(shipping: Shipping) -> None:
    """The pool that lends them may be gone: a learner was dropped, whose lanes finish."""
    pool = Pool(1 << 26, share=True)
    entries = entries_of(pool.like(MB).fill_(3.0))
    shipment = shipping.pack(entries)
    pool.clear()
    del pool
    [found] = arrived(shipment)
    assert found.sum() == 3 * MB.numel()
    shipping.arrived()
    with Readings(shipment.parcels) as readings:
        assert readings.missing
    [found] = arrived(shipping.pack(entries))
    assert found.sum() == 3 * MB.numel(), "it is in no pool, and is put into a parcel"


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_one_parcel_is_kept_for_the_next_batch(shipping: Shipping) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        entries = entries_of(MB, MB)
        first = shipping.pack(entries)
        assert shipping.pack(entries) is first, "another attempt gets the same"
        second = shipping.pack(entries[1:])  # and one with other events something else
        assert first.buffers is not None
        assert second.buffers is not None
        assert first.buffers.descriptor != second.buffers.descriptor
        shipping.arrived()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    shipping.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_a_worker_that_is_far_gets_everything_and_less_at_once(shipping: Shipping) -> None:
    pool = Pool(1 << 26, share=True)
    entries = entries_of(*(pool.like(MB).fill_(number) for number in range(12)))
    assert shipping.largest == LEFT
    shipping.pack(entries)
    rest = shipping.take_for_far(entries)
    assert len(rest) == SENT >> 20
    assert shipping.largest == SENT
    shipment = shipping.pack(rest)
    assert (shipment.buffers, shipment.parcels) == (None, ())
    assert [float(found[0]) for found in arrived(shipment)] == list(range(8))
    large = entries_of(torch.zeros(SENT))
    assert shipping.take_for_far(large) == large, "one is sent whatever its size"
    assert shipping.take_for_far([]) == []


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_after_many_batches_that_were_sent_memory_is_tried_again(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may have had no memory for a moment, or another one be nearer."""
    monkeypatch.setattr(shipping_module, "_AGAIN", 3)
    entries = entries_of(MB)
    shipping.take_for_far(entries)
    for _ in range(3):
        assert shipping.pack(entries).buffers is None
        shipping.arrived()
    assert shipping.pack(entries).buffers is not None
    assert shipping.largest == LEFT
    shipping.take_for_far(entries)
    assert not shipping.near


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_where_there_is_no_memory_it_is_sent(shipping: Shipping, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(Parcel, "fill", refuse)
    shipment = shipping.pack(entries_of(MB))
    assert shipment.buffers is None
    assert shipping.largest == SENT
    assert torch.equal(arrived(shipment)[0], MB)
