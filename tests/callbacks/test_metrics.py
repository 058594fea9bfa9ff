"""Metrics: values of batches and epochs, compared with an independent computation; what a batch counts in a mean."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
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
    LossBegin,
    MissingStateError,
    Phase,
    Read,
    ResolutionError,
    StepContext,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, CustomCallback, EarlyStopping, Metric, Metrics, Recorder
from flowtrain.metrics import accuracy, mean_absolute_error, top_k_accuracy
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.checkpoint.reading import find_file
from tests.support.examples import examples
from tests.support.fired import CancelAt
from tests.support.models import Scale
from tests.support.untyped import untyped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torchmetrics warns about what it finds installed
    import torchmetrics
    import torchmetrics.classification as tm

Pair = tuple[torch.Tensor, torch.Tensor]


def labelled(sizes: list[int], seed: int = 0) -> list[Pair]:
    """Return batches of the given sizes, with three features and three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def classifier(*callbacks: Callback, train: list[Pair], valid: list[Pair], lr: float = 0.1, **kwargs: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(
        torch.nn.Linear(3, 3),
        torch.nn.functional.cross_entropy,
        data=(train, valid),
        optimizer=partial(torch.optim.SGD, lr=lr),
        callbacks=callbacks,
        default_callbacks="quiet",
        **kwargs,
    )


def steps_of(learner: Learner, name: str, phase: type[Phase] = TrainingPhase) -> list[tuple[int, Any]]:
    return list(learner.cbstate.metrics_step[phase][name])


def epochs_of(learner: Learner, name: str, phase: type[Phase] = TrainingPhase) -> list[tuple[int, Any]]:
    return list(learner.cbstate.metrics_epoch[phase][name])


# --- values


def test_epoch_values_are_means_over_samples_also_with_a_smaller_last_batch() -> None:
    train, valid = labelled([8, 8, 3]), labelled([5, 1], seed=1)
    learner = classifier(Metrics(accuracy), train=train, valid=valid)
    learner.fit(1)

    torch.manual_seed(0)  # the same mean, computed by hand
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, right = [], 0
    for inputs, targets in train:
        outputs = model(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        right += int((outputs.argmax(1) == targets).sum())
    assert steps_of(learner, "Loss") == list(enumerate(losses, start=1))
    mean = (8 * losses[0] + 8 * losses[1] + 3 * losses[2]) / 19
    assert epochs_of(learner, "Loss") == [(1, pytest.approx(mean, abs=1e-12))]
    assert epochs_of(learner, "Accuracy") == [(1, pytest.approx(right / 19))]

    inputs, targets = torch.cat([x for x, _ in valid]), torch.cat([y for _, y in valid])
    outputs = model(inputs)
    whole = torch.nn.functional.cross_entropy(outputs, targets).item()
    assert epochs_of(learner, "Loss", ValidationPhase) == [(1, pytest.approx(whole))]
    assert epochs_of(learner, "Accuracy", ValidationPhase) == [(1, pytest.approx(accuracy(outputs, targets).item()))]


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
@settings(max_examples=examples(25))
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_mean_of_a_metric_over_any_batches_is_that_over_all_samples(sizes: list[int]) -> None:
    data = labelled(sizes)
    learner = classifier(Metrics(Metric(mean_of_outputs, name="Mean")), train=data, valid=data)
    learner.validate()
    whole = learner.model(torch.cat([inputs for inputs, _ in data])).mean().item()
    [(epoch, value)] = epochs_of(learner, "Mean", ValidationPhase)
    assert (epoch, value) == (0, pytest.approx(whole, abs=1e-6))


def mean_of_outputs(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.mean()


@settings(max_examples=examples(50))
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=4))
@example([math.inf, -math.inf])
@example([3.0e38, 3.0e38])
def test_no_value_breaks_the_mean(values: list[float]) -> None:
    left = iter(values)
    learner = tiny_learner(Metrics(Metric(lambda outputs, targets: next(left), name="Given")), n_batches=len(values))
    learner.epoch(ValidationPhase)
    [(_, mean)] = epochs_of(learner, "Given", ValidationPhase)
    expected = sum(values) / len(values)
    assert mean == pytest.approx(expected, nan_ok=True, rel=1e-6, abs=1e-30)


@pytest.mark.cpu_only("looks for the tensor of the loader itself")
@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        ({"x": torch.zeros(7, 1), "mask": torch.zeros(7)}, 7),
        ([torch.zeros(4, 1), torch.zeros(4, 9)], 4),
        (({"x": [torch.zeros(6, 1)]},), 6),
        ({"name": "a", "x": torch.zeros(5)}, 5),
        (torch.zeros(()), 1),
        (["one", "two", "three"], 3),
        ("one text", 1),
        (None, 1),
        ([], 1),
    ],
)
def test_the_weight_of_a_batch_is_the_length_of_its_first_tensor(inputs: Any, weight: int) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, inputs: Any) -> torch.Tensor:
            return self.scale * (10.0 if inputs is probe else 1.0)

    def first(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs

    probe = torch.zeros(1)
    data = [(inputs, torch.zeros(())), (probe, torch.zeros(()))]
    loaders = {ValidationPhase: data}
    learner = tiny_learner(Metrics(), model=Model(), lossfn=first, data=loaders)
    learner.validate()
    assert epochs_of(learner, "Loss", ValidationPhase) == [(0, pytest.approx((weight * 1.0 + 10.0) / (weight + 1)))]


def test_metrics_of_some_phases_only() -> None:
    data = labelled([4, 4])
    learner = classifier(Metrics(Metric(accuracy, phase=ValidationPhase)), train=data, valid=data)
    learner.fit(1)
    assert list(learner.cbstate.metrics_epoch[TrainingPhase]) == ["Loss"]
    assert list(learner.cbstate.metrics_epoch[ValidationPhase]) == ["Loss", "Accuracy"]


def test_step_numbers_go_on_over_epochs_and_without_cancelled_batches() -> None:
    learner = tiny_learner(CancelAt({2: CancelBatchException}), n_batches=3)
    learner.fit(2)
    assert [step for step, _ in steps_of(learner, "Loss")] == [1, 2, 3, 4, 5]
    losses = [value for _, value in steps_of(learner, "Loss")]
    assert epochs_of(learner, "Loss") == [
        (1, pytest.approx(sum(losses[:2]) / 2)),
        (2, pytest.approx(sum(losses[2:]) / 3)),
    ]


def test_an_epoch_without_a_completed_batch_records_nothing() -> None:
    cancels: dict[int, type[Exception]] = {1: CancelBatchException, 2: CancelEpochException}
    data = labelled([4, 4])
    metrics = Metrics(accuracy)
    learner = classifier(CancelAt(cancels), metrics, train=data, valid=data)
    learner.fit(2)
    assert [epoch for epoch, _ in epochs_of(learner, "Loss")] == [2]
    assert [epoch for epoch, _ in epochs_of(learner, "Accuracy")] == [2]
    assert [epoch for epoch, _ in epochs_of(learner, "Loss", ValidationPhase)] == [1, 2]


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_an_epoch_after_one_that_ended_early_begins_anew() -> None:
    """The next epoch counts neither the batches of the cancelled epoch nor direct steps."""
    data = labelled([4, 4, 2])
    metric = tm.MulticlassAccuracy(3, average="micro")
    cancel = CancelAt({3: CancelFittingException})
    learner = classifier(cancel, Metrics(mean_of_outputs, metric), train=data, valid=data, lr=0.0)
    learner.fit(1)
    assert len(learner.cbstate.metrics_epoch[TrainingPhase]) == 0
    learner.step(TrainingPhase, data[0])
    learner.fit(1)
    outputs = learner.model(torch.cat([inputs for inputs, _ in data]))
    right = accuracy(outputs, torch.cat([targets for _, targets in data])).item()
    assert epochs_of(learner, "MulticlassAccuracy") == [(1, pytest.approx(right))]
    assert epochs_of(learner, "MeanOfOutputs") == [(1, pytest.approx(outputs.mean().item()))]


def test_a_phase_without_a_loss_or_outputs_records_what_there_is() -> None:
    class Looking(ValidationPhase):
        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0]):
                pass

    learner = tiny_learner(Metrics(mean_of_outputs), data={Looking: tiny_batches()})
    learner.validate()
    assert len(learner.cbstate.metrics_step[Looking]) == len(learner.cbstate.metrics_epoch[Looking]) == 0


