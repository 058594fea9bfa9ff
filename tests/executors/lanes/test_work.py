"""Running the events of a lane: order, identities, failures and surroundings (rules 23, 25 and 27)."""

from __future__ import annotations

from functools import partial

import torch

from flowtrain import BatchEnd, Callback, LearnerView, Phase, TrainingPhase, on
from flowtrain.logging.records import Identity, identity
from flowtrain_dask.lanes.work import Entry, run_entries
from flowtrain_dask.parallel.torch_state import TorchState
from tests.support.lanes import job_of


class Watcher(Callback):
    """Notes what it sees, and fails at a negative number."""

    def __init__(self) -> None:
        self.name = "Watcher"
        self.seen: list[tuple[int, Identity | None, torch.dtype, bool]] = []

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Note."""
        number: int = learner.batch.inputs
        if number < 0:
            raise SystemExit(number)
        self.seen.append((number, identity(), torch.get_default_dtype(), torch.is_grad_enabled()))


def entries(*numbers: int) -> list[Entry]:
    return [
        Entry(place, 0, BatchEnd(), TrainingPhase(), {("batch", "inputs"): number}, 8)
        for place, number in enumerate(numbers)
    ]


def test_events_have_their_identity_and_count_on_in_a_resumed_run() -> None:
    """Rule 25."""
    callback = Watcher()
    result = run_entries([callback], job_of(callback, first=40), entries(7, 8), "run", "Watcher")
    assert [(number, one) for number, one, _, _ in callback.seen] == [
        (7, Identity("run", "Watcher", 40)),
        (8, Identity("run", "Watcher", 41)),
    ]
    assert (result.done, result.failure) == (2, None)
    assert identity() is None


def test_handlers_run_in_the_surroundings_of_the_training_thread() -> None:
    """Rule 14: default dtype as there, no gradients; and the thread is left as it was."""
    callback = Watcher()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        state = TorchState.of_event()
    finally:
        torch.set_default_dtype(before)
    run = partial(run_entries, [callback], job_of(callback), [entries(1)[0]._replace(torch=state)], "run", "Watcher")
    run(seeded=True)  # a process of its own
    run()  # beside training, which has the default dtype of all threads
    assert [(dtype, grad) for _, _, dtype, grad in callback.seen] == [(torch.float64, False), (torch.float32, False)]
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()


def test_it_stops_at_a_failure_and_nothing_gets_through_it() -> None:
    """Rule 27: not even an exit, which would end the lane's thread unseen."""
    callback = Watcher()
    result = run_entries([callback], job_of(callback), entries(1, -2, 3), "run", "Watcher")
    assert [number for number, *_ in callback.seen] == [1]
    assert result.done == 2
    assert result.failure is not None
    sequence, failure = result.failure
    assert (sequence, type(failure)) == (1, SystemExit)


def test_it_stops_when_it_is_enough_after_one_event_at_least() -> None:
    callback = Watcher()
    result = run_entries([callback], job_of(callback), entries(1, 2, 3), "run", "Watcher", enough=lambda: True)
    assert (result.done, result.failure) == (1, None)
