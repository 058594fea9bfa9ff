"""The number of samples in a batch, and the lengths from which it is found."""

from __future__ import annotations

from collections import UserList, UserString, deque
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from torch import zeros
from torch.nn.utils.rnn import pack_sequence

from flowtrain import ValidationPhase
from flowtrain.data.batch_size import lengths, measure
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