# --- torchmetrics


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_torchmetrics_objects_give_their_own_result() -> None:
    train, valid = labelled([8, 8, 3]), labelled([6, 5], seed=3)
    f1 = tm.MulticlassF1Score(3, average="macro")
    kinds = {"Precision": tm.MulticlassPrecision, "Recall": tm.MulticlassRecall}
    both = torchmetrics.MetricCollection({name: f(3, average="macro") for name, f in kinds.items()}, prefix="My")
    learner = classifier(Metrics(Metric(f1, name="F1"), both), train=train, valid=valid)
    learner.fit(2)
    assert sorted(learner.cbstate.metrics_epoch[ValidationPhase]) == ["F1", "Loss", "MyPrecision", "MyRecall"]
    # Compute the validation of the last epoch again, with the final parameters.
    expected_f1, expected = f1.clone(), both.clone()
    for inputs, targets in valid:
        expected_f1.update(learner.model(inputs), targets)
        expected.update(learner.model(inputs), targets)
    (_, newest) = epochs_of(learner, "F1", ValidationPhase)[-1]
    assert newest == expected_f1.compute().item()
    for name, value in expected.compute().items():
        assert epochs_of(learner, name, ValidationPhase)[-1] == (2, value.item())
    # These metrics are not means over batches: the mean of the batch values is another number.
    batches = [f1(learner.model(inputs), targets).item() for inputs, targets in valid]
    assert newest != pytest.approx((6 * batches[0] + 5 * batches[1]) / 11)
    assert list(learner.cbstate.metrics_step[ValidationPhase]) == ["Loss"]


