"""LogHistograms: weights at the end of a batch, and gradients before they are clipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowtrain import BatchEnd, TorchCore, UsageError
from flowtrain.callbacks import LogHistograms, throttle
from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, JsonlBackend
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.logs import log_fields
from tests.support.untyped import untyped


def test_weights_and_gradients_of_one_batch_have_one_step(tmp_path: Path) -> None:
    path = tmp_path / "log"
    core = TorchCore(device="cpu", clip_grad_norm=1e-3)
    with tiny_learner(
        LogHistograms(JsonlBackend(path), every=2, gradients=True, bins=1), n_batches=4, core=core
    ) as learner:
        learner.fit(1)
    found = log_fields(path, "name", "step", "value")
    assert [(name, step) for name, step, _ in found] == [
        ("Gradients/coeff", 2),
        ("Weights/coeff", 2),
        ("Gradients/coeff", 4),
        ("Weights/coeff", 4),
    ]
    x, y = tiny_batches(n_batches=4)[3]
    middle = {(name, step): sum(value["edges"]) / 2 for name, step, value in found}
    assert middle["Weights/coeff", 4] == pytest.approx(learner.model.coeff.item())
    before = learner.model.coeff.item() - 0.1e-3  # each clipped update adds 0.0001
    gradient = (2 * (before * x - y) * x).mean().item()
    assert middle["Gradients/coeff", 4] == pytest.approx(gradient, rel=1e-4)  # these are the gradients before clipping


def test_accumulated_gradients_are_logged_at_the_batch_of_their_update(tmp_path: Path) -> None:
    path = tmp_path / "log"
    core = TorchCore(device="cpu", accumulate=2)
    with tiny_learner(LogHistograms(JsonlBackend(path), every=1, gradients=True), n_batches=4, core=core) as learner:
        learner.fit(1)
    assert [step for name, step in log_fields(path, "name", "step") if name.startswith("Gradients")] == [2, 4]


def test_the_counts_are_those_of_the_values(tmp_path: Path) -> None:
    path = tmp_path / "log"
    model = torch.nn.Sequential(torch.nn.Linear(1, 1000), torch.nn.Linear(1000, 1))
    with tiny_learner(LogHistograms(JsonlBackend(path), every=1, bins=8), n_batches=1, model=model) as learner:
        learner.fit(1)
    found = {name: value for name, _, value in log_fields(path, "name", "step", "value")}
    assert list(found) == [f"Weights/{name}" for name, _ in model.named_parameters()]
    counts, edges = torch.histogram(model.state_dict()["0.weight"].flatten(), 8)
    assert found["Weights/0.weight"]["counts"] == counts.int().tolist()
    assert found["Weights/0.weight"]["edges"] == pytest.approx(edges.tolist(), rel=1e-5, abs=1e-6)


def test_gradients_are_declared_when_they_are_asked_for() -> None:
    backend = JsonlBackend("log")
    plain, both = LogHistograms(backend), LogHistograms(backend, gradients=True)
    assert [dict(handler.access or {}).keys() for _, handler in plain.handlers()] == [{"params", "cbstate.history"}]
    assert [dict(handler.access or {}).keys() for _, handler in both.handlers()] == [
        {"params", "cbstate.history"},
        {"batch.grads", "cbstate.history"},
    ]
    assert len(throttle(plain, BatchEnd, every=2).conditions) == 3


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(LoggingError, match=r"LogHistograms logs Histogram, and CsvBackend\(.*\) takes Value\. Give Lo"):
        LogHistograms(CsvBackend(tmp_path / "v.csv"))
    for wrong in (0, 1.5, True):
        with pytest.raises(UsageError, match=rf"every is a whole number, at least 1, got {wrong}\."):
            LogHistograms(JsonlBackend(tmp_path / "log"), every=untyped(wrong))
