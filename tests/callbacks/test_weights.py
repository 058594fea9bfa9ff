"""The weight of a batch in the mean of an epoch: its size, as its phase finds it, or the result of a function."""

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
    BatchEnd,
    Callback,
    CancelFittingException,
    Learner,
    Phase,
    StepContext,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
)
from flowtrain.callbacks import Checkpointer, CustomCallback, EarlyStopping, Metric, Metrics
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.checkpoint.files import find_file
from tests.support.untyped import untyped

zeros = torch.zeros


class Scale(torch.nn.Module):
    """Multiplies the part of the inputs that `pick` selects by a parameter, which is 1."""

    def __init__(self, pick: Callable[[Any], torch.Tensor] = lambda inputs: inputs) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.pick = pick

    def forward(self, inputs: Any) -> torch.Tensor:
        return self.pick(inputs) * self.scale


def learner_of(*callbacks: Callback, data: Any, model: torch.nn.Module | None = None, **options: Any) -> Learner:
    optimizer = partial(torch.optim.SGD, lr=0.0)
    return tiny_learner(*callbacks, model=model or Scale(), data=data, optimizer=optimizer, **options)


def loss_of(learner: Learner, phase: type[Phase] = ValidationPhase, name: str = "Loss") -> float:
    value: float = learner.cbstate.metrics_epoch[phase][name].last()[1]
    return value


def test_a_dict_whose_first_tensor_is_no_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, generator=generator) for n in (8, 8, 3)]
    data = [({"classes": zeros(5), "x": each}, zeros(len(each))) for each in x]
    learner = learner_of(Metrics(), data={ValidationPhase: data}, model=Scale(lambda inputs: inputs["x"]))
    learner.validate()
    assert loss_of(learner) == pytest.approx(torch.cat(x).square().mean().item())


def time_first(count: int = 19, batch_size: int = 8, frames: int = 50, features: int = 2) -> tuple[Any, torch.Tensor]:
    """Return a loader of tensors of shape (frames, batch, features), and all samples."""
    samples = torch.randn(count, frames, features, generator=torch.Generator().manual_seed(0))

    def collate(items: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.stack(items, dim=1)
        return inputs, torch.zeros_like(inputs)

    dataset: Any = samples
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, collate_fn=collate), samples


class TimeFirst(ValidationPhase):
    def batch_size(self, inputs: Any, targets: Any) -> int:
        return int(targets.shape[1])


def test_time_first() -> None:
    loader, samples = time_first()
    learner = learner_of(Metrics(), data={TrainingPhase: tiny_batches(), ValidationPhase: loader})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.fit(2)
    [warning] = caught  # one warning for each phase
    assert str(warning.message) == (
        "How many samples a batch of ValidationPhase has cannot be told for certain: batch.inputs has length 50, "
        "batch.targets has length 50, and the loader makes batches of 8. The means of an epoch weigh this batch by 50. "
        "Say it in a phase, and give data={MyValidationPhase: loader}:\n\n"
        "    class MyValidationPhase(ValidationPhase):\n"
        "        def batch_size(self, inputs, targets):\n"
        "            return len(targets)  # the number of samples\n"
    )
    told = learner_of(Metrics(), data={TimeFirst: loader})
    told.validate()
    assert loss_of(told, TimeFirst) == pytest.approx(samples.square().mean().item())
    assert loss_of(learner) != pytest.approx(loss_of(told, TimeFirst), abs=1e-6)


@pytest.mark.parametrize(
    "loader",
    [
        [(zeros(50, 8), zeros(8))],
        time_first(frames=7)[0],
        time_first(frames=16)[0],
        time_first(frames=12, batch_size=5)[0],
    ],
    ids=["a list", "fewer", "twice as many", "more"],
)
def test_what_is_not_certain_warns(loader: Any) -> None:
    learner = learner_of(Metrics(), data={ValidationPhase: loader}, lossfn=lambda outputs, targets: outputs.mean())
    with pytest.warns(UserWarning, match="cannot be told for certain"):
        learner.validate()


@pytest.mark.parametrize(
    "loader",
    [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(zeros(20, 8), zeros(20)), batch_size=8),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(zeros(5, 8), zeros(5)), batch_size=8),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(zeros(20, 3), zeros(20)),
            batch_size=8,
            collate_fn=lambda items: (zeros(2 * len(items), 3), zeros(2 * len(items))),  # two copies of each sample
        ),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(zeros(6, 8), zeros(6)), batch_size=None),
        [(zeros(8, 2), zeros(8)), (zeros(3, 2), zeros(3))],
    ],
    ids=["usual", "one short batch", "two views", "no batches", "a list"],
)
def test_what_is_certain_does_not(loader: Any) -> None:
    learner = learner_of(Metrics(), data={ValidationPhase: loader}, lossfn=lambda outputs, targets: outputs.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.validate()


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
    learner = learner_of(Metrics(weight=lambda outputs, targets: 0), data={ValidationPhase: [(zeros(2), zeros(2))]})
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


def test_a_step_of_ones_own_has_a_batch_size_too() -> None:
    class Own(ValidationPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw) as batch:
                batch.loss = learner.model(batch.inputs).mean()

        def batch_size(self, inputs: Any, targets: Any) -> int:
            assert targets is None
            return int(inputs.shape[1])

    learner = learner_of(Metrics(right, weight=tokens), data={Own: [torch.full((2, 3), 1.0), torch.full((2, 9), 5.0)]})
    learner.validate()
    assert loss_of(learner, Own) == (3 * 1.0 + 9 * 5.0) / 12


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
        data={TrainingPhase: tiny_batches(n_batches=1), ValidationPhase: [(zeros(2, 1), zeros(2, 1))] * 2},
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
                Metrics(Metric(right, weight=lambda outputs, targets: (targets + 1).sum()), weight=tokens),
                Checkpointer(tmp_path / str(folder), every_steps=1),
                CustomCallback(end, BatchEnd),
            ],
            core=TorchCore(device="cpu", lag=lag),
            default_callbacks="quiet",
        )

    sizes = [5, 1, 4, 2]
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
    assert list(found[0]) == ["Loss", "Right"]
