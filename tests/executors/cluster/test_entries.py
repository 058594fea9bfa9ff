"""Events as bytes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flowtrain import BatchEnd, Event, Phase, Read, TrainingPhase
from flowtrain.callback.access import declare
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.cluster.entries import dump_entries, load_entries
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.copiers import Pool
from flowtrain_dask.snapshots.taker import Shared, Taker


@dataclass(frozen=True)
class Scored(Event):
    """An event with data."""

    score: float


class OtherPhase(Phase):
    """A user's own."""


def test_events_phases_and_numbers_come_back() -> None:
    sent = [
        Entry(3, 0, BatchEnd(), TrainingPhase(), {("batch", "loss"): 0.5}, 8),
        Entry(4, 1, Scored(0.25), OtherPhase(), {}, 0),
    ]
    got = load_entries(bytes(dump_entries(sent)))
    for one, other in zip(got, sent, strict=True):
        assert type(one.event) is type(other.event)  # those without data are not compared by value
        assert one[:2] + one[3:] == other[:2] + other[3:]
    assert got[1].event == Scored(0.25)
    assert type(got[1].phase) is OtherPhase
    assert load_entries(bytes(dump_entries([]))) == []


def test_a_copy_that_two_events_share_is_sent_once() -> None:
    state = LearnerState()
    state.show(BatchState())
    loss: Any = torch.arange(100_000.0)
    state.batch.loss = loss
    taker = Taker(declare({"batch.loss": Read()}, "me"), state, Pool(1 << 20), fresh=frozenset(), tail=False)
    shared = Shared()
    sent = [Entry(n, 0, BatchEnd(), TrainingPhase(), taker.take(shared), 400_000) for n in range(2)]
    blob = bytes(dump_entries(sent))
    assert 400_000 < len(blob) < 450_000
    one, two = (entry.payload["batch", "loss"] for entry in load_entries(blob))
    assert one is two
    assert torch.equal(one, loss)
