"""What is drawn, as numbers: where each value lies."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch

from flowtrain import TrainingPhase, UsageError, ValidationPhase
from flowtrain.callbacks import Metric, Metrics, Recorder
from flowtrain.diagnostics.plots import Curve, curves, find_names
from flowtrain.learner import Learner
from flowtrain.testing import tiny_batches, tiny_learner


class OtherTraining(TrainingPhase):
    """Train on other data."""


def drawn(learner: Learner, metric: str = "Loss") -> dict[tuple[str, str], Curve]:
    recorder = learner.get_callback(Recorder)
    assert isinstance(recorder, Recorder)
    return {(repr(curve.phase), curve.each): curve for curve in curves(metric, learner.cbstate, recorder.ends)}


def test_epochs_lie_where_training_stood_when_they_ended() -> None:
    """5 training batches an epoch and 2 of validation, which do not count."""
    learner = tiny_learner(data=(tiny_batches(n_batches=5), tiny_batches(n_batches=2)))
    learner.fit(3)
    found = drawn(learner)
    assert list(found) == [("TrainingPhase", "batch"), ("TrainingPhase", "epoch"), ("ValidationPhase", "epoch")]
    assert found["TrainingPhase", "batch"].x == list(range(1, 16))
    assert found["TrainingPhase", "epoch"].x == found["ValidationPhase", "epoch"].x == [5, 10, 15]
    steps, epochs = learner.cbstate.metrics_step, learner.cbstate.metrics_epoch
    assert found["TrainingPhase", "batch"].y == [loss for _, loss in steps[TrainingPhase]["Loss"]]
    assert found["ValidationPhase", "epoch"].y == [loss for _, loss in epochs[ValidationPhase]["Loss"]]


def test_epochs_of_any_length_and_one_that_did_not_end() -> None:
    """Epochs of 4 and 3 batches, then one that fails after 5, which has no mean, then one of 2."""
    batches = tiny_batches(n_batches=12)
    learner = tiny_learner(data=(batches, batches[:1]))
    learner.validate()  # before any training
    learner.fit(steps=7, validate_every=4)
    with pytest.raises(ZeroDivisionError):
        learner.fit(1, data=failing(batches[:5]))
    learner.fit(1, data=(batches[:2], batches[:1]))
    found = drawn(learner)
    assert found["TrainingPhase", "batch"].x == list(range(1, 15))
    assert found["TrainingPhase", "epoch"].x == [4, 7, 14]
    assert found["ValidationPhase", "epoch"].x == [0, 4, 7, 14]


def failing(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> object:
    """A loader that fails after its last batch."""

    class Loader:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from batches
            raise ZeroDivisionError

    return Loader()


def test_two_training_phases_share_the_axis() -> None:
    """Epochs of 3 and 2 batches in turn: 1 2 3, 4 5, 6 7 8, 9 10."""
    data = {TrainingPhase: tiny_batches(n_batches=3), OtherTraining: tiny_batches(n_batches=2)}
    learner = tiny_learner(data=data)
    learner.fit(2)
    found = drawn(learner)
    assert found["TrainingPhase", "batch"].x == [1, 2, 3, 6, 7, 8]
    assert found["OtherTraining", "batch"].x == [4, 5, 9, 10]
    assert found["TrainingPhase", "epoch"].x == [3, 8]
    assert found["OtherTraining", "epoch"].x == [5, 10]


def test_where_nothing_is_trained_a_phases_own_batches_count() -> None:
    learner = tiny_learner(data={ValidationPhase: tiny_batches(n_batches=3)})
    learner.validate()
    learner.validate()
    found = drawn(learner)
    assert found["ValidationPhase", "batch"].x == [1, 2, 3, 4, 5, 6]
    assert found["ValidationPhase", "epoch"].x == [3, 6]


def test_where_epochs_ended_is_in_the_recorders_state() -> None:
    """Rule 28."""
    learner = tiny_learner(data=(tiny_batches(n_batches=5), tiny_batches(n_batches=2)))
    learner.fit(2)
    first, second = learner.get_callback(Recorder), Recorder()
    assert isinstance(first, Recorder)
    assert first.ends == {"TrainingPhase": [(1, 5, 5), (2, 10, 10)], "ValidationPhase": [(1, 2, 5), (2, 4, 10)]}
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    learner.replace_callback(second)
    learner.fit(1)
    assert drawn(learner)["ValidationPhase", "epoch"].x == [5, 10, 15]


def test_names() -> None:
    learner = tiny_learner(Metrics(Metric(lambda outputs, targets: outputs.mean(), name="Bias", phase=ValidationPhase)))
    with pytest.raises(UsageError, match=r"^There is nothing to plot: no metric has been recorded yet\. Call fit\(\)"):
        find_names([], learner.cbstate)
    learner.epoch(TrainingPhase)
    assert find_names([], learner.cbstate) == ["Loss"]
    learner.fit(1)
    assert find_names([], learner.cbstate) == ["Loss", "Bias"]
    assert find_names(["bias", "Loss"], learner.cbstate) == ["Bias", "Loss"]
    with pytest.raises(UsageError) as unknown:
        find_names(["Los"], learner.cbstate)
    assert str(unknown.value) == ("There is no metric 'Los' to plot; recorded are Loss, Bias. Did you mean 'Loss'?")
    with pytest.raises(UsageError, match=r"^There is no metric 3 to plot; recorded are Loss, Bias\.$"):
        find_names([3], learner.cbstate)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # a mistake


def test_names_that_differ_in_capital_letters_alone_are_not_guessed() -> None:
    learner = tiny_learner(
        Metrics(Metric(lambda o, t: o.mean(), name="bias"), Metric(lambda o, t: o.mean(), name="BIAS"))
    )
    learner.fit(1)
    assert find_names(["BIAS"], learner.cbstate) == ["BIAS"]
    with pytest.raises(UsageError, match=r"^There is no metric 'Bias' to plot; recorded are Loss, bias, BIAS\."):
        find_names(["Bias"], learner.cbstate)
