"""The watched metric, in all callbacks that watch one: which phase it is of, and which epochs have a value of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowtrain import (
    AbstractValidationPhase,
    Access,
    BatchBegin,
    Callback,
    CancelBatchException,
    EpochEnd,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, EarlyStopping, LearningRate, Scheduler, reduce_on_plateau
from flowtrain.state.by_phase import epoch_of
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.scores import scored
from tests.support.untyped import untyped


class OtherPhase(ValidationPhase):
    """A second phase that evaluates."""


class ThirdPhase(ValidationPhase):
    """A third phase that evaluates."""


def watching(kind: str, folder: Path, **options: Any) -> Callback:
    """Return a callback of each kind that watches a metric."""
    if kind == "EarlyStopping":
        return EarlyStopping(1, **options)
    if kind == "Checkpointer":
        return Checkpointer(folder, **options)
    return Scheduler({LearningRate: reduce_on_plateau(0.01, factor=0.5, patience=0, **options)})


KINDS = ["EarlyStopping", "Checkpointer", "Scheduler"]


@pytest.mark.parametrize(
    ("kind", "who", "call"),
    [
        ("EarlyStopping", "EarlyStopping", "EarlyStopping(..."),
        ("Checkpointer", "Checkpointer", "Checkpointer(..."),
        ("Scheduler", "Scheduler with reduce_on_plateau(0.01, monitor='Loss')", "reduce_on_plateau(0.01"),
    ],
)
def test_a_phase_that_the_data_do_not_have(kind: str, who: str, call: str, tmp_path: Path) -> None:
    learner = tiny_learner(watching(kind, tmp_path, phase=ValidationPhase), data=tiny_batches(n_batches=2))
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    assert str(caught.value) == (
        f"{who} watches ValidationPhase, which the data does not have. The data has TrainingPhase. "
        f"Write {call}, phase=TrainingPhase)."
    )
    if kind == "Checkpointer":
        return  # it takes the last one of several
    several = {TrainingPhase: tiny_batches(), OtherPhase: tiny_batches(), ThirdPhase: tiny_batches()}
    learner = tiny_learner(watching(kind, tmp_path, phase=ValidationPhase), data=several)
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    assert str(caught.value) == (
        f"{who} watches ValidationPhase, and the data has several of that kind. The data has TrainingPhase, "
        f"OtherPhase, ThirdPhase. Write {call}, phase=ThirdPhase)."
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_of_another_phase(kind: str, tmp_path: Path) -> None:
    watches = watching(kind, tmp_path, monitor="Score", phase=ValidationPhase, mode="min")
    learner = tiny_learner(scored(1, 2, phase=TrainingPhase), watches, n_batches=2)
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    assert str(caught.value).startswith(
        f"{kind} needs 'Score' of ValidationPhase, and nothing was recorded by the end of its first epoch; it is "
        f"recorded in TrainingPhase. Give Metrics a metric that is computed in this phase, or name another phase: "
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_no_metric_has(kind: str, tmp_path: Path) -> None:
    """The first error of all who come from Keras or Lightning names the remedy, and no declaration."""
    with pytest.raises(MissingStateError) as caught:
        tiny_learner(watching(kind, tmp_path, monitor="val_loss", mode="min"))
    assert str(caught.value) == (
        f"{kind} reads cbstate.metrics_epoch.val_loss, and no callback declares to write it. In cbstate.metrics_epoch "
        f"there is Loss. Did you mean 'Loss'? Name a metric that is recorded, as in monitor='Loss', or give Metrics "
        f"one of this name. A name has no prefix such as 'val_': the phase is an argument of its own, "
        f"phase=ValidationPhase."
    )


@pytest.mark.parametrize(
    ("call", "make"),
    [
        ("EarlyStopping", lambda **options: EarlyStopping(1, **options)),
        ("Checkpointer", lambda **options: Checkpointer("unused", **options)),
        ("reduce_on_plateau", lambda **options: reduce_on_plateau(0.1, **options)),
    ],
)
def test_arguments_that_are_refused(call: str, make: Callable[..., Any]) -> None:
    for options, text in (
        ({"monitor": "a."}, "(monitor='a.'): monitor is the name of a metric, such as 'Loss'."),
        ({"monitor": 3}, "(monitor=3): monitor is the name of a metric, such as 'Loss'."),
        ({"phase": "valid"}, "(phase='valid') is no phase type. Write phase=ValidationPhase."),
        ({"mode": "best"}, "(mode='best'): mode is 'min' if small values of Loss are good, otherwise 'max'."),
    ):
        with pytest.raises(UsageError) as caught:
            make(**untyped(options))
        assert str(caught.value) == call + text


# --- the epochs that have a value


class Own(Callback):
    """Records a metric that becomes better in each epoch of `ValidationPhase`, and stays the same in other phases."""

    def state_access(self) -> Access:
        return {"cbstate.metrics_epoch.Own": Write(), "cbstate.history": Read()}

    @on(EpochEnd, AbstractValidationPhase)
    def push(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        epoch = epoch_of(learner.cbstate.history, phase)
        learner.cbstate.metrics_epoch[phase].push("Own", 1 / epoch if type(phase) is ValidationPhase else 0.0, epoch)


class EmptyFrom(Callback):
    """Cancels all batches of the validation epochs from one on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.epoch = 1

    @on(BatchBegin, ValidationPhase)
    def cancel(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        if self.epoch >= self.first:
            raise CancelBatchException("no target")

    @on(EpochEnd, ValidationPhase)
    def count(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.epoch += 1


def rates(plateau: Any, *callbacks: Callback, epochs: int, **options: Any) -> list[float]:
    """Return the learning rate of each epoch, which has two batches."""
    learner = tiny_learner(Scheduler({LearningRate: plateau}), *callbacks, **options)
    learner.fit(epochs)
    return [value for _, value in learner.cbstate.hyperparams["LearningRate"]][::2]


def test_a_rate_falls_by_the_phase_of_exactly_the_type() -> None:
    data = {phase: tiny_batches(n_batches=2) for phase in (TrainingPhase, ValidationPhase, OtherPhase)}
    plateau = reduce_on_plateau(0.01, monitor="Own", mode="min", factor=0.5, patience=1)
    assert rates(plateau, Own(), epochs=6, data=data) == [0.01] * 6
    plateau = reduce_on_plateau(0.01, monitor="Own", mode="min", factor=0.5, patience=1, phase=OtherPhase)
    assert rates(plateau, Own(), epochs=6, data=data) == [0.01] * 3 + [0.005] * 2 + [0.0025]


@pytest.mark.parametrize("first", [1, 3])
def test_an_epoch_that_measures_nothing_is_no_epoch_without_an_improvement(first: int) -> None:
    plateau = reduce_on_plateau(0.01, factor=0.5, patience=0)
    assert rates(plateau, EmptyFrom(first), epochs=6, n_batches=2) == [0.01] * 6


def test_epochs_outside_of_a_fit_count_as_those_within() -> None:
    plateau = reduce_on_plateau(0.01, monitor="Own", mode="min", factor=0.5, patience=0, phase=OtherPhase)
    learner = tiny_learner(Scheduler({LearningRate: plateau}), Own())
    for _ in range(4):
        learner.epoch(TrainingPhase, tiny_batches(n_batches=2))
        learner.epoch(OtherPhase, tiny_batches(n_batches=2))
        learner.epoch(OtherPhase, tiny_batches(n_batches=2))  # of the same parameters, so it does not count
    rate = [value for _, value in learner.cbstate.hyperparams["LearningRate"]]
    assert rate == [0.01] * 4 + [0.005] * 2 + [0.0025] * 2


def test_the_rank_of_an_epoch_is_not_that_of_an_earlier_one(tmp_path: Path) -> None:
    """An epoch without a complete batch has no value: it is the worst, and does not repeat the rank of the last one."""
    learner = tiny_learner(Checkpointer(tmp_path, keep_top_k=2), EmptyFrom(3), n_batches=2)
    learner.fit(4)
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == [
        "epoch-0001.ckpt", "epoch-0002.ckpt", "epoch-0004.ckpt",
    ]  # fmt: skip
