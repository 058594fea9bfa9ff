"""summarize: the numbers and shapes of a model, as data and as text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import UsageError
from flowtrain.callbacks.summary import Layer, summarize


class Net(nn.Module):
    """An encoder that is frozen, an LSTM, and a head that shares the encoder's weight."""

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
        Layer("", "Net", 18 + rnn + 2, rnn + 2, "sequence: (4, 1, 2), head: (4, 3)"),  # what is shared counts once
        Layer("encoder", "Sequential", 18, 0, "(4, 3)"),
        Layer("encoder.0", "Linear", 12, 0, "(4, 3)"),
        Layer("encoder.1", "BatchNorm1d", 6, 0, "(4, 3)"),
        Layer("rnn", "LSTM", rnn, rnn, "(4, 1, 2), (1, 4, 2), (1, 4, 2)"),
        Layer("head", "Linear", 9, 0, "(4, 3)"),
        Layer("unused", "Linear", 2, 2, ""),
    )
    assert (summary.parameters, summary.trainable) == (18 + rnn + 2, rnn + 2)
    assert summary.size == (18 + rnn + 2) * 4 + 6 * 4 + 8  # the buffers of the batch norm: two of 3, and a count
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
        (nn.Linear(1, 1), -1, r"summarize\(depth=-1\)"),
        (nn.Linear(1, 1), 1.5, r"summarize\(depth=1.5\)"),
    ],
)
def test_bad_input(model: Any, depth: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        summarize(model, depth=depth)
