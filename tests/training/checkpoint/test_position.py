"""The position of a fit, and loaders that continue at a position."""

from __future__ import annotations

from itertools import count, islice

import pytest
import torch
from torch.utils.data import DataLoader

from flowtrain import CheckpointError, DataError, TrainingPhase, ValidationPhase
from flowtrain.training.checkpoint.position import Position, Stream, check_data, loader_start, replay
from flowtrain.training.checkpoint.rng import random_state, set_random_state
from flowtrain.training.fit_data import loaders_by_phase
from tests.support.untyped import untyped


def shuffled() -> DataLoader[int]:
    return DataLoader(untyped(list(range(6))), shuffle=True)


def numbers(batches: object) -> list[int]:
    return [int(each) for each in batches]  # type: ignore[attr-defined]  # tensors of one element


def test_a_stream_goes_round() -> None:
    stream = Stream([1, 2], TrainingPhase(), count().__next__)
    assert list(islice(stream, 3)) == [1, 2, 1]
    assert list(islice(stream, 2)) == [2, 1]  # it continues with the next item
    assert stream.given == 5
    with pytest.raises(DataError, match="gives no batch"):
        next(iter(Stream([], TrainingPhase(), count().__next__)))


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 12])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_stream_resumes_with_the_order_that_it_had(taken: int, ahead: int) -> None:
    torch.manual_seed(0)
    stream = Stream(shuffled(), TrainingPhase(), count().__next__)
    list(islice(stream, taken))
    ahead = min(ahead, taken)
    state, random = stream.state_dict(ahead), random_state()
    torch.manual_seed(0)
    wanted = numbers(islice(Stream(shuffled(), TrainingPhase(), count().__next__), taken + 8))[taken - ahead :]
    torch.manual_seed(7)
    resumed = Stream(shuffled(), TrainingPhase(), count().__next__)
    resumed.resume(state)
    set_random_state(random)
    assert numbers(islice(resumed, 8 + ahead)) == wanted


def test_a_loader_begins_again_with_what_it_drew() -> None:
    loader = shuffled()
    begun = loader_start(loader)
    order = numbers(loader)
    assert numbers(replay(loader, begun, 4, TrainingPhase())) == order[4:]
    assert numbers(replay(loader, begun, 6, TrainingPhase())) == []
    with pytest.raises(CheckpointError, match=r"after batch 7 of an epoch of ValidationPhase, .* gives only 6"):
        replay(loader, begun, 7, ValidationPhase())


def test_a_loader_may_keep_its_own_position() -> None:
    class Keeps(list[int]):
        start = 0

        def state_dict(self) -> dict[str, int]:
            return {"start": self.start}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.start = state["start"]

    loader = Keeps([1, 2, 3])
    loader.start = 5
    begun = loader_start(loader)
    loader.start = 8
    replay(loader, begun, 1, TrainingPhase())
    assert loader.start == 5


def test_the_position_counts_finished_work() -> None:
    position = Position("steps")
    position.count(TrainingPhase(), 3)
    for batches, steps in ((5, 5), (0, 8)):  # an epoch without a batch counts as 3
        position.begin_epoch(TrainingPhase())
        assert position.state_dict(2)["batches"] == 2
        position.end_epoch(batches)
        assert (position.steps, position.done) == (steps, ["TrainingPhase"])
        position.begin_epoch(ValidationPhase())
        position.end_epoch(4)
        assert position.steps == steps
        assert position.state_dict(4)["batches"] == 0  # between epochs no batch is open
        position.end_round()
    assert (position.rounds, position.done) == (2, [])
    again = Position.resumed(position.state_dict(0))
    assert again.state_dict(0) == position.state_dict(0)
    assert not again.is_resumed(TrainingPhase())


def test_an_open_epoch_is_resumed_once() -> None:
    position = Position("epochs")
    position.begin_epoch(TrainingPhase())
    state = position.state_dict(2)
    again = Position.resumed(state)
    assert again.is_resumed(TrainingPhase())
    assert not again.is_resumed(TrainingPhase())
    assert not Position.resumed(state).is_resumed(ValidationPhase())


@pytest.mark.parametrize(
    ("stream", "phase", "batches", "refused"),
    [
        (None, "TrainingPhase", 2, False),
        (None, "TrainingPhase", 3, True),
        (None, "ValidationPhase", 1, False),
        (None, "ValidationPhase", 2, True),
        (None, "", 9, False),
        ({"begun": {}, "count": 2}, "TrainingPhase", 9, False),  # an epoch of several passes
        ({"begun": {}, "count": 3}, "ValidationPhase", 1, True),
        ({"begun": None, "count": 3}, "ValidationPhase", 1, False),  # no random number was drawn yet
    ],
)
def test_data_that_is_known_to_be_too_short(stream: object, phase: str, batches: int, refused: bool) -> None:
    data = loaders_by_phase(([1, 2], [1]))
    state = {"stream": stream, "phase": phase, "batches": batches, "begun": None}
    if refused:
        with pytest.raises(
            CheckpointError, match=r"taken after batch \d of an epoch of \w+, and the loader gives only"
        ):
            check_data(state, data)
    else:
        check_data(state, data)
