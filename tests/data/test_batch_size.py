"""The number of samples in a batch: the lengths from which it is found, and its weight in the mean of an epoch."""

from __future__ import annotations

import warnings
from collections import UserList, UserString, deque
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import zeros
from torch.nn.utils.rnn import pack_sequence

from flowtrain import (
    Learner,
    StepContext,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.callbacks import Metrics
from flowtrain.data.batch_size import lengths, measure
from flowtrain.errors.describing import describe
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.models import Scale
from tests.support.nested import CASES, Encoding, Pair, Sample, Slotted


class Colour(tuple[int, ...], Enum):
    RED = (255, 0, 0)


def holding_itself() -> dict[str, Any]:
    """Return a dict whose only item it is itself."""
    value: dict[str, Any] = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    ("inputs", "targets", "size", "certain"),
    [
        (zeros(8, 3), zeros(8), 8, True),
        (zeros(0, 3), zeros(0), 0, True),
        ({"weights": zeros(3), "x": zeros(8, 2)}, zeros(8), 8, True),  # the first tensor has no batch dimension
        ({"edges": zeros(2, 30), "x": zeros(11, 4)}, zeros(11), 11, True),
        (zeros(50, 8, 2), zeros(8), 8, False),  # the time comes first
        (zeros(8, 50), {"boxes": zeros(3, 4), "image": zeros(8)}, 8, True),
        # A list of images with a list of their boxes: each image has three channels, and one has three boxes.
        ([zeros(3, 5, 5)] * 4, [{"boxes": zeros(n, 4), "labels": zeros(n)} for n in (1, 3, 2, 5)], 4, True),
        ((zeros(3, 5, 5), zeros(3, 7, 5)), ({"labels": zeros(1)}, {"labels": zeros(4)}), 2, True),
        ([zeros(8, 2), zeros(8, 5)], zeros(8), 8, True),  # several inputs in a list
        ([zeros(8, 2), zeros(8, 5)], None, 8, True),
        ([zeros(4, 2), zeros(9, 2)], None, 2, False),
        ({"x": zeros(4), "y": zeros(9)}, None, 4, False),
        (["one", "two", "three"], zeros(3), 3, True),
        (["one", "two", "three"], None, 3, True),
        ("one text", zeros(()), 1, True),
        (None, None, 1, True),
        (None, zeros(6), 6, True),
        (object(), zeros(6), 6, True),
        (object(), None, 1, False),
        (pack_sequence([zeros(3, 2), zeros(5, 2)], enforce_sorted=False), zeros(2), 2, True),
        (pack_sequence([zeros(5, 2), zeros(3, 2)]), zeros(2), 2, True),  # without indices
        (Sample(zeros(8, 3)), zeros(8), 8, True),
        (SimpleNamespace(x=zeros(8, 3), weights=zeros(5)), zeros(8), 8, True),
        (Slotted(zeros(8, 3)), None, 8, True),
        (Encoding({"ids": zeros(8, 20)}, (1, 2)), zeros(8), 8, True),
        (deque([zeros(3, 5)] * 4), zeros(4), 4, True),
        ({zeros(8, 3)}, zeros(8), 8, True),
        (Sample("a text"), Sample(None), 1, True),
        (range(8), zeros(8), 8, True),
        (pack_sequence([zeros(5, 2), zeros(3, 2)]), None, 2, True),
        (CASES["circle"].make(zeros(8, 3)), zeros(8), 8, True),
        ({"x": zeros(8, 2), "caption": UserString("cat")}, zeros(8), 8, True),
        ([UserString("one"), UserString("two")], zeros(2), 2, True),
        (UserString("one text"), None, 1, True),
        (Colour.RED, None, 1, True),
        (holding_itself(), None, 1, True),
    ],
)
def test_how_many_samples_a_batch_has(inputs: Any, targets: Any, size: int, certain: bool) -> None:
    assert measure(inputs, targets) == (size, certain)
    assert ValidationPhase().batch_size(inputs, targets) == size


