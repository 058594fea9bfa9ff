"""The position of a fit, loaders that continue at it, and resumed runs over data that differ in each pass."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from flowtrain import (
    BatchEnd,
    Callback,
    CheckpointError,
    DataError,
    EpochBegin,
    EpochEnd,
    FitEnd,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Checkpointer, LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from flowtrain.testing.values import learner_leaves
from flowtrain.training.checkpoint.position import Position, Stream, check_data, loader_start, replay
from flowtrain.training.checkpoint.rng import random_state, set_random_state
from flowtrain.training.fit_data import loaders_by_phase
from tests.support.resumed import FITS, Ask, Run, ask_at, augmented, everything, learner_of, shuffled, with_generator
from tests.support.untyped import untyped


def six() -> DataLoader[int]:
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
    stream = Stream(six(), TrainingPhase(), count().__next__)
    list(islice(stream, taken))
    ahead = min(ahead, taken)
    state, random = stream.state_dict(ahead), random_state()
    torch.manual_seed(0)
    wanted = numbers(islice(Stream(six(), TrainingPhase(), count().__next__), taken + 8))[taken - ahead :]
    torch.manual_seed(7)
    resumed = Stream(six(), TrainingPhase(), count().__next__)
    resumed.resume(state)
    set_random_state(random)
    assert numbers(islice(resumed, 8 + ahead)) == wanted


def test_a_loader_begins_again_with_what_it_drew() -> None:
    loader = six()
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


# --- resumed runs


DRAWS_AHEAD = pytest.mark.cpu_only("docs/checkpoints.md: with prefetch, numbers drawn within an epoch differ")


def of_unknown_length() -> Any:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(x, x[:2] ** 2) for x in torch.rand(22, 3)])

    return DataLoader(Stream(), 5)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("data", [with_generator, pytest.param(augmented, marks=DRAWS_AHEAD), of_unknown_length])
@pytest.mark.parametrize("number", [2, 7])
def test_rule_28_loaders_and_groups(data: Run, number: int, accumulate: int, tmp_path: Path) -> None:
    """Rule 28: for generators of loaders, for random data, and within an accumulation group."""
    if data is of_unknown_length and accumulate > 1:
        pytest.skip("one batch is drawn ahead, to know which is the last: the numbers after it differ")
    path = tmp_path / "one.ckpt"
    whole = learner_of(Ask(path, BatchEnd, TrainingPhase, number), data=data, accumulate=accumulate)
    whole.fit(3)
    wanted = everything(whole)
    resumed = learner_of(data=data, accumulate=accumulate, seed=99)
    resumed.fit(3, resume=path)
    assert everything(resumed) == wanted


class ByEpoch(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that differ in each pass."""

    def __init__(self) -> None:
        self.number = -1
        self.told: list[int] = []

    def set_epoch(self, number: int) -> None:
        self.number = number
        self.told.append(number)

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((3,), index / 20 + self.number)
        return x, x[:2] ** 2


def distributed() -> Any:
    dataset = shuffled().dataset
    return DataLoader(dataset, 5, sampler=DistributedSampler(dataset, num_replicas=1, rank=0))


def by_epoch() -> Any:
    return DataLoader(ByEpoch(), 5, shuffle=True)


def wrapped() -> Any:
    class Loader:
        """A user's loader, which passes the number of the pass to the data, with an offset."""

        def __init__(self) -> None:
            self.inner = distributed()

        def set_epoch(self, number: int) -> None:
            self.inner.sampler.set_epoch(100 + number)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.inner)

    return Loader()


@pytest.mark.parametrize(
    ("data", "fit"),
    [(distributed, fit) for fit in FITS]
    + [(data, fit) for data in (by_epoch, wrapped) for fit in ("epochs", "long steps", "limited passes")],
)
def test_rule_28_data_that_is_shuffled_by_the_number_of_the_pass(fit: str, data: Run, tmp_path: Path) -> None:
    """Rule 28: a resumed fit tells the loader the number of the pass that it resumes, not that of a new one."""
    asks = ask_at(
        [(BatchEnd, TrainingPhase, 4), (BatchEnd, TrainingPhase, 12), (EpochEnd, ValidationPhase, 2)], tmp_path
    )
    whole = learner_of(*asks, data=data)
    whole.fit(**FITS[fit])
    wanted = everything(whole)
    for ask in asks:
        resumed = learner_of(data=data, seed=99)
        resumed.fit(**FITS[fit], resume=ask.path)
        assert everything(resumed) == wanted, ask.place


