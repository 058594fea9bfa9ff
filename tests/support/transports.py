"""The contract of transports: wherever handlers run, the lane gets the same records, failures and state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from flowtrain import BatchEnd, Callback, LearnerView, Phase, TrainingPhase, on
from flowtrain.logging.backend import Group, Value
from flowtrain.logging.records import Identity, identity, log
from flowtrain_dask.lanes.report import LaneCounts
from flowtrain_dask.lanes.transport import LaneContext, Transport
from flowtrain_dask.lanes.work import Entry, Job
from tests.support.lanes import Memory, job_of

MakeTransport: TypeAlias = Callable[[Job, Sequence[Callback]], Transport]
"""Makes the transport of a lane from its job and its callbacks."""

GROUP: Group = ("Step", "TrainingPhase")


class StoppedBy(LaneContext):
    """A context whose lane is to stop when a function says so; `gate` may be any context manager."""

    def __init__(self, stopped: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.stopped = stopped

    def is_stopped(self) -> bool:
        return self.stopped()


class Unwritten(Memory):
    """Encodes records, and fails if a transport writes one: the lane writes them."""

    def write(self, record: bytes) -> None:
        raise AssertionError("records are handed back")


class Adder(Callback):
    """Adds up its inputs and logs the sum; fails at a negative number."""

    def __init__(self) -> None:
        self.name = "Adder"
        self.backends = (Unwritten(),)
        self.total = 0
        self.seen: list[tuple[int, Identity | None, bool]] = []

    @on(BatchEnd, TrainingPhase)
    def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Take one number."""
        number: int = learner.batch.inputs
        if number < 0:
            raise ValueError(f"number {number}")
        self.total += number
        self.seen.append((threading.get_ident(), identity(), torch.is_grad_enabled()))
        log(self.backends, Value(self.total), "sum", number, GROUP)


def entries_of(*numbers: int, first: int = 0) -> list[Entry]:
    """Return the entries of a lane, the first of which has the number `first`, for these inputs."""
    return [
        Entry(first + place, 0, BatchEnd(), TrainingPhase(), {("batch", "inputs"): number}, 8)
        for place, number in enumerate(numbers)
    ]


class TransportContract:
    """Tests that every transport passes. A subclass has a fixture ``make``, a `MakeTransport`."""

    def test_records_are_handed_back_in_order_and_the_state_is_kept(self, make: MakeTransport) -> None:
        """Rule 25: the process that trains writes the records, whose entry and backend are given."""
        adder, context = Adder(), LaneContext()
        transport = make(job_of(adder), [adder])
        assert transport.linger >= 0
        assert transport.largest > 0
        transport.open(60)
        result = transport.run_batch(entries_of(1, 2, 3), context)
        assert result.records == [(0, 0, 0, b"sum 1 1"), (1, 0, 0, b"sum 2 3"), (2, 0, 0, b"sum 3 6")]
        assert (result.done, result.failure) == (3, None)
        result = transport.run_batch(entries_of(4, first=3), context)
        assert result.records == [(3, 0, 0, b"sum 4 10")]
        transport.close()
        assert context.counts == LaneCounts()

    def test_collected_state_is_the_callbacks_and_the_user_may_change_it(self, make: MakeTransport) -> None:
        """Rule 26."""
        adder, context = Adder(), LaneContext()
        [backend] = adder.backends
        transport = make(job_of(adder, first=10), [adder])
        transport.open(60)
        transport.run_batch(entries_of(1, 2), context)
        transport.bring_state_back(context)
        assert adder.total == 3
        assert adder.backends[0] is backend
        assert [seen[1:] for seen in adder.seen] == [
            (Identity("run", "Adder", 10), False),
            (Identity("run", "Adder", 11), False),
        ]
        adder.total = 100
        result = transport.run_batch(entries_of(5, first=2), context)
        assert result.records == [(2, 0, 0, b"sum 5 105")]
        transport.close()

    def test_a_failure_ends_the_batch_and_is_handed_back(self, make: MakeTransport) -> None:
        """Rule 27."""
        adder, context = Adder(), LaneContext()
        transport = make(job_of(adder), [adder])
        transport.open(60)
        result = transport.run_batch(entries_of(1, -2, 3, first=5), context)
        assert (result.done, result.records) == (2, [(5, 0, 0, b"sum 1 1")])
        assert result.failure is not None
        sequence, failure = result.failure
        assert (type(failure), sequence, str(failure)) == (ValueError, 6, "number -2")
        where = "raised in Adder.add at (BatchEnd, TrainingPhase), deferred as event 6 of lane Adder"
        assert failure.__notes__[0] == where
        transport.bring_state_back(context)
        assert adder.total == 1
        transport.close()
