"""Torchmetrics objects are updated with each batch and computed for the epoch; each of several values gets a series."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    EpochEnd,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    EarlyStopping,
    LearningRate,
    LogMetrics,
    Metric,
    Metrics,
    Scheduler,
    reduce_on_plateau,
)
from flowtrain.logging import JsonlBackend
from flowtrain.testing import assert_equivalent
from flowtrain_dask import DaskExecutor
from tests.support.logs import log_fields, log_records

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torchmetrics warns about what it finds installed
    import torchmetrics
    from torchmetrics import classification, regression, wrappers

Pair = tuple[torch.Tensor, torch.Tensor]
CLASSES = 3


def classes(sizes: list[int], seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in sizes]


def numbers(sizes: list[int], seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)) for n in sizes]


class Flat(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's own name
        return super().forward(input).squeeze(1)


def classifier(*callbacks: Callback, train: list[Pair], valid: list[Pair], **options: Any) -> Learner:
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=0.1)
    data = (train, valid)
    kind: dict[str, Any] = {"model": torch.nn.Linear(4, CLASSES), "lossfn": F.cross_entropy}
    if train[0][1].is_floating_point():
        kind = {"model": Flat(4, 1), "lossfn": F.mse_loss}
    return Learner(**kind, data=data, optimizer=sgd, callbacks=callbacks, default_callbacks="quiet", **options)


def by_hand(metric: Any, learner: Learner, data: list[Pair]) -> Any:
    metric = metric.clone()
    for inputs, targets in data:
        metric.update(learner.model(inputs).detach(), targets)
    return metric.compute()


def last(learner: Learner, name: str, phase: type[Phase] = ValidationPhase) -> Any:
    return learner.cbstate.metrics_epoch[phase][name].last()


def f1(**options: Any) -> Any:
    return classification.MulticlassF1Score(CLASSES, **options)


# --- when they are computed


class Counting(torchmetrics.Metric):
    """A torchmetrics object that counts its updates and computations, over all of its clones."""

    full_state_update = False
    updates: list[int]
    computations: list[float]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", default=[], dist_reduce_fx="cat")

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        Counting.updates.append(len(targets))
        self.seen.append(outputs)  # type: ignore[operator,union-attr]  # add_state made it

    def compute(self) -> torch.Tensor:
        seen: Any = self.seen
        value = torch.tensor(float(sum(len(each) for each in seen)))
        Counting.computations.append(value.item())
        return value


@pytest.mark.parametrize("on_step", [False, True])
def test_an_update_for_each_batch_and_a_computation_for_each_epoch(on_step: bool) -> None:
    metrics = Metrics(Metric(Counting(), on_step=on_step))
    Counting.updates, Counting.computations = [], []
    learner = classifier(metrics, train=classes([8, 3]), valid=classes([5, 5]))
    learner.fit(2)
    if on_step:
        assert Counting.updates == [8, 8, 3, 3, 5, 5, 5, 5] * 2
        assert Counting.computations == [8, 3, 11, 5, 5, 10] * 2
        assert learner.cbstate.metrics_step[TrainingPhase]["Counting"].values == [8, 3] * 2
    else:
        assert Counting.updates == [8, 3, 5, 5] * 2
        assert Counting.computations == [11, 10] * 2
        assert list(learner.cbstate.metrics_step[TrainingPhase]) == ["Loss"]
    assert list(learner.cbstate.metrics_epoch[TrainingPhase]["Counting"]) == [(1, 11), (2, 11)]
    assert list(learner.cbstate.metrics_epoch[ValidationPhase]["Counting"]) == [(1, 10), (2, 10)]
    # The object keeps no outputs between epochs, neither in memory nor in a checkpoint.
    parts = [part for *_, parts, _updates in metrics.state_dict()["held"] for part in parts]
    assert all(state == {"seen": []} or not state for state, _plain in parts)


@pytest.mark.cpu_only("the expected value is computed on the CPU")
@pytest.mark.parametrize("on_step", [False, True])
def test_a_metric_that_one_sample_alone_does_not_have(on_step: bool) -> None:
    r2 = regression.R2Score()
    valid = numbers([8, 8, 1], seed=1)
    learner = classifier(Metrics(Metric(r2, on_step=on_step)), train=numbers([8, 1]), valid=valid)
    learner.fit(2)
    assert last(learner, "R2Score") == (2, by_hand(r2, learner, valid).item())
    if on_step:
        values = learner.cbstate.metrics_step[ValidationPhase]["R2Score"].values[-3:]
        assert values[:2] == [by_hand(r2, learner, [batch]).item() for batch in valid[:2]]
        assert math.isnan(values[2])


def test_an_error_of_an_update_is_not_taken_for_a_value_that_is_not_there() -> None:
    metric = Metric(classification.MulticlassAccuracy(7), on_step=True)
    learner = classifier(Metrics(metric), train=classes([8]), valid=classes([8]))
    with pytest.raises((ValueError, RuntimeError)):
        learner.fit(1)


@pytest.mark.parametrize(
    ("cancels", "seen"),
    [
        ({2: CancelBatchException}, [(1, 6.0), (2, 11.0)]),
        ({2: CancelEpochException}, [(1, 4.0), (2, 11.0)]),
        ({1: CancelEpochException}, [(2, 11.0)]),
        ({5: CancelFittingException}, [(1, 11.0)]),
    ],
)
def test_cancelled_batches_and_epochs(cancels: dict[int, type[Exception]], seen: list[tuple[int, float]]) -> None:
    count: list[int] = []

    def cancel(learner: LearnerView) -> None:
        count.append(1)
        if len(count) in cancels:
            raise cancels[len(count)]("on purpose")

    Counting.updates, Counting.computations = [], []
    callback = CustomCallback(cancel, BatchBegin, TrainingPhase)
    learner = classifier(callback, Metrics(Counting()), train=classes([4, 5, 2]), valid=classes([4]))
    learner.fit(2)
    series = learner.cbstate.metrics_epoch[TrainingPhase]
    assert (list(series["Counting"]) if "Counting" in series else []) == seen
    if learner.stopped is not None:  # the batches of the cancelled epoch do not count in the next one
        learner.fit(1)
        assert last(learner, "Counting", TrainingPhase) == (2, 11.0)


class Own:
    """An accumulator of a user that is no torchmetrics object: it has neither `clone` nor `state_dict`."""

    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.sizes: list[int] = []

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.total = self.total + outputs.sum()
        self.sizes.append(len(outputs))

    def compute(self) -> torch.Tensor:
        return self.total / sum(self.sizes)

    def reset(self) -> None:
        self.total, self.sizes = torch.zeros(()), []


def collection() -> Any:
    parts = [classification.MulticlassPrecision(CLASSES), classification.MulticlassRecall(CLASSES), f1(average=None)]
    return torchmetrics.MetricCollection([*parts, classification.MulticlassAUROC(CLASSES)], prefix="My")


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (f1, classes),
        (partial(f1, average=None), classes),
        (collection, classes),
        (lambda: classification.MulticlassAUROC(CLASSES), classes),
        (lambda: wrappers.ClasswiseWrapper(f1(average=None), labels=["a", "b", "c"]), classes),
        (lambda: wrappers.Running(torchmetrics.MeanMetric(), window=3), numbers),
        (lambda: wrappers.MinMaxMetric(regression.MeanSquaredError()), numbers),
        (lambda: wrappers.BootStrapper(regression.R2Score(), 3, sampling_strategy="multinomial"), numbers),
        (lambda: regression.MeanSquaredError() + regression.MeanAbsoluteError(), numbers),
        (regression.R2Score, numbers),
        (regression.PearsonCorrCoef, numbers),
        (regression.SpearmanCorrCoef, numbers),
        (Own, numbers),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.filterwarnings("ignore:No positive samples", "ignore:Metric `SpearmanCorrcoef` will save all")
def test_a_fit_resumed_in_the_middle_of_an_epoch(
    make: Callable[[], Any], data: Callable[..., list[Pair]], step: int, tmp_path: Path
) -> None:
    def learner_of(folder: str) -> Learner:
        metrics = Metrics(make() if make is collection else Metric(make(), name="M", on_step=True))
        save = Checkpointer(tmp_path / folder, every_steps=1)
        return classifier(metrics, save, train=data([5, 4, 6]), valid=data([3, 2], seed=1))

    def result(learner: Learner) -> Any:
        return {
            (entry, repr(phase), name): list(series)
            for entry in ("metrics_step", "metrics_epoch")
            for phase in (TrainingPhase, ValidationPhase)
            for name, series in getattr(learner.cbstate, entry)[phase].items()
        }

    whole = learner_of("whole")
    whole.fit(2)
    stopped = learner_of("stopped")
    count: list[int] = []

    def stop(learner: LearnerView) -> None:
        count.append(1)
        if len(count) == step:
            raise CancelFittingException

    stopped.add_callback(CustomCallback(stop, BatchEnd, TrainingPhase))
    stopped.fit(2)
    resumed = learner_of("stopped")
    resumed.fit(2, resume=tmp_path / "stopped" / f"step-{step:08d}.ckpt")
    assert str(result(resumed)) == str(result(whole))  # compared as text, because NaN does not equal itself


# --- several values


def test_one_number_for_each_class() -> None:
    valid = classes([8, 5], seed=1)
    per_class = f1(average=None)
    wrapped = wrappers.ClasswiseWrapper(f1(average=None), labels=["cat", "dog", "owl"])
    recall = classification.MulticlassRecall(CLASSES, average=None)
    both = torchmetrics.MetricCollection({"Recall": recall, "Wrapped": wrapped})
    metrics = Metrics(
        Metric(per_class, name="F1"), Metric(per_class, name="Named", labels=["cat", "dog", "owl"], on_step=True), both
    )
    learner = classifier(metrics, train=classes([8]), valid=valid)
    learner.fit(2)
    assert list(learner.cbstate.metrics_epoch[ValidationPhase]) == [
        "Loss", "F1.0", "F1.1", "F1.2", "Named.cat", "Named.dog", "Named.owl", "Recall.0", "Recall.1", "Recall.2",
        "Wrapped.multiclassf1score_cat", "Wrapped.multiclassf1score_dog", "Wrapped.multiclassf1score_owl",
    ]  # fmt: skip
    for number, (name, value) in enumerate(zip(("cat", "dog", "owl"), by_hand(per_class, learner, valid), strict=True)):
        for series in (f"F1.{number}", f"Named.{name}", f"Wrapped.multiclassf1score_{name}"):
            assert last(learner, series) == (2, value.item())
    of_batches = learner.cbstate.metrics_step[ValidationPhase]
    assert list(of_batches) == ["Loss", "Named.cat", "Named.dog", "Named.owl"]
    assert of_batches["Named.dog"].last() == (4, by_hand(per_class, learner, valid[1:])[1].item())


def spread(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """Return the least and the greatest output, and a third value only for batches of more than four."""
    found: dict[str, Any] = {"least": outputs.min(), "greatest": {"of": outputs.max()}}
    return found | ({"large": float(len(outputs))} if len(outputs) > 4 else {})


def test_a_function_that_returns_a_mapping() -> None:
    valid = classes([8, 2, 5], seed=1)
    learner = classifier(Metrics(spread), train=classes([8]), valid=valid)
    learner.fit(1)
    outputs = [learner.model(inputs) for inputs, _ in valid]
    assert list(learner.cbstate.metrics_epoch[ValidationPhase]) == [
        "Loss", "Spread.least", "Spread.greatest.of", "Spread.large",
    ]  # fmt: skip
    expected = sum(len(each) * each.min().item() for each in outputs) / 15
    assert last(learner, "Spread.least") == (1, pytest.approx(expected))
    assert last(learner, "Spread.large") == (1, pytest.approx((8 * 8 + 5 * 5) / 13))
    assert learner.cbstate.metrics_step[ValidationPhase]["Spread.large"].steps == [1, 3]


def test_those_who_watch_a_metric_watch_one_of_its_values(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0])

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"cat": next(values), "dog": 1.0}

    lines = JsonlBackend(tmp_path / "log.jsonl")
    with classifier(
        Metrics(Metric(score, phase=ValidationPhase, mode="min")),
        EarlyStopping(patience=2, monitor="Score.cat"),
        Checkpointer(tmp_path, keep_top_k=1, monitor="Score.cat"),
        Scheduler({LearningRate: reduce_on_plateau(1.0, monitor="Score.cat", patience=0, factor=0.5)}),
        LogMetrics(lines),
        train=classes([8]),
        valid=classes([8]),
    ) as learner:
        learner.fit(5)
    assert "Score.cat is 2; its best value was 1, in epoch 2" in str(learner.stopped)
    assert sorted(each.name for each in tmp_path.glob("*.ckpt")) == ["epoch-0002.ckpt", "epoch-0004.ckpt"]
    assert learner.cbstate.hyperparams["LearningRate"].values == [1.0, 1.0, 1.0, 0.5]
    records = log_records(tmp_path / "log.jsonl")
    found = [(each["step"], each["value"]) for each in records if each["name"] == "Score.cat"]
    assert found[1::2] == [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0)]  # one batch in each epoch


@pytest.mark.parametrize("kind", ["EarlyStopping", "Checkpointer"])
def test_who_watches_a_metric_that_has_several_values_is_told_which(kind: str, tmp_path: Path) -> None:
    stops = EarlyStopping(patience=2, monitor="F1")
    watches = stops if kind == "EarlyStopping" else Checkpointer(tmp_path, monitor="F1")
    learner = classifier(
        Metrics(Metric(f1(average=None), name="F1")),
        watches,
        train=classes([8]),
        valid=classes([8]),
    )
    with pytest.raises(UsageError, match=r"'F1' of Val.*; F1 has several values: F1\.0, .*2\. Write monitor='F1\.0'"):
        learner.fit(1)


class Watch(Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def state_access(self) -> Access:
        return {self.path: Read()}

    @on(EpochEnd)
    def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        pass


def test_who_reads_batches_of_one_without_is_told() -> None:
    batches, watch = classes([8]), Watch("cbstate.metrics_step.F1")
    with pytest.raises(MissingStateError, match=r"F1 is computed at the end of an epoch\. For a value .* on_step=True"):
        classifier(Metrics(Metric(f1(), "F1")), watch, train=batches, valid=batches)
    metrics = Metrics(Metric(f1(), "F1", on_step=True))
    assert classifier(metrics, watch, train=batches, valid=batches).callbacks


def test_a_matrix_is_refused_at_the_first_value_where_it_was_not_known() -> None:
    def matrix(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.T @ outputs

    learner = classifier(Metrics(matrix), train=classes([8]), valid=classes([8]))
    with pytest.raises(UsageError, match=r"^The metric Matrix returned a tensor of shape \(3, 3\); .* a mapping"):
        learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].steps == 1


class Reader(Callback):
    """Reads one of several values as a deferrable callback, and keeps it."""

    deferrable = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def state_access(self) -> Access:
        return {"cbstate.metrics_epoch.F1": Read(), "cbstate.metrics_step.Spread.least": Read()}

    @on(EpochEnd, ValidationPhase)
    def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        epochs = learner.cbstate.metrics_epoch[phase]
        self.seen.append({name: epochs[name].last() for name in epochs})
        self.seen.append(learner.cbstate.metrics_step[phase]["Spread.least"].last())


def test_the_results_do_not_depend_on_the_executor(tmp_path: Path) -> None:
    files: list[Path] = []

    def make(executor: Any) -> Learner:
        files.append(tmp_path / f"{len(files)}.jsonl")
        metrics = Metrics(spread, Metric(f1(average=None), name="F1", on_step=True))
        callbacks = [metrics, Reader(), LogMetrics(JsonlBackend(files[-1]))]
        return classifier(*callbacks, train=classes([8, 4, 3]), valid=classes([5, 2], seed=1), executor=executor)

    always = partial(DaskExecutor, defer="always", parallel="always")
    assert_equivalent(make, executors=["dask", always], interleavings=2, ignore=["callbacks.LogMetrics.backends"])
    serial, *others = (log_fields(file, "name", "group", "step", "value") for file in files)
    assert len(serial) == 2 * (3 + 2) * 7 - 2 * 3 + 2 * 2 * 7  # small batches give no "Spread.large"
    assert all(other == serial for other in others)
