"""``fit(limit_batches=...)``: which batches a limited fit runs, and what else in the fit knows the limit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CheckpointError,
    EpochBegin,
    FitBegin,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Checkpointer, LearningRate, SanityCheck, Scheduler, one_cycle
from flowtrain.data.loaders import LimitedLoader, length
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.fit_data import loader_parts, unlimited


class Endless(IterableDataset[Any]):
    """A stream that never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(1), torch.ones(1)


class Looks(Callback):
    """Keeps the first input of each training batch, the length of the loaders, and the length of the fit."""

    def __init__(self) -> None:
        self.inputs: list[float] = []
        self.lengths: list[dict[str, int]] = []
        self.updates: int | None = None

    def state_access(self) -> Access:
        return {"batch.inputs": Read(), "data": Read()}

    @on(FitBegin, access={})
    def begin(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        self.updates = event.updates

    @on(EpochBegin, access={"data": Read()})
    def look(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        self.lengths.append({repr(phase): len(loader) for phase, loader in learner.data.items()})

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.inputs.append(learner.batch.inputs[0].item())


def numbered(count: int, **options: Any) -> Any:
    values = torch.arange(float(count))[:, None]
    return DataLoader(TensorDataset(values, values), 2, **options)


def test_each_pass_begins_at_the_first_batch() -> None:
    looks = Looks()
    learner = tiny_learner(looks, data=(numbered(10), numbered(10)))
    before = learner.data[TrainingPhase]
    learner.fit(2, limit_batches={TrainingPhase: 3, ValidationPhase: 0.4})
    assert looks.inputs == [0, 2, 4, 0, 2, 4]
    assert looks.lengths == [{"TrainingPhase": 3, "ValidationPhase": 2}] * 4
    assert looks.updates == 6
    assert learner.data[TrainingPhase] is before
    learner.fit(1)
    assert looks.inputs[6:] == [0, 2, 4, 6, 8]


def test_steps_run_through_limited_passes() -> None:
    looks = Looks()
    tiny_learner(looks, data=numbered(10)).fit(steps=7, validate_every=2, limit_batches=3)
    assert looks.inputs == [0, 2, 4, 0, 2, 4, 0]


def test_a_schedule_is_stretched_over_the_limited_fit() -> None:
    learner = tiny_learner(Scheduler({LearningRate: one_cycle(1.0)}), n_batches=100)
    learner.fit(2, limit_batches=0.05)
    rates = [rate for _, rate in learner.cbstate.hyperparams["LearningRate"]]
    expected = one_cycle(1.0, length=10)
    assert rates == pytest.approx([expected(n) for n in range(1, 11)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_limit_gives_a_stream_a_length(accumulate: int) -> None:
    looks = Looks()
    core = TorchCore(device="cpu", accumulate=accumulate)
    learner = tiny_learner(looks, data=DataLoader(Endless(), 4), core=core)
    learner.fit(2, limit_batches=5)
    assert len(looks.inputs) == 10
    assert looks.updates == learner.cbstate.history[TrainingPhase].updates == {1: 10, 2: 6}[accumulate]


def test_the_loader_behind_a_limit_is_found() -> None:
    loader = numbered(10, generator=torch.Generator().manual_seed(3), shuffle=True)
    limited = LimitedLoader(loader, 2)
    assert unlimited(limited) is loader is unlimited(loader)
    assert (len(limited), length(limited), limited.batch_size) == (2, 2, 2)
    assert {id(part) for part in loader_parts(loader)} <= {id(part) for part in loader_parts(limited)}
    assert copy.copy(limited).loader is loader
    assert repr(limited) == f"LimitedLoader({loader!r}, 2)"
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'nonsense'"):
        limited.nonsense  # noqa: B018  # the attribute of a loader that has none


def test_callbacks_that_look_into_loaders_see_through_a_limit(recwarn: pytest.WarningsRecorder) -> None:
    """`SanityCheck` reads a first batch, and `Metrics` knows the batch size of a loader."""
    check = SanityCheck()
    tiny_learner(check, data=(numbered(10), numbered(10))).fit(1, limit_batches=1)
    assert check.skipped == []
    assert not recwarn.list


def test_resumed_with_a_limit_that_ends_before_the_checkpoint(tmp_path: Path) -> None:
    class Asks(Callback):
        @on(BatchEnd, TrainingPhase)
        def ask(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            learner.request_checkpoint(tmp_path / "one.ckpt")

    tiny_learner(Asks(), data=numbered(10)).fit(1, limit_batches=4)
    learner = tiny_learner(data=numbered(10))
    with pytest.raises(CheckpointError) as caught:
        learner.fit(1, limit_batches=2, resume=tmp_path / "one.ckpt")
    assert str(caught.value) == (
        "The checkpoint was taken after batch 4 of an epoch of TrainingPhase, and the loader gives only 2. Resume with "
        "the data of the run that wrote it."
    )
    learner.fit(1, resume=tmp_path / "one.ckpt")
    assert learner.cbstate.history[TrainingPhase].steps == 5


def test_rare_validations_are_those_that_are_saved(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path))
    learner.fit(5, validate_every=2)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"epoch-000{number}.ckpt" for number in (2, 4, 5)]
    assert [epoch for epoch, _ in learner.cbstate.metrics_epoch[ValidationPhase]["Loss"]] == [2, 4, 5]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, "fit(): limit_batches of TrainingPhase is a whole number, at least 1, got 0."),
        (-3, "fit(): limit_batches of TrainingPhase is a whole number, at least 1, got -3."),
        (
            0.0,
            "fit(): limit_batches of TrainingPhase is a whole number of batches, at least 1, or a share of the loader, "
            "above 0.0 and up to 1.0, got 0.0. To leave a phase out, leave it out of data.",
        ),
        *(
            (
                wrong,
                "fit(): limit_batches of TrainingPhase is a whole number of batches, at least 1, or a share of the "
                f"loader, above 0.0 and up to 1.0, got {wrong!r}. To leave a phase out, leave it out of data.",
            )
            for wrong in (1.5, float("nan"), True, "10")
        ),
        (
            {"train": 3},
            "fit(limit_batches={'train': 3}) limits 'train', and the fit has data for TrainingPhase, ValidationPhase. "
            "Write limit_batches={TrainingPhase: 100}.",
        ),
        (
            {ValidationPhase: None},
            "fit(): limit_batches of ValidationPhase is a whole number of batches, at least 1, or a share of the "
            "loader, above 0.0 and up to 1.0, got None. To leave a phase out, leave it out of data.",
        ),
    ],
    ids=str,
)
def test_limits_that_are_refused(limit: Any, message: str) -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError) as caught:
        learner.fit(1, limit_batches=limit)
    assert str(caught.value) == message
    assert learner.model.coeff == 0


def test_a_share_of_a_loader_without_a_length() -> None:
    learner = tiny_learner(data=DataLoader(Endless(), 4))
    with pytest.raises(UsageError) as caught:
        learner.fit(1, limit_batches=0.5)
    assert str(caught.value) == (
        "fit(): limit_batches of TrainingPhase is the share 0.5, and the loader (DataLoader) does not know how many "
        "batches it has. Write a number of batches: limit_batches={TrainingPhase: 100}."
    )


def test_a_phase_without_data_cannot_be_limited() -> None:
    learner = tiny_learner(data=tiny_batches())
    with pytest.raises(UsageError, match="limits ValidationPhase, and the fit has data for TrainingPhase"):
        learner.fit(1, limit_batches={ValidationPhase(): 3})
