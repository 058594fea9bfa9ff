"""ModelSummary: when and where it prints, and that training does not change."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import AbstractTrainingPhase, UsageError
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import ModelSummary
from flowtrain.callbacks.model_summary import Layer, summarize
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import TinyModel, assert_equivalent, tiny_batches, tiny_learner
from tests.support.console import printed
from tests.support.untyped import untyped


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """Return the output of rich's console."""
    with printed(40) as written:
        yield written


def test_prints_the_summary_of_the_first_batch_once(output: io.StringIO) -> None:
    """The summary is printed once and whole, even if the console is narrower than the table."""
    learner = tiny_learner(ModelSummary(), n_batches=2)
    learner.fit(1)
    learner.fit(1)
    assert output.getvalue() == f"{summarize(TinyModel(), torch.zeros(8, 1))}\n"
    assert "(8, 1)" in output.getvalue()


def test_inputs_that_are_given_go_first(output: io.StringIO) -> None:
    tiny_learner(ModelSummary(inputs=torch.zeros(5, 7)), n_batches=2).fit(1)
    assert "(5, 7)" in output.getvalue()


@pytest.mark.parametrize("kind", ["iterator", "no pair"])
def test_without_a_batch_there_are_no_shapes(output: io.StringIO, kind: str) -> None:
    data = iter(tiny_batches(n_batches=2)) if kind == "iterator" else [torch.ones(1)]
    learner = tiny_learner(ModelSummary(), data=data)
    if kind == "iterator":
        learner.fit(1)
        assert learner.cbstate.history[next(iter(learner.data))].steps == 2
    else:
        with pytest.raises(Exception, match="needs \\(inputs, targets\\)"):
            learner.fit(1)
    assert output.getvalue() == f"{summarize(TinyModel())}\n"


def test_several_models_have_a_table_each(output: io.StringIO) -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: torch.Tensor) -> None:
            with learner.run_batch(self, inputs=raw):
                pass

    learner = tiny_learner(
        ModelSummary(), model={"gen": TinyModel(), "disc": nn.Linear(1, 1)}, data={Both: [torch.ones(2, 1)]}
    )
    learner.fit(1)
    assert output.getvalue() == f"gen\n{summarize(TinyModel())}\ndisc\n{summarize(nn.Linear(1, 1))}\n"


def test_depth_is_checked() -> None:
    with pytest.raises(UsageError, match=r"ModelSummary\(\): depth is a whole number, at least 0, got -1\."):
        ModelSummary(depth=-1)


@pytest.mark.usefixtures("output")
def test_the_same_under_every_executor_and_as_without_it() -> None:
    """Shuffling and dropout draw the same random numbers as without the summary."""

    def make(executor: Executor, *callbacks: ModelSummary) -> Learner:
        data = DataLoader(TensorDataset(torch.randn(8, 1), torch.randn(8, 1)), batch_size=4, shuffle=True)
        model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        return tiny_learner(*callbacks, model=model, data=data, executor=executor)

    assert_equivalent(lambda executor: make(executor, ModelSummary()), executors=["dask"], epochs=1)
    weights: list[torch.Tensor] = []
    for callbacks in ([ModelSummary()], []):
        torch.manual_seed(0)
        learner = make(tiny_learner().executor.__class__(), *callbacks)
        learner.fit(1)
        weights.append(torch.cat([value.flatten().float() for value in learner.model.state_dict().values()]))
    assert torch.equal(*weights)


# --- the table itself


