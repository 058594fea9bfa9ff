"""The checks themselves, where a whole fit does not reach; tests/callbacks/test_sanity.py has the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowtrain.callbacks.sanity import check_batch, check_loss, check_optimizers, check_outputs, check_targets

NAN = float("nan")


@pytest.mark.parametrize(
    ("lossfn", "outputs", "targets"),
    [
        (F.cross_entropy, torch.zeros(2, 3), torch.tensor([-100, -100])),  # all of them ignored
        (F.cross_entropy, torch.zeros(2, 3), torch.tensor([[0.5, 0.5, 0.0], [9.0, 0.0, 0.0]])),  # probabilities
        (F.cross_entropy, torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 2)),  # a class for each pixel
        (F.cross_entropy, torch.zeros(3), torch.tensor(2)),  # one sample, without a batch
        (F.mse_loss, torch.zeros(2), torch.tensor([-5.0, 9.0])),
        (nn.BCELoss(), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])),
        (F.cross_entropy, {"logits": torch.zeros(2, 3)}, torch.tensor([7])),  # not torch's own use of it
    ],
)
def test_targets_that_a_loss_takes(lossfn: Any, outputs: Any, targets: torch.Tensor) -> None:
    assert list(check_targets("targets", lossfn, outputs, targets)) == []


def test_a_class_for_each_pixel_out_of_range() -> None:
    [problem] = check_targets("targets", F.cross_entropy, torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3))
    assert problem.what == "targets go from 3 to 3; cross_entropy over outputs with 3 classes takes 0 to 2."


def test_a_subclass_of_a_loss_may_take_other_targets() -> None:
    class Shifted(nn.CrossEntropyLoss):
        """Takes classes from 1."""

    assert not list(check_targets("targets", Shifted(), torch.zeros(2, 3), torch.tensor([1, 3])))


def test_only_floating_numbers_can_be_broken() -> None:
    assert not list(check_batch("data", torch.tensor([1, 2]), [torch.tensor([True]), "text"]))
    [problem] = check_outputs("model", (torch.zeros(2), torch.tensor([complex(NAN, 0), 1j])))
    assert problem.what.startswith("outputs[1] has 1 of 2 values")


def test_a_loss_of_one_element_with_a_shape_is_a_number() -> None:
    assert not list(check_loss("loss", torch.ones(1, 1, requires_grad=True), training=True))


def test_optimizers_together_hold_all_parameters() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    trainable = {f"{name}.{key}": param for name, model in (("one", one), ("two", two))
                 for key, param in model.named_parameters()}  # fmt: skip
    first = torch.optim.SGD(one.parameters(), lr=0.1)
    assert not list(check_optimizers({"a": first, "b": torch.optim.SGD(two.parameters(), lr=0.1)}, trainable))
    [problem] = check_optimizers({"a": first}, {**trainable, "x": nn.Parameter(), "y": nn.Parameter()})
    assert problem.what.startswith("it does not hold two.weight, two.bias, x and 1 more,")
