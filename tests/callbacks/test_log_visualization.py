"""LogVisualization: logs the image that a function returns, under a name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from flowtrain import (
    AccessError,
    BatchEnd,
    EpochEnd,
    LearnerView,
    ProtectedException,
    Read,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.callbacks import LogVisualization
from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, Image, JsonlBackend, Text, Value
from flowtrain.testing import tiny_learner
from tests.support.logs import log_fields
from tests.support.untyped import untyped


def misclassified(learner: LearnerView) -> Any:
    wrong = (learner.batch.outputs - learner.batch.targets).abs() > 1
    return {f"{place}": Image(learner.batch.inputs[place].reshape(1, 1)) for place in wrong.nonzero()[:2, 0].tolist()}


def test_images_by_name(tmp_path: Path) -> None:
    callback = LogVisualization(misclassified, JsonlBackend(tmp_path / "log"), every=1, phase_type=TrainingPhase)
    with tiny_learner(callback, n_batches=2) as learner:
        learner.fit(1)
    found = log_fields(tmp_path / "log", "group", "name", "step", "value")
    assert {(group, step) for group, _, step, _ in found} == {("Step/TrainingPhase", 1), ("Step/TrainingPhase", 2)}
    assert all(name.startswith("Misclassified/") for _, name, _, _ in found)
    assert all((tmp_path / value).read_bytes().startswith(b"\x89PNG") for *_, value in found)


def test_one_several_or_none_at_any_event(tmp_path: Path) -> None:
    results = iter([Value(1), [Value(2), Text("three")], None])
    callback = LogVisualization(
        lambda learner: next(results),
        JsonlBackend(tmp_path / "log"),
        CsvBackend(tmp_path / "v"),
        every=1,
        access={},
        phase_type=ValidationPhase,
        event_type=EpochEnd,
    )
    with tiny_learner(callback, n_batches=1) as learner:
        learner.fit(3)
    assert log_fields(tmp_path / "log", "group", "name", "step", "value") == [
        ("Epoch/ValidationPhase", "Visualization", 1, 1),
        ("Epoch/ValidationPhase", "Visualization/0", 2, 2),
        ("Epoch/ValidationPhase", "Visualization/1", 2, "three"),
    ]
    assert (tmp_path / "v").read_text("utf-8").splitlines()[0] == "group,step,Visualization,Visualization/0"


def test_every_counts_by_phase(tmp_path: Path) -> None:
    callback = LogVisualization(
        lambda learner: Value(0), JsonlBackend(tmp_path / "log"), every=3, name="Zero", access={}
    )
    with tiny_learner(callback, n_batches=4) as learner:
        learner.fit(2)
    assert log_fields(tmp_path / "log", "group", "name", "step", "value") == [
        ("Step/TrainingPhase", "Zero", 3, 0),
        ("Step/ValidationPhase", "Zero", 3, 0),
        ("Step/TrainingPhase", "Zero", 6, 0),
        ("Step/ValidationPhase", "Zero", 6, 0),
    ]


def test_it_declares_what_it_is_told_and_pickles(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    callback = LogVisualization(misclassified, backend, access={"batch.loss": Read()})
    assert callback.state_access().keys() == {"batch.loss", "cbstate.history"}
    assert LogVisualization(misclassified, backend).state_access().keys() == {
        "batch",
        "cbstate.history",
    }
    assert callback.deferrable
    callback = LogVisualization(repr, backend)
    assert pickle.loads(pickle.dumps(callback)).label == "Repr"
    with pytest.raises(ProtectedException, match=r"Read access to Learner\.model disallowed") as caught:
        tiny_learner(LogVisualization(lambda learner: learner.model, backend, every=1)).fit(1)
    assert str(caught.value).endswith(
        'LogVisualization was given access to {"batch": Read()}. Pass it what its function touches:\n\n'
        '    LogVisualization(..., access={"batch": Read(), "model": Read()})\n'
    )
    with pytest.raises(AccessError, match=r"^LogVisualization\(access=\.\.\.\) is \['batch'\], which is neither Read"):
        tiny_learner(LogVisualization(repr, backend, access=untyped(["batch"])))


def test_mistakes(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    with pytest.raises(LoggingError, match=r"takes a function of the learner first, then backends"):
        LogVisualization(untyped(backend))
    with pytest.raises(LoggingError, match=r"where a subclass of Phase belongs"):
        LogVisualization(misclassified, backend, phase_type=untyped(BatchEnd))
    with (
        tiny_learner(LogVisualization(lambda learner: {"x": 3}, backend, every=1)) as learner,
        pytest.raises(LoggingError, match=r"LogVisualization\(Visualization\) logs 3 as 'Visualization/x', which is"),
    ):
        learner.fit(1)