def test_every_pass_has_a_number_of_its_own_over_the_life_of_a_learner(tmp_path: Path) -> None:
    train, valid = ByEpoch(), ByEpoch()
    loaders = DataLoader(train, 5), DataLoader(valid, 11)
    path = tmp_path / "one.ckpt"
    learner = tiny_learner(Ask(path, FitEnd, Phase, 3), data=loaders, model=torch.nn.Linear(3, 2))
    learner.validate()
    learner.fit(2)
    learner.validate()
    learner.fit(steps=12, validate_every=4)  # three epochs, which take passes 2, 3 and 4
    learner.epoch(TrainingPhase)
    assert train.told == [0, 1, 2, 3, 4, 5]
    # An evaluation gets the number of the training pass before it.
    assert valid.told == [0, 0, 1, 1, 2, 3, 4]
    learner.fit(1)
    loaded = tiny_learner(data=loaders, model=torch.nn.Linear(3, 2))
    loaded.load(path)
    loaded.fit(1)
    assert train.told[6:] == [6, 7]


def test_a_handler_may_choose_the_number_of_a_pass() -> None:
    data = ByEpoch()

    class Choose(Callback):
        @on(EpochBegin, TrainingPhase)
        def choose(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            data.set_epoch(50)

    tiny_learner(Choose(), data=DataLoader(data, 22), model=torch.nn.Linear(3, 2)).fit(2)
    assert data.told == [0, 50, 1, 50]


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_data_that_is_too_short_is_refused_before_anything_changes(phase: type[Phase], tmp_path: Path) -> None:
    """Rule 28: after the refusal, even the log records that follow the checkpoint are still there."""
    logs = LogMetrics(JsonlBackend(tmp_path / "log.jsonl"))
    with tiny_learner(logs, Ask(tmp_path / "one.ckpt", BatchEnd, phase, 3), n_batches=4) as learner:
        learner.fit(1)
    logged = (tmp_path / "log.jsonl").read_bytes()
    with tiny_learner(LogMetrics(JsonlBackend(tmp_path / "log.jsonl")), n_batches=2) as other:
        before = dict(learner_leaves(other))
        with pytest.raises(CheckpointError, match=rf"after batch 3 of an epoch of {phase.__name__}, .* gives only 2"):
            other.fit(2, resume=tmp_path / "one.ckpt")
        assert dict(learner_leaves(other)) == before
    assert (tmp_path / "log.jsonl").read_bytes() == logged


class Torn:
    """A loader in random order whose pass fails once, by the signal that interrupts training, before its first batch.

    Before that it has drawn a number, as torch's loader does for the seeds of its workers.

    Args:
        fails: The number of the pass that fails; 0 for none.
    """

    def __init__(self, fails: int) -> None:
        self.fails, self.passes = fails, 0
        self.numbers: list[int] = []

    def set_epoch(self, number: int) -> None:
        """Note the number of the pass."""
        self.numbers.append(number)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.passes += 1
        torch.rand(())
        if self.passes == self.fails:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("a worker was ended by the signal")
        for number in torch.randperm(4).tolist():
            inputs = torch.full((2, 1), float(number)) + torch.rand(())
            yield inputs, 3 * inputs


@pytest.mark.parametrize("validate_every", [2, 3, 4, 5, None])
@pytest.mark.parametrize("fails", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loader_that_fails_with_the_interrupt_before_its_first_batch(
    validate_every: int | None, fails: int, accumulate: int, tmp_path: Path
) -> None:
    """Rule 29: the resumed run is the uninterrupted one, wherever in an epoch the pass of a stream begins."""

    def train(fails: int, resume: str | None = None, callbacks: Sequence[Callback] = ()) -> Any:
        """Train for 14 steps; return the parameter, the losses and the numbers of the passes."""
        loader = Torn(fails)
        learner = tiny_learner(*callbacks, data=loader, core=TorchCore(accumulate=accumulate))
        learner.fit(steps=14, validate_every=validate_every, resume=resume)
        return learner.model.coeff.item(), learner.cbstate.metrics_step[TrainingPhase]["Loss"].values, loader.numbers

    torch.manual_seed(4)
    whole = train(0)
    torch.manual_seed(4)
    with pytest.raises(KeyboardInterrupt):
        train(fails, callbacks=[Checkpointer(tmp_path)])
    torch.manual_seed(77)
    resumed = train(0, resume=str(tmp_path), callbacks=[Checkpointer(tmp_path)])
    assert resumed[:2] == whole[:2]
    assert resumed[2][-1] == whole[2][-1]
