"""SmoothLoss: compared with the closed form of an exponential average with bias correction."""

from __future__ import annotations

import pytest

from flowtrain import BatchEnd, TorchCore, TrainingPhase, UsageError, ValidationPhase
from flowtrain.callbacks import SmoothLoss, throttle
from flowtrain.testing import tiny_learner


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.98])
def test_the_average_is_the_weighted_mean_of_all_losses(beta: float) -> None:
    learner = tiny_learner(SmoothLoss(beta), n_batches=5)
    learner.fit(2)
    losses = [loss for _, loss in learner.cbstate.metrics_step[TrainingPhase]["Loss"]]
    smooth = list(learner.cbstate.smooth_loss[TrainingPhase])
    assert [step for step, _ in smooth] == list(range(1, 11))
    for count, (_, value) in enumerate(smooth, start=1):
        weights = [beta**age for age in reversed(range(count))]
        expected = sum(w * x for w, x in zip(weights, losses[:count], strict=True)) / sum(weights)
        assert value == pytest.approx(expected)


def test_only_training_is_smoothed() -> None:
    learner = tiny_learner(SmoothLoss())
    learner.fit(1)
    assert list(learner.cbstate.smooth_loss) == [TrainingPhase()]
    assert ValidationPhase not in learner.cbstate.smooth_loss


@pytest.mark.parametrize("lag", [None, 2])
def test_state_dict_continues_the_average(lag: int | None) -> None:
    """With a lag the average is a tensor of float32, as on an accelerator, and is continued to the bit too."""
    whole, first, second = SmoothLoss(), SmoothLoss(), SmoothLoss()
    learner = tiny_learner(whole, core=TorchCore(device="cpu", lag=lag), n_batches=4)
    learner.fit(2)
    halves = tiny_learner(first, core=TorchCore(device="cpu", lag=lag), n_batches=4)
    halves.fit(1)
    second.load_state_dict(first.state_dict())
    halves.replace_callback(second)
    halves.fit(1)
    assert list(halves.cbstate.smooth_loss[TrainingPhase]) == list(learner.cbstate.smooth_loss[TrainingPhase])
    assert second.state_dict() == whole.state_dict()


def test_throttled_it_averages_what_it_saw() -> None:
    learner = tiny_learner(throttle(SmoothLoss(0.0), BatchEnd, every=3), n_batches=7)
    learner.epoch(TrainingPhase)
    losses = list(learner.cbstate.metrics_step[TrainingPhase]["Loss"])
    assert list(learner.cbstate.smooth_loss[TrainingPhase]) == [losses[2], losses[5]]


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_beta_is_checked(beta: float) -> None:
    with pytest.raises(UsageError, match=rf"^SmoothLoss\(beta={beta!r}\): beta is at least 0 and below 1, such as"):
        SmoothLoss(beta)
