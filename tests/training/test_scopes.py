"""Scopes: which scopes an exception closes, and the note that is added to the exception."""

from __future__ import annotations

import itertools

import pytest

from flowtrain import (
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
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
from flowtrain.testing import tiny_learner
from flowtrain.training.scopes import CLOSED, ENDING, OPEN, Scopes


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
