"""Scopes: which scopes an exception closes, and the notes that say where it was raised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flowtrain import (
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    DataError,
    EpochBegin,
    Event,
    LearnerView,
    Phase,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.graph.plan import PlannedHandler
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.scopes import CLOSED, ENDING, OPEN, Scopes
from tests.support.phases import OwnPhase


class Note(Callback):
    @on(Event)
    def take(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


def planned() -> PlannedHandler:
    return tiny_learner(Note(), default_callbacks=False).callbacks.plan(BatchEnd, TrainingPhase).handlers[0]


@pytest.mark.parametrize("where", list(itertools.product((CLOSED, OPEN, ENDING), repeat=3)))
def test_what_an_exception_means(where: tuple[int, int, int]) -> None:
    """Rule 16: a cancel ends its scope if that is open; without a fit, a cancel of the fit reaches the caller."""
    scopes = Scopes()
    scopes.fit, scopes.epoch, scopes.batch = where
    assert scopes.has_effect(CancelFittingException()) is (scopes.fit != ENDING)
    assert scopes.has_effect(CancelEpochException()) is (scopes.epoch == OPEN)
    assert scopes.has_effect(CancelBatchException()) is (scopes.batch == OPEN)
    assert scopes.has_effect(ValueError())
    assert scopes.has_effect(KeyboardInterrupt())


def test_a_user_s_cancel_acts_as_its_base_does() -> None:
    class Plateau(CancelEpochException):
        """An exception of a user, for a loss that no longer falls."""

    scopes = Scopes()
    assert not scopes.has_effect(Plateau())
    scopes.open_epoch(TrainingPhase())
    assert scopes.has_effect(Plateau())
    assert issubclass(Plateau, CancelException)


def test_epochs_are_counted_by_phase_and_batches_by_epoch() -> None:
    scopes = Scopes()
    seen: list[tuple[str, int, int]] = []
    for phase in (TrainingPhase(), ValidationPhase(), TrainingPhase()):
        scopes.open_epoch(phase)
        seen.append((repr(scopes.phase), scopes.epoch_number, scopes.batch_number))
        scopes.batch_number += 5
    assert seen == [("TrainingPhase", 1, 0), ("ValidationPhase", 1, 0), ("TrainingPhase", 2, 0)]
    assert scopes.completed is None


def test_the_note_on_an_exception() -> None:
    """Rule 15: callback, handler, event and phase, and the epoch and batch if there are any."""
    scopes, failure, raised_in = Scopes(), ValueError("x"), planned()
    scopes.note(failure, raised_in, BatchEnd(), TrainingPhase())
    scopes.open_epoch(TrainingPhase())
    scopes.note(failure, raised_in, EpochBegin(), TrainingPhase())
    scopes.batch_number = 7
    scopes.note(failure, raised_in, BatchEnd(), TrainingPhase())
    assert failure.__notes__ == [
        "raised in Note.take at (BatchEnd, TrainingPhase)",
        "raised in Note.take at (EpochBegin, TrainingPhase), epoch 1",
        "raised in Note.take at (BatchEnd, TrainingPhase), epoch 1, batch 7",
    ]


@pytest.mark.parametrize(
    ("scope", "inside"),
    [("fit", "inside fit"), ("epoch", "inside an epoch of Phase"), ("batch", "a batch or an event")],
)
@pytest.mark.parametrize("state", [OPEN, ENDING])
def test_training_inside_of_training_is_refused(scope: str, inside: str, state: int) -> None:
    """Rule 18: training cannot be started inside of training."""
    scopes = Scopes()
    scopes.refuse_nested("fit()")
    setattr(scopes, scope, state)
    with pytest.raises(UsageError, match=r"^fit\(\) was called inside .*, from a handler or a step\.") as raised:
        scopes.refuse_nested("fit()")
    assert inside in str(raised.value)


def test_while_an_event_is_fired_from_outside_training_cannot_start() -> None:
    scopes = Scopes()
    scopes.begin_call()
    with pytest.raises(UsageError, match="a batch or an event"):
        scopes.refuse_nested("step()")


# --- notes on exceptions


class Boom(torch.nn.Module):
    """A model that raises at its `at`-th call."""

    def __init__(self, at: int, failure: BaseException) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(1, 1)
        self.at, self.failure, self.calls = at, failure, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.failure
        outputs: Tensor = self.inner(inputs)
        return outputs


class Breaks:
    """A loader that raises in its second pass, after `good` batches."""

    def __init__(self, good: int) -> None:
        self.good, self.passes = good, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield from tiny_batches(n_batches=self.good)
        if self.passes == 2:
            raise OSError("disk")


class Fails(Callback):
    """A handler that always raises."""

    @on(BatchEnd)
    def fail(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        raise OSError("disk")


def notes(failure: BaseException) -> list[str]:
    return list(getattr(failure, "__notes__", []))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("failure", [KeyError("weight"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_model_says_in_which_batch(failure: BaseException, own: bool) -> None:
    phase: type[Phase] = OwnPhase if own else TrainingPhase
    learner = tiny_learner(model=Boom(7, failure), data={phase: tiny_batches(n_batches=4)})
    failure.__notes__ = []
    with pytest.raises(type(failure)) as caught:
        learner.fit(3)
    assert notes(caught.value) == [f"in {phase.__name__}, epoch 2, batch 3"]


@pytest.mark.parametrize(("good", "where"), [(0, "epoch 2"), (3, "epoch 2, after batch 3")])
def test_an_error_of_the_loader_says_after_which_batch(good: int, where: str) -> None:
    loader = Breaks(good)
    learner = tiny_learner(data=loader)
    loader.passes = 0 if good else 1
    learner.loop.scopes.numbers[TrainingPhase()] = loader.passes
    with pytest.raises(OSError, match="disk") as caught:
        learner.fit(2)
    assert notes(caught.value) == [f"in TrainingPhase, {where}"]


def test_data_that_is_no_pair_says_in_which_batch() -> None:
    learner = tiny_learner(data=[*tiny_batches(n_batches=2), torch.zeros(4, 1)])
    with pytest.raises(DataError) as caught:
        learner.fit(1)
    assert notes(caught.value) == ["in TrainingPhase, epoch 1, batch 3"]


def test_what_is_said_already_is_not_said_again() -> None:
    with pytest.raises(OSError, match="disk") as caught:
        tiny_learner(Fails()).fit(1)
    assert notes(caught.value) == ["raised in Fails.fail at (BatchEnd, TrainingPhase), epoch 1, batch 1"]
    with pytest.raises(KeyError) as alone:  # a step outside of an epoch has no place to add
        tiny_learner(model=Boom(1, KeyError())).step(TrainingPhase, tiny_batches()[0])
    assert notes(alone.value) == []
