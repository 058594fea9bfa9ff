"""LogHyperParams: it logs a hyperparameter when the value changes, and the settings once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowtrain import Access, BatchBegin, Callback, LearnerView, Phase, Read, TrainingPhase, Write, on
from flowtrain.callbacks import LogHyperParams
from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, JsonlBackend
from flowtrain.testing import tiny_learner
from tests.support.logs import log_fields


class Steps(Callback):
    """Sets the rate for every batch, and halves it at every second one."""

    def state_access(self) -> Access:
        return {"cbstate.hyperparams.LearningRate": Write(), "cbstate.history": Read()}

    @on(BatchBegin, TrainingPhase)
    def set(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        done = learner.cbstate.history[phase].steps
        learner.cbstate.hyperparams.push("LearningRate", 0.5 ** (done // 2), done + 1)


def logged(path: Path) -> list[tuple[Any, ...]]:
    assert set(log_fields(path, "group")) <= {("HyperParams",)}
    return log_fields(path, "name", "step", "value")


def test_a_value_is_logged_when_it_changes_and_the_settings_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    settings = {"batch_size": 8, "model": {"width": (1, 2)}}
    with tiny_learner(LogHyperParams(JsonlBackend(path), settings=settings), Steps(), n_batches=3) as learner:
        settings["batch_size"] = 9  # the argument of the constructor counts
        learner.fit(1)
        learner.fit(1)
    assert logged(path) == [
        ("Settings", 0, {"batch_size": 8, "model": {"width": [1, 2]}}),
        ("LearningRate", 1, 1.0),
        ("LearningRate", 3, 0.5),
        ("LearningRate", 5, 0.25),
    ]


def test_without_a_schedule_there_is_nothing_to_log(tmp_path: Path) -> None:
    callback = LogHyperParams(JsonlBackend(tmp_path / "log"))
    with tiny_learner(callback) as learner:
        learner.fit(1)
    assert logged(tmp_path / "log") == []
    assert sorted(handler.attribute for _, handler in callback.handlers()) == ["log_epoch", "log_step"]


def test_a_resumed_run_does_not_repeat_itself(tmp_path: Path) -> None:
    """Rule 28: the state holds the values that were logged."""
    first = LogHyperParams(JsonlBackend(tmp_path / "one"), settings={"a": 1})
    with tiny_learner(first, Steps(), n_batches=2) as learner:
        learner.fit(1)
    second = LogHyperParams(JsonlBackend(tmp_path / "two"), settings={"a": 1})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with tiny_learner(second, Steps(), n_batches=2) as learner:
        learner.fit(1)
    assert logged(tmp_path / "one") == [("Settings", 0, {"a": 1}), ("LearningRate", 1, 1.0)]
    assert logged(tmp_path / "two") == []


@pytest.mark.parametrize(("before", "expected"), [({"a": 1}, [("Settings", 0, {"a": 2})]), (True, [])])
def test_settings_that_have_changed_are_logged_again(before: Any, expected: list[Any], tmp_path: Path) -> None:
    """Early checkpoints say only that settings were logged, and not which ones."""
    callback = LogHyperParams(JsonlBackend(tmp_path / "log"), settings={"a": 2})
    callback.load_state_dict({"last": {}, "logged": before})
    with tiny_learner(callback, n_batches=2) as learner:
        learner.fit(1)
        learner.fit(1)
    assert logged(tmp_path / "log") == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([1], r"LogHyperParams\(settings=\.\.\.\) takes a mapping from names to values, and got \[1\]"),
        (
            {"f": {"g": len}},
            r"LogHyperParams\(settings=\.\.\.\)\['f'\]\['g'\] is <built-in function len>\. Set",
        ),
        ({1: 2}, r"LogHyperParams\(settings=\.\.\.\) has the name 1; names are texts\."),
    ],
)
def test_mistakes(settings: Any, message: str) -> None:
    with pytest.raises(LoggingError, match=message):
        LogHyperParams(JsonlBackend("log"), settings=settings)


def test_settings_need_a_backend_that_takes_them() -> None:
    with pytest.raises(LoggingError, match=r"settings=\.\.\.\) logs Settings, and CsvBackend\(.*\) takes Value\."):
        LogHyperParams(CsvBackend("v.csv"), settings={"a": 1})
    assert LogHyperParams(CsvBackend("v.csv"), JsonlBackend("log"), settings={"a": 1}).settings == {"a": 1}