def test_the_lengths_in_a_batch_are_named() -> None:
    assert [*lengths([{"x": zeros(3)}, "a"], "batch.inputs")] == [("batch.inputs", 2), ("batch.inputs[0]['x']", 3)]
    inputs = Sample({"ids": zeros(8, 2)}, label=3)
    assert [*lengths(inputs, "batch.inputs")] == [("batch.inputs.image['ids']", 8)]
    assert [*lengths(UserList([Pair(zeros(4), "a")]), "batch.inputs")] == [
        ("batch.inputs", 1),
        ("batch.inputs[0]", 2),
        ("batch.inputs[0][0]", 4),
    ]


def learner_of(data: Any, model: torch.nn.Module | None = None, **options: Any) -> Learner:
    """Return a learner whose parameter stays as it is, since the learning rate is 0."""
    optimizer = partial(torch.optim.SGD, lr=0.0)
    return tiny_learner(Metrics(), model=model or Scale(), data=data, optimizer=optimizer, **options)


def test_a_dict_whose_first_tensor_is_no_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, generator=generator) for n in (8, 8, 3)]
    data = [({"classes": zeros(5), "x": each}, zeros(len(each))) for each in x]
    learner = learner_of({ValidationPhase: data}, model=Scale(lambda inputs: inputs["x"]))
    assert learner.validate()["Loss"] == pytest.approx(torch.cat(x).square().mean().item())


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
    learner = learner_of({TrainingPhase: tiny_batches(), ValidationPhase: loader})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.fit(2)
        loss = learner.validate()["Loss"]
    [warning] = caught  # one warning for each phase
    assert str(warning.message) == (
        "How many samples a batch of ValidationPhase has cannot be told for certain: batch.inputs has length 50, "
        "batch.targets has length 50, and the loader makes batches of 8. The means of an epoch weigh this batch by 50. "
        "Say it in a phase, and give data={MyValidationPhase: loader}:\n\n"
        "    class MyValidationPhase(ValidationPhase):\n"
        "        def batch_size(self, inputs, targets):\n"
        "            return len(targets)  # the number of samples\n"
    )
    told = learner_of({TimeFirst: loader})
    assert told.validate()["Loss"] == pytest.approx(samples.square().mean().item())
    assert loss != pytest.approx(told.validate()["Loss"], abs=1e-6)


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
    learner = learner_of({ValidationPhase: loader}, lossfn=lambda outputs, targets: outputs.mean())
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
    learner = learner_of({ValidationPhase: loader}, lossfn=lambda outputs, targets: outputs.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.validate()


def test_a_step_of_ones_own_has_a_batch_size_too() -> None:
    class Own(ValidationPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw) as batch:
                batch.loss = learner.model(batch.inputs).mean()

        def batch_size(self, inputs: Any, targets: Any) -> int:
            assert targets is None
            return int(inputs.shape[1])

    def unused(outputs: Any, targets: Any) -> Any:
        raise AssertionError("a batch without outputs has nothing to weigh")

    data = {Own: [torch.full((2, 3), 1.0), torch.full((2, 9), 5.0)]}
    learner = tiny_learner(Metrics(unused, weight=unused), model=Scale(), data=data)
    assert learner.validate()["Loss"] == (3 * 1.0 + 9 * 5.0) / 12


def nested(layout: torch.layout) -> torch.Tensor:
    """Return a nested tensor of two tensors of different sizes. Torch warns that the layout strided is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor([zeros(2, 3), zeros(4, 3)], layout=layout)


class SumOfRows(torch.nn.Module):
    """A model for nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(torch.nested.to_padded_tensor(x, 0.0).sum(1))
        return y


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_have_the_size_of_their_number(layout: torch.layout) -> None:
    assert measure(nested(layout), zeros(2)) == (2, True)
    assert describe(nested(layout)).endswith(" of 2 tensors, float32")


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_of_nested_tensors_is_trained(strict: bool) -> None:
    data = [(nested(torch.strided), zeros(2, 1))]
    learner = tiny_learner(model=SumOfRows(), data=data, strict=strict)
    learner.fit(1)
    assert learner.history.rows