def test_torchmetrics_objects_are_cloned_for_each_phase_and_reset_for_each_epoch() -> None:
    train, valid = labelled([4, 4]), labelled([4], seed=1)

    class Samples(torchmetrics.Metric):
        """A metric that counts the samples that it has seen."""

        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("seen", default=torch.zeros(()), dist_reduce_fx="sum")

        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            self.seen: torch.Tensor = self.seen + len(targets)

        def compute(self) -> torch.Tensor:
            return self.seen

    users = Samples()
    users.update(torch.zeros(100), torch.zeros(100))  # the user's own object does not feed the recorded values
    learner = classifier(Metrics(Metric(users, on_step=True)), train=train, valid=valid)
    learner.fit(2)
    assert epochs_of(learner, "Samples") == [(1, 8.0), (2, 8.0)]
    assert epochs_of(learner, "Samples", ValidationPhase) == [(1, 4.0), (2, 4.0)]
    assert steps_of(learner, "Samples") == [(1, 4.0), (2, 4.0), (3, 4.0), (4, 4.0)]
    assert users.compute() == 100


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_two_collections_keep_apart() -> None:
    data = labelled([8, 8])
    kinds = tm.MulticlassPrecision, tm.MulticlassRecall
    one, two = (torchmetrics.MetricCollection([kind(3, average="macro")]) for kind in kinds)
    learner = classifier(Metrics(one, two), train=data, valid=data)
    learner.validate()
    for collection in (one, two):
        for inputs, targets in data:
            collection.update(learner.model(inputs), targets)
        [(name, value)] = collection.compute().items()
        assert epochs_of(learner, name, ValidationPhase) == [(0, value.item())]


