"""Recorder: which epochs, batches and updates it counts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    EpochBegin,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    WriteConflictError,
    on,
)
from flowtrain.callbacks import Recorder
from flowtrain.testing import TinyModel, tiny_batches, tiny_learner
from tests.support.examples import examples
from tests.support.fired import CancelAt
from tests.support.merged import ranked
from tests.support.phases import OtherValidation, TwoModels

Counted = tuple[int, int, int, int]


def test_counts_epochs_batches_and_updates_of_each_phase() -> None:
    batches = tiny_batches(n_batches=5)
    learner = tiny_learner(data={TrainingPhase: batches, ValidationPhase: batches[:3], OtherValidation: batches[:2]})
    learner.fit(2)
    history = learner.cbstate.history
    assert history[TrainingPhase] == (2, 10, 5, 10)
    assert history[ValidationPhase] == (2, 6, 3, 0)
    assert history[OtherValidation] == (2, 4, 2, 0)
    counts = history[TrainingPhase()]  # the counts take a phase or its type as key
    assert (counts.epochs, counts.steps, counts.steps_epoch, counts.updates) == (2, 10, 5, 10)
    learner.fit(steps=3)
    assert history[TrainingPhase] == (3, 13, 3, 13)


@pytest.mark.parametrize(("n_batches", "updates"), [(6, 3), (7, 4), (1, 1)])
def test_accumulation_counts_updates_not_batches(n_batches: int, updates: int) -> None:
    learner = tiny_learner(n_batches=n_batches, core=TorchCore(device="cpu", accumulate=2))
    learner.fit(1)
    assert learner.cbstate.history[TrainingPhase] == (1, n_batches, n_batches, updates)


@pytest.mark.parametrize(
    ("cancels", "expected"),
    [
        ({2: CancelBatchException, 3: CancelBatchException}, (2, 6, 4, 6)),
        ({3: CancelEpochException}, (2, 6, 4, 6)),  # rule 16: a cancelled epoch ends, so it counts
        ({6: CancelFittingException}, (1, 5, 1, 5)),  # an epoch that the end of the fit cuts off does not count
        (dict.fromkeys(range(1, 5), CancelBatchException), (2, 4, 4, 4)),
    ],
)
def test_cancelled_batches_and_epochs(cancels: dict[int, type[Exception]], expected: Counted) -> None:
    learner = tiny_learner(CancelAt(cancels), n_batches=4)
    learner.fit(2)
    assert learner.cbstate.history[TrainingPhase] == expected


class CancelAfterUpdate(Callback):
    @on(UpdateEnd, TrainingPhase)
    def cancel(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        raise CancelBatchException


def test_the_updates_of_a_cancelled_batch_count() -> None:
    learner = tiny_learner(CancelAfterUpdate(), n_batches=4)
    learner.fit(2)
    assert learner.cbstate.history[TrainingPhase] == (2, 0, 0, 8)


def test_an_error_ends_the_epoch_without_counting_it() -> None:
    learner = tiny_learner(CancelAt({3: ValueError}), n_batches=4)
    with pytest.raises(ValueError, match="on purpose"):
        learner.fit(1)
    assert learner.cbstate.history[TrainingPhase] == (0, 2, 2, 2)
    assert learner.cbstate.history[ValidationPhase] == (0, 0, 0, 0)


KINDS = {"batch": CancelBatchException, "epoch": CancelEpochException}


@settings(max_examples=examples(40))
@given(
    cancels=st.dictionaries(st.integers(1, 12), st.sampled_from(sorted(KINDS)), max_size=5),
    epochs=st.integers(1, 3),
    n_batches=st.integers(1, 4),
)
def test_counts_are_those_of_a_plain_loop(cancels: dict[int, str], epochs: int, n_batches: int) -> None:
    """Rule 16: for any pattern of cancelled batches and epochs the counts are those of a plain loop."""
    learner = tiny_learner(CancelAt({number: KINDS[kind] for number, kind in cancels.items()}), n_batches=n_batches)
    learner.fit(epochs)
    number = steps = in_epoch = 0
    for _ in range(epochs):
        in_epoch = 0
        for _ in range(n_batches):
            number += 1
            if cancels.get(number) == "epoch":
                break
            if cancels.get(number) != "batch":
                in_epoch += 1
        steps += in_epoch
    assert learner.cbstate.history[TrainingPhase] == (epochs, steps, in_epoch, steps)


def test_a_reader_sees_the_finished_count_of_the_same_event() -> None:
    """Rule 7: the writer of a count runs before its reader, in whatever order the list has them."""
    seen: list[Counted] = []

    class Reader(Callback):
        def state_access(self) -> Access:
            return {"cbstate.history": Read()}

        @on(EpochBegin)
        def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            seen.append(learner.cbstate.history[phase])

        @on(BatchEnd)
        def end(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            seen.append(learner.cbstate.history[phase])

    learner = tiny_learner(Reader(), n_batches=2)
    learner.epoch(TrainingPhase)
    assert seen == [(0, 0, 0, 0), (0, 1, 1, 1), (0, 2, 2, 2)]


def test_direct_steps_count_as_steps_of_no_epoch() -> None:
    learner = tiny_learner()
    learner.step(TrainingPhase, tiny_batches()[0])
    learner.step(ValidationPhase, tiny_batches()[0])
    assert learner.cbstate.history[TrainingPhase] == (0, 1, 1, 1)
    assert learner.cbstate.history[ValidationPhase] == (0, 1, 1, 0)


def test_every_optimizer_has_updates() -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    learner = tiny_learner(
        model={"one": TinyModel(), "two": TinyModel()},
        optimizer={"one": sgd, "two": sgd},
        data={TwoModels: [torch.ones(2, 1)] * 3},
    )
    learner.fit(1)
    assert learner.cbstate.history[TwoModels] == (1, 3, 3, 6)


def test_two_recorders_conflict() -> None:
    with pytest.raises(WriteConflictError, match=r"Recorder and Recorder#2 .*cbstate.history"):
        tiny_learner(Recorder(), Recorder())


def test_at_the_end_of_an_epoch_all_ranks_have_the_counts_of_the_rank_with_the_most_batches() -> None:
    def make(batches: int, first: Callback) -> Learner:
        return tiny_learner(first, data={ValidationPhase: tiny_batches(n_batches=batches)})

    def run(learner: Learner) -> None:
        learner.validate()
        learner.validate()

    for learner in ranked(make, [3, 1, 2], run):
        assert learner.cbstate.history[ValidationPhase] == (2, 6, 3, 0)
        [recorder] = [each for each in learner.callbacks if isinstance(each, Recorder)]
        assert recorder.ends == {"ValidationPhase": [(0, 3, 0, 0), (0, 6, 0, 0)]}
