"""An evaluation belongs to the training epoch before it: additional ones do not shift later steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowtrain import (
    CancelEpochException,
    EpochEnd,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    StepContext,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    EarlyStopping,
    LearningRate,
    LogMetrics,
    LogVisualization,
    Metric,
    Metrics,
    MetricsPrinter,
    Recorder,
    Scheduler,
    reduce_on_plateau,
)
from flowtrain.diagnostics.plots import curves
from flowtrain.logging import JsonlBackend, Value
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.fired import OODPhase
from tests.support.loaders import Failing
from tests.support.logs import log_records


def epochs(learner: Learner, phase: type[Phase], name: str = "Loss") -> list[int]:
    steps: list[int] = learner.cbstate.metrics_epoch[phase][name].steps
    return steps


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("*.ckpt"))


def data(training: int = 5) -> tuple[Any, Any]:
    return tiny_batches(n_batches=training), tiny_batches(n_batches=1)


def test_evaluations_before_and_between_fits(tmp_path: Path) -> None:
    lines = JsonlBackend(tmp_path / "log.jsonl")
    looks = LogVisualization(lambda learner: Value(1.0), lines, every=1, name="Look", access={}, event_type=EpochEnd)
    with tiny_learner(LogMetrics(lines), looks, Checkpointer(tmp_path), data=data()) as learner:
        learner.validate()
        learner.validate()
        assert files(tmp_path) == []
        learner.fit(1)
        assert files(tmp_path) == ["epoch-0001.ckpt"]
        learner.validate()
        learner.fit(2)
    assert epochs(learner, TrainingPhase) == [1, 2, 3]
    assert epochs(learner, ValidationPhase) == [0, 0, 1, 1, 2, 3]
    assert files(tmp_path) == ["epoch-0001.ckpt", "epoch-0002.ckpt", "epoch-0003.ckpt"]
    assert learner.cbstate.history[ValidationPhase].epochs == 6  # validation epochs are counted one by one
    records = log_records(tmp_path / "log.jsonl")
    for name in ("Loss", "Look"):
        found = [each for each in records if each["group"] == "Epoch/ValidationPhase" and each["name"] == name]
        assert [each["step"] for each in found] == [0, 0, 1, 1, 2, 3]
    recorder = learner.get_callback(Recorder)
    assert isinstance(recorder, Recorder)
    [curve] = [each for each in curves("Loss", learner.cbstate, recorder.ends) if each.phase == ValidationPhase()]
    assert curve.x == [0, 0, 5, 5, 10, 15]
    assert curve.y == learner.cbstate.metrics_epoch[ValidationPhase]["Loss"].values


def test_a_fit_by_steps_and_an_epoch_that_failed() -> None:
    """After a failed epoch an evaluation belongs to the last epoch that ended, and to the updates made so far."""
    learner = tiny_learner(data=data(12))
    learner.validate()
    learner.fit(steps=7, validate_every=4)
    with pytest.raises(ZeroDivisionError):
        learner.fit(1, data=(Failing(tiny_batches(n_batches=3)), tiny_batches(n_batches=1)))
    learner.validate()
    learner.fit(steps=2)
    assert epochs(learner, ValidationPhase) == [0, 1, 2, 2, 3]
    recorder = learner.get_callback(Recorder)
    assert isinstance(recorder, Recorder)
    [curve] = [each for each in curves("Loss", learner.cbstate, recorder.ends) if each.phase == ValidationPhase()]
    assert curve.x == [0, 4, 7, 10, 12]


def test_several_phases_that_evaluate_share_the_epochs_of_training() -> None:
    learner = tiny_learner(data={phase: tiny_batches() for phase in (TrainingPhase, ValidationPhase, OODPhase)})
    learner.epoch(OODPhase)
    learner.fit(1)
    learner.epoch(OODPhase)
    learner.fit(1)
    assert (epochs(learner, ValidationPhase), epochs(learner, OODPhase)) == ([1, 2], [0, 1, 1, 2])


def test_a_phase_of_ones_own_that_updates_trains() -> None:
    class Own(Phase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                batch.loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
                learner.backward(self, batch.loss)
                learner.update(self)

    learner = tiny_learner(data={Own: tiny_batches(), ValidationPhase: tiny_batches()})
    learner.epoch(ValidationPhase)
    learner.fit(2)
    assert (epochs(learner, Own), epochs(learner, ValidationPhase)) == ([1, 2], [0, 1, 2])


def test_a_further_evaluation_is_no_epoch_for_those_that_count_them(tmp_path: Path) -> None:
    def fit(*between: str) -> tuple[list[float], Any, list[str]]:
        plan = reduce_on_plateau(1.0, monitor="Score", mode="min", patience=1, factor=0.5)
        # The score depends on the number of training epochs: each of them gets its value, however many evaluations run.
        values = {0: 9.0, 1: 4.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 3.0, 6: 3.0}
        metric = Metric(lambda o, t: values[learner.cbstate.history[TrainingPhase].epochs], "Score", ValidationPhase)
        folder = tmp_path / str(len(between))
        learner = tiny_learner(
            Metrics(metric),
            Scheduler({LearningRate: plan}),
            EarlyStopping(patience=3, monitor="Score", mode="min"),
            Checkpointer(folder, every=2, monitor="Score", mode="min"),
            data=data(1),
        )
        for _ in range(6):
            for _ in between:
                learner.validate()
            if learner.stopped is None:
                learner.fit(1)
        return learner.cbstate.hyperparams["LearningRate"].values, str(learner.stopped), files(folder)

    plain = fit()
    assert plain[0] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert "after epoch 5 of ValidationPhase" in plain[1]
    assert plain[2] == [f"epoch-000{number}.ckpt" for number in range(1, 6)], "each of them is the last of its fit"
    assert fit("before") == plain
    assert fit("before", "and again") == plain


def test_a_checkpoint_after_an_evaluation_is_still_resumed(tmp_path: Path) -> None:
    def make() -> Learner:
        return tiny_learner(Checkpointer(tmp_path / "a"), data=data())

    whole = tiny_learner(data=data())
    whole.validate()
    whole.fit(4)
    first = make()
    first.validate()
    first.fit(2)
    first.validate()  # writes no checkpoint: a fit could not resume from one that lies outside of a fit
    second = make()
    second.fit(4, resume=tmp_path / "a")
    assert list(second.cbstate.metrics_epoch[ValidationPhase]["Loss"]) == list(
        whole.cbstate.metrics_epoch[ValidationPhase]["Loss"]
    )
    assert epochs(second, ValidationPhase) == [0, 1, 2, 3, 4]
    assert files(tmp_path / "a") == [f"epoch-000{number}.ckpt" for number in (1, 2, 3, 4)]
    second.load(tmp_path / "a" / "epoch-0003.ckpt")
    second.validate()
    assert epochs(second, ValidationPhase) == [0, 1, 2, 3, 3]


def test_a_line_has_the_number_of_the_training_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    cancelled: list[bool] = []

    def cancel(learner: LearnerView) -> None:
        if cancelled:
            raise CancelEpochException

    learner = tiny_learner(MetricsPrinter(), CustomCallback(cancel, LossBegin, ValidationPhase), data=data())
    learner.validate()
    learner.fit(1)
    learner.validate()
    lines = [" ".join(line.split()[:3]) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "epoch 0 ValidationPhase", "epoch 1 TrainingPhase", "epoch 1 ValidationPhase", "epoch 1 ValidationPhase",
    ]  # fmt: skip
    cancelled.append(True)
    learner.validate()  # without a batch there is no line, not even that of the evaluation before
    assert capsys.readouterr().out == ""