class Net(nn.Module):
    """A model with a frozen encoder, an LSTM, and a head that shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(3, 3)
        self.encoder = nn.Sequential(first, nn.BatchNorm1d(3))
        self.rnn = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = first.weight
        self.unused = nn.Linear(1, 1)
        self.encoder.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        sequence, _ = self.rnn(self.encoder(x)[:, None])
        return {"sequence": sequence, "head": self.head(x)}


def test_layers_of_a_model() -> None:
    torch.manual_seed(0)
    model = Net()
    summary = summarize(model, torch.ones(4, 3))
    rnn = 4 * 2 * (3 + 2 + 2)
    assert summary.layers == (
        Layer("", "Net", 18 + rnn + 2, rnn + 2, "sequence: (4, 1, 2), head: (4, 3)"),  # a shared weight counts once
        Layer("encoder", "Sequential", 18, 0, "(4, 3)"),
        Layer("encoder.0", "Linear", 12, 0, "(4, 3)"),
        Layer("encoder.1", "BatchNorm1d", 6, 0, "(4, 3)"),
        Layer("rnn", "LSTM", rnn, rnn, "(4, 1, 2), (1, 4, 2), (1, 4, 2)"),
        Layer("head", "Linear", 9, 0, "(4, 3)"),
        Layer("unused", "Linear", 2, 2, ""),
    )
    assert (summary.parameters, summary.trainable) == (18 + rnn + 2, rnn + 2)
    assert summary.size == (18 + rnn + 2) * 4 + 6 * 4 + 8  # the batch norm has two buffers of 3 values, and a counter
    assert [layer.name for layer in summarize(model, depth=1).layers] == ["", "encoder", "rnn", "head", "unused"]
    assert [layer.name for layer in summarize(model, depth=0).layers] == [""]


def test_the_text_stands_alone() -> None:
    text = str(summarize(nn.Sequential(nn.Linear(3, 1000), nn.ReLU())))
    assert text.splitlines()[0].split() == ["Layer", "Type", "Parameters", "Trainable"]
    assert " 0         Linear            4,000       4,000" in text
    assert text.endswith("\nParameters: 4,000, of them frozen: 0. With buffers: 0.02 MiB.")


def test_nothing_of_the_model_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    summarize(model, torch.randn(4, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not vars(module)["_forward_hooks"] for module in model.modules())


def test_lazy_layers_are_made_in_the_copy_alone() -> None:
    model = nn.LazyLinear(2)
    assert summarize(model).layers == (Layer("", "LazyLinear", 0, 0),)
    assert summarize(model, torch.ones(4, 3)).layers == (Layer("", "Linear", 8, 8, "(4, 2)"),)
    assert torch.nn.parameter.is_lazy(model.weight)


def test_a_forward_pass_that_fails_says_so_below_the_table() -> None:
    summary = summarize(nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4)), torch.ones(2, 3))
    assert [layer.shape for layer in summary.layers] == ["", "(2, 3)", ""]
    assert summary.note.startswith("Some shapes are missing: the model raised RuntimeError: mat1 and mat2")
    assert "Some shapes are missing" in str(summary)


@pytest.mark.parametrize(
    ("model", "depth", "message"),
    [
        (nn.Linear, 1, r"takes a module. Write summarize\(learner.model\)"),
        (nn.Linear(1, 1), -1, r"^summarize\(\): depth is a whole number, at least 0, got -1\.$"),
        (nn.Linear(1, 1), 1.5, r"^summarize\(\): depth is a whole number, at least 0, got 1\.5\.$"),
    ],
)
def test_bad_input(model: Any, depth: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        summarize(model, depth=depth)


@pytest.mark.parametrize(
    "inputs", [(torch.zeros(4, 3), torch.zeros(4, 2)), {"b": torch.zeros(4, 2), "a": torch.zeros(4, 3)}]
)
def test_a_model_of_several_inputs(inputs: Any) -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(3, 5), torch.nn.Linear(2, 5)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.one(a) + self.other(b)
            return found

    shapes = [layer.shape for layer in summarize(Both(), inputs, unpack=True).layers]
    assert shapes == ["(4, 5)"] * 3
    assert summarize(Both(), inputs).layers[0].shape == ""
    with pytest.raises(UsageError, match=r"^summarize\(unpack='yes'\): unpack is True or False\.$"):
        summarize(Both(), inputs, unpack=untyped("yes"))