def test_no_graph_is_kept() -> None:
    """Neither recorded values nor a torchmetrics object that keeps outputs may keep the graph of a batch."""
    kept: list[torch.Tensor] = []

    class Keeping(torchmetrics.Metric):
        """A metric that keeps its inputs for the whole epoch, as metrics over curves do."""

        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("outputs", default=[], dist_reduce_fx="cat")

        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            kept.append(outputs)
            self.outputs.append(outputs)  # type: ignore[operator,union-attr]  # add_state made it

        def compute(self) -> torch.Tensor:
            return torch.zeros(())

    graphs: list[weakref.ref[torch.Tensor]] = []

    class Watch(Callback):
        def state_access(self) -> Access:
            return {"batch.outputs": Read()}

        @on(LossBegin, TrainingPhase)
        def look(self, event: LossBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            assert learner.batch.outputs.grad_fn is not None
            graphs.append(weakref.ref(learner.batch.outputs))

    data = labelled([4, 4, 4])
    metrics = Metrics(Metric(lambda outputs, targets: outputs.sum(), name="Sum"), Keeping())
    learner = classifier(Watch(), metrics, train=data, valid=data)
    learner.epoch(TrainingPhase)
    gc.collect()
    assert [output.grad_fn for output in kept] == [None] * 3
    assert [graph() is None for graph in graphs] == [True, True, False]  # the learner still holds the last batch
    assert all(type(value) is float for name in ("Loss", "Sum") for _, value in steps_of(learner, name))


# --- beside other callbacks


def test_a_learner_refuses_a_second_metrics_callback() -> None:
    """Rule 8: two Metrics callbacks would record the loss twice, and no order of the two mends that."""
    with pytest.raises(ResolutionError, match=r"Metrics and Metrics#2 cannot be used together: .*Unresolvable\(\)"):
        tiny_learner(Metrics(accuracy), Metrics(mean_of_outputs))


def test_another_callback_can_write_a_series_beside_it() -> None:
    class Mine(Callback):
        def state_access(self) -> Access:
            return {"cbstate.metrics_step.Mine": Write(), "cbstate.history": Read()}

        @on(BatchEnd, TrainingPhase)
        def record(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            learner.cbstate.metrics_step[phase].push("Mine", 7.0, learner.cbstate.history[phase].steps)

    data = labelled([8, 3])
    learner = classifier(Mine(), Metrics(accuracy), train=data, valid=data, strict=True)
    learner.fit(1)
    assert steps_of(learner, "Mine") == [(1, 7.0), (2, 7.0)]
    assert [step for step, _ in steps_of(learner, "Accuracy")] == [1, 2]


def test_each_handler_declares_only_what_it_touches() -> None:
    """Rule 7: a wider declaration would make other callbacks wait at events where it touches none of their paths."""
    learner = tiny_learner(Metrics(mean_of_outputs))
    node = next(node for node in learner.callbacks.nodes if isinstance(node.callback, Metrics))
    at = {handler.attribute: {".".join(path) for path, _ in node.access[handler]} for _, handler in node.handlers}
    assert at["begin"] == {"data"}
    assert at["record"] == {
        "batch.inputs", "batch.loss", "batch.outputs", "batch.targets", "cbstate.history",
        "cbstate.metrics_step.Loss", "cbstate.metrics_step.MeanOfOutputs",
    }  # fmt: skip
    assert at["end"] == {
        "cbstate.history", "cbstate.metrics_step.Loss", "cbstate.metrics_step.MeanOfOutputs",
        "cbstate.metrics_epoch.Loss", "cbstate.metrics_epoch.MeanOfOutputs",
    }  # fmt: skip


def test_a_reader_sees_the_value_of_this_very_batch() -> None:
    class Other(Callback):
        def state_access(self) -> Access:
            return {"cbstate.metrics_step.Accuracy": Read()}

        @on(BatchEnd)
        def read(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.seen = learner.cbstate.metrics_step[phase]["Accuracy"].last()

    data = labelled([4])
    learner = classifier(other := Other(), Metrics(accuracy), train=data, valid=data)
    learner.epoch(TrainingPhase)
    assert other.seen == steps_of(learner, "Accuracy")[0]  # rule 7: the writer ran first


# --- names and mistakes


class Squares:
    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (Metric(accuracy), "Accuracy"),
        (Metric(mean_absolute_error), "MeanAbsoluteError"),
        (Metric(top_k_accuracy(3)), "Top3Accuracy"),
        (Metric(partial(mean_absolute_error)), "MeanAbsoluteError"),
        (Metric(Squares()), "Squares"),
        (Metric(accuracy, name="acc@1"), "acc@1"),
        (Metric(lambda outputs, targets: 1.0, name="One"), "One"),
    ],
)
def test_names(metric: Metric, name: str) -> None:
    assert metric.names == [name]
    assert repr(metric) == f"Metric({name})"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metrics(lambda: 0.0), r"a name without dots. Write Metric\(f, name='MyMetric'\)"),
        (lambda: Metric(accuracy, name="a.b"), "needs a name without dots"),
        (lambda: Metric(accuracy, name=""), "needs a name without dots"),
        (lambda: Metric(accuracy, name=untyped(3)), "needs a name without dots"),
        (lambda: Metrics("accuracy"), r"'accuracy' is no metric: a metric is a function of \(outputs, targets\)"),
        (
            lambda: Metrics("accuracy"),
            r"\(outputs, targets\)\. Write Metrics\(accuracy\), the function itself; flowtrain\.metrics has some\. Or",
        ),
        (
            lambda: Metrics([accuracy]),
            r"^Metrics takes its metrics one by one, and got a list of 1\. Write Metrics\(accuracy\)\.$",
        ),
        (
            lambda: Metrics(accuracy, (mean_absolute_error, "Other")),
            r"got a tuple of 2\. Write Metrics\(mean_absolute_error, Other\)\.$",
        ),
        (lambda: Metrics(Squares), r"is no metric: .* Write Squares\(\), an instance."),
        (lambda: Metrics(accuracy, accuracy), r"Two metrics are called 'Accuracy'. Give one another name: Metric\(f"),
        (lambda: Metrics(Metric(accuracy, name="Loss")), "Two metrics are called 'Loss'"),
        (
            lambda: Metric(accuracy, phase=untyped(BatchEnd)),
            r"phase=<class .*BatchEnd'>\) is no phase type. Write .*Validation",
        ),
        (lambda: Metric(accuracy, phase=untyped(ValidationPhase())), "is no phase type"),
    ],
)
def test_mistakes_are_named_when_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 1), r"The metric Wrong returned a tensor of shape \(3, 1\); a metric is one number. Reduce it"),
        (None, "The metric Wrong returned None; a metric is one number, a tensor with one element, or a mapping"),
        ("high", "The metric Wrong returned 'high'"),
        ([0.5, 0.5], r"The metric Wrong returned \[0.5, 0.5\]"),
        (torch.zeros(3), r"The metric Wrong returned a tensor of shape \(3,\); .* Reduce it, .*Metric\(f, labels=\["),
        ({"a": torch.zeros(2, 2)}, r"The metric Wrong\.a returned a tensor of shape \(2, 2\)"),
    ],
)
def test_a_metric_that_is_no_number_is_named(result: Any, message: str) -> None:
    learner = tiny_learner(Metrics(Metric(lambda outputs, targets: result, name="Wrong")))
    with pytest.raises(UsageError, match=message) as caught:
        learner.fit(1)
    assert any("raised in Metrics.record at (BatchEnd, TrainingPhase)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("result", [1, True, 0.5, torch.tensor([[0.5]]), torch.tensor(3)])
def test_a_metric_may_be_any_single_number(result: Any) -> None:
    learner = tiny_learner(Metrics(Metric(lambda outputs, targets: result, name="Given")), n_batches=2)
    learner.epoch(ValidationPhase)
    assert epochs_of(learner, "Given", ValidationPhase) == [(0, float(result))]


def test_without_a_recorder_the_error_names_it() -> None:
    with pytest.raises(MissingStateError, match=r"Add flowtrain\.callbacks\.Recorder, which provides cbstate\.history"):
        tiny_learner(Metrics(), default_callbacks=False)
    assert tiny_learner(Metrics(), Recorder(), default_callbacks=False).callbacks


def test_a_failed_epoch_begin_leaves_no_batches_behind() -> None:
    class Refuse(Callback):
        @on(EpochBegin, TrainingPhase)
        def refuse(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            raise CancelEpochException("no epoch")

    learner = tiny_learner(Refuse())
    learner.step(TrainingPhase, tiny_batches()[0])
    learner.fit(1)
    assert len(learner.cbstate.metrics_epoch[TrainingPhase]) == 0


# --- the weight of a batch in the mean of an epoch


def learner_of(*callbacks: Callback, data: Any, model: torch.nn.Module | None = None, **options: Any) -> Learner:
    optimizer = partial(torch.optim.SGD, lr=0.0)
    return tiny_learner(*callbacks, model=model or Scale(), data=data, optimizer=optimizer, **options)


def loss_of(learner: Learner, phase: type[Phase] = ValidationPhase, name: str = "Loss") -> float:
    value: float = learner.cbstate.metrics_epoch[phase][name].last()[1]
    return value


def tokens(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (targets != -100).sum()


def padded() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return sequences of tokens of two classes, padded with -100; the third batch has no token at all."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for n, length in ((4, 9), (4, 2), (4, 0), (1, 30)):
        inputs = torch.randn(n, 2, 30, generator=generator)
        targets = torch.randint(2, (n, 30), generator=generator)
        targets[:, length:] = -100
        batches.append((inputs, targets))
    return batches


def of_all_tokens(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    inputs = torch.cat([inputs.transpose(1, 2).reshape(-1, 2) for inputs, _ in batches])
    return F.cross_entropy(inputs, torch.cat([targets.reshape(-1) for _, targets in batches])).item()


def right(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    counted = targets != -100
    return (outputs.argmax(1) == targets)[counted].float().mean()


@pytest.mark.parametrize("lag", [0, 2])
def test_tokens(lag: int) -> None:
    class Tokens(ValidationPhase):
        def batch_size(self, inputs: Any, targets: Any) -> Any:
            return (targets != -100).sum()

    batches = padded()
    options: dict[str, Any] = {"lossfn": F.cross_entropy, "core": TorchCore(device="cpu", lag=lag)}
    learner = learner_of(Metrics(right, weight=tokens), data={ValidationPhase: batches}, **options)
    learner.validate()
    assert loss_of(learner) == pytest.approx(of_all_tokens(batches))
    correct = sum(int((inputs.argmax(1) == targets).sum()) for inputs, targets in batches)
    count = sum(int((targets != -100).sum()) for _, targets in batches)
    assert loss_of(learner, name="Right") == pytest.approx(correct / count)

    by_phase = learner_of(Metrics(right), data={Tokens: batches}, lossfn=F.cross_entropy)
    by_phase.validate()
    assert loss_of(by_phase, Tokens) == loss_of(learner)
    assert loss_of(by_phase, Tokens, "Right") == loss_of(learner, name="Right")

    # Only this metric counts tokens. The loss counts sequences, and the loss of no token is NaN.
    one = learner_of(Metrics(Metric(right, weight=tokens)), data={ValidationPhase: batches}, lossfn=F.cross_entropy)
    one.validate()
    assert loss_of(one, name="Right") == loss_of(learner, name="Right")
    assert math.isnan(loss_of(one))


def test_an_epoch_in_which_nothing_counts_has_no_mean() -> None:
    data = {ValidationPhase: [(torch.zeros(2), torch.zeros(2))]}
    learner = learner_of(Metrics(weight=lambda outputs, targets: 0), data=data)
    learner.validate()
    assert math.isnan(loss_of(learner))


@pytest.mark.parametrize(
    ("metrics", "phase", "text"),
    [
        (Metrics(weight=lambda outputs, targets: -1), ValidationPhase, "^The weight of Metrics returned -1; what a"),
        (
            Metrics(Metric(right, weight=lambda outputs, targets: targets)),
            ValidationPhase,
            r"(?s)^The weight of Metric\(Right\) returned tensor\(.*; what a batch counts in the mean of an epoch is a",
        ),
        (Metrics(), type("Wrong", (ValidationPhase,), {"batch_size": lambda *_: None}), r"^Wrong\.batch_size\(inputs"),
    ],
)
def test_a_weight_that_is_no_number(metrics: Metrics, phase: type[Phase], text: str) -> None:
    learner = learner_of(metrics, data={phase: padded()}, lossfn=F.cross_entropy)
    with pytest.raises(UsageError, match=text):
        learner.validate()
    with pytest.raises(UsageError, match=r"^Metrics\(weight=3\): weight is a function of \(outputs, targets\)"):
        Metrics(weight=untyped(3))


def test_the_best_is_the_best_of_what_was_told(tmp_path: Path) -> None:
    """Counted by samples the second epoch is the best, by tokens the first; the third and fourth are worse by both."""
    epochs = [(9.0, 1.0), (1.0, 2.0), (9.0, 3.0), (9.0, 4.0)]
    right_means = [(1 * a + 9 * b) / 10 for a, b in epochs]
    values = iter([value for epoch in epochs for value in epoch])
    weights = iter([1.0, 1.0, 9.0] * 4)  # one of training, two of validation
    learner = learner_of(
        Metrics(weight=lambda outputs, targets: next(weights)),
        Checkpointer(tmp_path),
        EarlyStopping(patience=2),
        data={TrainingPhase: tiny_batches(n_batches=1), ValidationPhase: [(torch.zeros(2, 1), torch.zeros(2, 1))] * 2},
        lossfn=lambda outputs, targets: outputs.sum() * 0 + (0.0 if outputs.requires_grad else next(values)),
    )
    learner.fit(4)
    assert learner.cbstate.metrics_epoch[ValidationPhase]["Loss"].values == right_means[:3]
    assert "best value was 1.8, in epoch 1" in str(learner.stopped)
    assert torch.load(find_file(tmp_path / "best"), weights_only=True)["position"]["rounds"] == 0


@pytest.mark.parametrize("lag", [0, 2])
def test_a_fit_resumed_in_the_middle_of_an_epoch_has_the_same_means(lag: int, tmp_path: Path) -> None:
    def make(stop: int | None, folder: int | None) -> Learner:
        def end(learner: Any) -> None:
            count.append(1)
            if len(count) == stop:
                raise CancelFittingException

        count: list[int] = []
        return Learner(
            torch.nn.Linear(3, 2),
            F.cross_entropy,
            data=[(torch.randn(n, 3, generator=generator), torch.randint(2, (n,), generator=generator)) for n in sizes],
            optimizer=partial(torch.optim.SGD, lr=0.1),
            callbacks=[
                Metrics(Metric(right, weight=lambda outputs, targets: (targets + 1).sum()), *both, weight=tokens),
                Checkpointer(tmp_path / str(folder), every_steps=1),
                CustomCallback(end, BatchEnd),
            ],
            core=TorchCore(device="cpu", lag=lag),
            default_callbacks="quiet",
        )

    sizes, kinds = [5, 1, 4, 2], (tm.MulticlassPrecision, tm.MulticlassRecall)
    both = [torchmetrics.MetricCollection([kind(2, average="macro")]) for kind in kinds]
    found = []
    for stop in (None, 2):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        learner = make(stop, stop)
        learner.fit(1)
        if stop is not None:
            generator.manual_seed(0)
            torch.manual_seed(0)
            learner = make(None, stop)
            learner.fit(1, resume=tmp_path / str(stop) / "step-00000002.ckpt")
        found.append({name: list(each) for name, each in learner.cbstate.metrics_epoch[TrainingPhase].items()})
    assert found[0] == found[1]
    assert list(found[0]) == ["Loss", "Right", "MulticlassPrecision", "MulticlassRecall"]


class Later(CustomCallback):
    def run_after(self) -> tuple[type[Callback], ...]:
        return (Metrics,)


ERASES = Later(lambda learner: learner.batch.loss.zero_(), BatchEnd, access={"batch.loss": Write()})
TOTAL = torch.zeros(())


class Reuses(TrainingPhase):
    """A step that adds the losses of the epoch in one tensor, which is the loss of every batch."""

    def step(self, learner: StepContext, raw: Any) -> None:
        inputs, targets = raw
        with learner.run_batch(self, inputs=inputs, targets=targets) as batch:
            batch.outputs = learner.model(inputs)
            loss = learner.lossfn(batch.outputs, targets)
            learner.backward(self, loss)
            learner.update(self)
            batch.loss = TOTAL.add_(loss.detach())


@pytest.mark.parametrize(("phase", "callbacks"), [(TrainingPhase(), [ERASES]), (Reuses(), [])])
def test_a_loss_that_is_written_in_place_later_is_recorded_as_it_was(phase: Phase, callbacks: list[Callback]) -> None:
    """A value of a device is read late, so the record must not share its memory."""

    def losses(lag: int | None, *extra: Callback) -> list[Any]:
        TOTAL.zero_()
        core, data = TorchCore(device="cpu", lag=lag), {type(phase)(): tiny_batches(n_batches=5)}
        learner = tiny_learner(*extra, core=core, data=data)
        learner.fit(1)
        return list(learner.cbstate.metrics_step[type(phase)()]["Loss"].values)

    wanted = losses(None)
    assert len({*wanted}) == 5
    assert losses(2, *callbacks) == wanted
