"""The findings of a learner, and what is computed from findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import BatchEnd, Callback, EpochEnd, LearnerView, Phase, Read, TrainingPhase, ValidationPhase, on
from flowtrain.callbacks import Metrics, Timer
from flowtrain.diagnostics.report.findings import Epoch, Findings, Points, epochs, named, of_learner, parts_of_step
from flowtrain.learner import Learner
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor


class Watch(Callback):
    """Reads the metrics."""

    @on(EpochEnd, access={"cbstate.metrics_epoch": Read()})
    def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Do nothing."""


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = tiny_learner(Timer(), Watch(), Metrics(mean_absolute_error), n_batches=4)
    learner.fit(2)
    return learner


def findings(learner: Learner) -> Findings:
    return of_learner(learner.state, learner.executor)


def test_a_learner_shows_its_series_counts_and_settings(learner: Learner) -> None:
    found, history = findings(learner), learner.history
    assert found.notes == []
    assert found.series["Epoch/ValidationPhase", "Loss"].values == history[ValidationPhase]["Loss"].values
    steps = learner.cbstate.metrics_step[TrainingPhase]["MeanAbsoluteError"]
    assert found.series["Step/TrainingPhase", "MeanAbsoluteError"] == Points([*range(1, 9)], steps.values)
    assert found.counts == {"TrainingPhase": (2, 8, 8), "ValidationPhase": (2, 8, 0)}
    assert found.settings["Model"] == {"Numbers in the model, buffers included": "1"}
    assert found.settings["Optimizer: SGD, group 0"]["lr"] == "0.1"
    assert "foreach" not in found.settings["Optimizer: SGD, group 0"], "it is None"
    assert found.callbacks == ["Timer", "Watch", "Metrics", "Recorder", "StopOnNaNLoss"]
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) == {"flowtrain", "torch", "Python", "system"}


def test_each_event_has_one_picture_for_the_phases_of_one_order(learner: Learner) -> None:
    pictures = {picture.title: picture for picture in findings(learner).pictures}
    assert {"EpochBegin, TrainingPhase", "EpochBegin, ValidationPhase"} <= pictures.keys(), "only one stops on NaN"
    end = pictures["EpochEnd, TrainingPhase"]
    assert "BatchBegin, TrainingPhase and ValidationPhase" in pictures
    assert "Watch.look" in end.text
    assert "after Metrics: Metrics writes cbstate.metrics_epoch" in end.text
    assert end.svg.startswith(b"<svg ")
    assert set(learner.callbacks.known) >= {(BatchEnd, TrainingPhase), (EpochEnd, ValidationPhase)}


def test_measured_times_of_handlers_are_a_table_with_the_longest_first(tmp_path: Path) -> None:
    learner = tiny_learner(Watch(), n_batches=4)
    assert findings(learner).times == {}
    learner.fit(2, timeline=tmp_path / "timeline.json")
    [(heading, [head, *lines])] = findings(learner).times.items()
    assert (heading, head) == ("Time by callback, the longest first", ["event", "handler", "ms a call"])
    assert ["EpochEnd, TrainingPhase", "Watch.look"] in [line[:2] for line in lines]
    times = [float(line[2].replace(",", "")) for line in lines]
    assert times == sorted(times, reverse=True)


def test_a_report_leaves_the_plans_as_they_are(learner: Learner) -> None:
    before = learner.callbacks.explain()
    findings(learner)
    assert learner.callbacks.explain() == before


def test_a_learner_that_was_not_trained_says_so() -> None:
    found = findings(tiny_learner())
    assert found.notes == ["The learner has not been trained yet: there are no metrics and no times."]
    assert found.pictures, "its callbacks are known"


def test_traces_that_are_no_numbers_are_left_out() -> None:
    learner = tiny_learner(Timer(), n_batches=2)
    learner.fit(1)
    traces: Any = learner.cbstate.tracehistory[TrainingPhase]
    traces.push("Norms", torch.ones(3), 1)
    assert findings(learner).series.get(("Step/TrainingPhase", "Norms")) is None


def test_several_models_and_optimizers_have_their_names() -> None:
    learner = Learner(
        {"gen": torch.nn.Linear(2, 3), "disc": torch.nn.BatchNorm1d(4)},
        torch.nn.functional.mse_loss,
        optimizer={"gen": torch.optim.Adam, "disc": lambda params: torch.optim.SGD(params, lr=0.5)},
        default_callbacks=False,
    )
    found = findings(learner)
    assert found.settings["Model"] == {
        "Numbers in gen, buffers included": "9",
        "Numbers in disc, buffers included": "17",
    }
    assert found.settings["Optimizer gen: Adam, group 0"]["betas"] == "(0.9, 0.999)"
    assert found.settings["Optimizer disc: SGD, group 0"]["lr"] == "0.5"
    assert found.pictures == []


def test_the_report_of_an_executor_with_lanes_is_part_of_it() -> None:
    with tiny_learner(Watch(), executor=DaskExecutor(parallel="never"), n_batches=2) as learner:
        learner.fit(1)
        found = findings(learner)
    assert found.texts == {"Executor dask: where callbacks run, what waits, and stalls": "no deferred callbacks"}


def test_a_closed_learner_can_still_be_shown() -> None:
    with tiny_learner(n_batches=2) as learner:
        learner.fit(1)
    assert findings(learner).counts == {"TrainingPhase": (1, 2, 2), "ValidationPhase": (1, 2, 0)}


def test_the_longer_of_two_series_is_kept() -> None:
    found = Findings("a")
    assert found.add({("Epoch/A", "Loss"): Points([1], [2.0]), ("Epoch/A", "Empty"): Points()}) == 1
    assert found.add({("Epoch/A", "Loss"): Points([1], [3.0])}) == 0
    assert found.add({("Epoch/A", "Loss"): Points([1, 2], [3.0, 4.0])}) == 1
    assert found.series == {("Epoch/A", "Loss"): Points([1, 2], [3.0, 4.0])}


def test_epochs_join_the_metrics_and_keep_evaluations_apart() -> None:
    found = Findings("a")
    found.add({
        ("Epoch/Train", "Loss"): Points([1, 2], [3.0, 2.0], [10.0, 20.0]),
        ("Epoch/Valid", "Loss"): Points([0, 1, 1, 2], [9.0, 4.0, 4.5, 3.0]),
        ("Epoch/Valid", "Accuracy"): Points([1, 1], [0.5, 0.25]),
        ("Step/Train", "Loss"): Points([1], [5.0]),
    })  # fmt: skip
    assert epochs(found) == [
        Epoch(0, "Valid", {"Loss": 9.0}, None),
        Epoch(1, "Train", {"Loss": 3.0}, 10.0),
        Epoch(1, "Valid", {"Loss": 4.0, "Accuracy": 0.5}, None),
        Epoch(1, "Valid", {"Loss": 4.5, "Accuracy": 0.25}, None),
        Epoch(2, "Train", {"Loss": 2.0}, 20.0),
        Epoch(2, "Valid", {"Loss": 3.0}, None),
    ]


def test_the_parts_of_a_batch_are_those_that_a_timer_has_measured() -> None:
    found = Findings("a")
    assert parts_of_step(found) == []
    found.add({("Step/Train", "Time.Data"): Points([1, 2, 3], [0.001, 0.003, 0.002])})
    assert parts_of_step(found)[1:] == [["Train", "waiting for data", "3", "0.01", "2.000", "2.000", "3.000"]]


def test_a_callback_has_its_type_beside_a_name_of_its_own() -> None:
    assert (named("Timer", "Timer"), named("Timer_2", "Timer")) == ("Timer", "Timer_2 (Timer)")
