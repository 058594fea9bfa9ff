"""StopOnNaNLoss: it ends training with a warning that says where, and NaN does not reach the parameters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchBegin,
    Callback,
    CancelBatchException,
    CancelFittingException,
    LearnerView,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import StopOnNaNLoss
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.loaders import batches_with

NAN = float("nan")


@pytest.mark.cpu_only("on the CPU losses are read at once")
def test_it_warns_where_and_the_parameters_are_those_before() -> None:
    learner = tiny_learner(data=batches_with(NAN, at=3, n_batches=4))
    with pytest.warns(
        RuntimeWarning,
        match=r"^The loss is NaN in batch 3 of epoch 1 of TrainingPhase \(step 3\)\. "
        r"Training stops before the update\. Look for a learning rate that is too high, a division "
        r"by zero, or NaN in the data\.$",
    ):
        learner.fit(5)
    expected = tiny_learner(data=tiny_batches(n_batches=4)[:2])
    expected.fit(1)
    assert torch.equal(learner.model.coeff, expected.model.coeff)
    assert isinstance(learner.stopped, CancelFittingException)
    assert str(learner.stopped).startswith("The loss is NaN in batch 3 of epoch 1 of TrainingPhase (step 3).")
    assert learner.cbstate.history[TrainingPhase] == (0, 2, 2, 2)
    assert learner.model.coeff.grad is None or torch.isfinite(learner.model.coeff.grad)


def test_the_place_counts_on_over_epochs_and_fits() -> None:
    class Spoil(Callback):
        """Makes the model's parameter NaN before a batch, counted from 1 over the whole training."""

        batches = 0

        def state_access(self) -> Access:
            return {"model": Write()}

        @on(BatchBegin, TrainingPhase)
        def spoil(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            self.batches += 1
            if self.batches == 8:
                with torch.no_grad():
                    learner.model.coeff.fill_(NAN)

    learner = tiny_learner(Spoil(), data=tiny_batches(n_batches=3))
    learner.fit(1)
    assert learner.stopped is None
    with pytest.warns(RuntimeWarning, match=r"in batch 2 of epoch 3 of TrainingPhase \(step 8\)"):
        learner.fit(5)


@pytest.mark.cpu_only("on the CPU losses are read at once")
def test_without_a_recorder_it_says_less_and_stops_all_the_same() -> None:
    learner = tiny_learner(StopOnNaNLoss(), default_callbacks=False, data=batches_with(NAN, at=2, n_batches=4))
    with pytest.warns(RuntimeWarning, match=r"^The loss is NaN of TrainingPhase\. Training stops before the update\."):
        learner.fit(1)
    assert isinstance(learner.stopped, CancelFittingException)
    assert torch.isfinite(learner.model.coeff)


@pytest.mark.cpu_only("on the CPU losses are read at once")
def test_a_gradient_group_with_a_nan_is_discarded_whole() -> None:
    """Rule 16: the gradients of the good batches in the group do not reach the parameters in a later fit."""
    core = TorchCore(device="cpu", accumulate=2)
    learner = tiny_learner(data=batches_with(NAN, at=2, n_batches=4), core=core)
    with pytest.warns(RuntimeWarning, match="in batch 2 of epoch 1"):
        learner.fit(1)
    assert learner.model.coeff.item() == 0
    good = tiny_batches(n_batches=4)
    learner.fit(1, data=good)
    expected = tiny_learner(data=good, core=TorchCore(device="cpu", accumulate=2))
    expected.fit(1)
    assert torch.equal(learner.model.coeff, expected.model.coeff)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e30])
def test_what_is_no_nan_goes_on(value: float) -> None:
    learner = tiny_learner(data=batches_with(value, at=4, n_batches=4))
    learner.fit(1)
    assert learner.stopped is None
    assert learner.cbstate.history[TrainingPhase].epochs == 1


def test_validation_is_not_watched() -> None:
    learner = tiny_learner(data=(tiny_batches(n_batches=2), batches_with(NAN, at=1, n_batches=4)))
    learner.fit(1)
    assert learner.stopped is None


@pytest.mark.cpu_only("on the CPU losses are read at once")
def test_a_direct_epoch_lets_the_cancel_through() -> None:
    """Rule 16: outside of a fit the exception that ends a fit reaches the caller."""
    learner = tiny_learner(data=batches_with(NAN, at=1, n_batches=4))
    with (
        pytest.warns(RuntimeWarning, match="in batch 1 of epoch 1"),
        pytest.raises(CancelFittingException, match="The loss is NaN in batch 1"),
    ):
        learner.epoch(TrainingPhase)


@pytest.mark.cpu_only("on the CPU losses are read at once")
def test_a_warning_that_is_an_error_ends_training_too() -> None:
    learner = tiny_learner(data=batches_with(NAN, at=2, n_batches=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="in batch 2 of epoch 1"):
            learner.fit(1)
    assert torch.isfinite(learner.model.coeff)


def test_a_phase_without_batch_loss_is_not_watched() -> None:
    class Own(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0]) as batch:
                learner.backward(self, learner.model(batch.inputs).sum())
                learner.update(self)

    learner = tiny_learner(data={Own: tiny_batches(n_batches=3)})
    learner.fit(1)
    assert learner.cbstate.history[Own] == (1, 3, 3, 3)


def test_a_batch_that_another_callback_skips_first_is_not_looked_at() -> None:
    class Skip(Callback):
        @on(BatchBegin, TrainingPhase)
        def skip(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            raise CancelBatchException("no")

    data = {TrainingPhase: batches_with(NAN, at=1, n_batches=4), ValidationPhase: tiny_batches()}
    learner = tiny_learner(Skip(), data=data)
    learner.fit(1)
    assert learner.stopped is None
