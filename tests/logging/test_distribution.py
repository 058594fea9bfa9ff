"""Distributions: they count as numpy's histograms do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import Histogram
from flowtrain.logging.distribution import Distribution, distribution
from tests.support.examples import examples


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=60), st.integers(1, 9))
@settings(max_examples=examples(60))
def test_counts_are_numpys(values: list[int], bins: int) -> None:
    found = distribution(Histogram([value / 8 for value in values] + [float("nan"), float("-inf")], bins=bins))
    assert sum(found.counts) == len(values)
    assert found.left_out == 2
    assert (found.low, found.high) == (min(values) / 8, max(values) / 8)
    assert found.total == pytest.approx(sum(values) / 8)
    assert found.squares == pytest.approx(sum(value**2 for value in values) / 64)
    _, edges = np.histogram(np.array(values) / 8, bins)
    assert found.edges == pytest.approx(edges.tolist())


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1, 2, 2]),
        torch.tensor([1.0, 2.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([[1.0, 2.0, 2.0]]),
        torch.tensor([1.0, 2.0, 2.0]).to_sparse(),
        [1, 2, 2],
    ],
)
def test_any_real_values(values: Any) -> None:
    found = distribution(Histogram(values, bins=2))
    assert found == Distribution(1.0, 2.0, (1, 2), 5.0, found.squares, 0)
    assert found.squares == pytest.approx(9.0)


def test_values_without_a_width() -> None:
    assert distribution(Histogram([], bins=2)) == Distribution(0.0, 0.0, (0, 0), 0.0, 0.0, 0)
    assert distribution(Histogram([float("nan")], bins=1)).left_out == 1
    found = distribution(Histogram([3.0, 3.0], bins=2))
    assert (found.counts, found.edges) == ((0, 2), [2.5, 3.0, 3.5])
    wide = distribution(Histogram(torch.tensor([-3e38, 3e38]), bins=2))
    assert wide.counts == (1, 1)


def test_mistakes() -> None:
    with pytest.raises(LoggingError, match=r"Histogram\(\): bins is a whole number, at least 1, got 0\."):
        distribution(Histogram([1.0], bins=0))
    with pytest.raises(LoggingError, match=r"got torch\.complex64, and counts real numbers"):
        distribution(Histogram(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(LoggingError, match=r"takes a tensor or array of numbers, and got a str 'text': .*\. Join sev"):
        distribution(Histogram("text"))
    with pytest.raises(LoggingError, match=r"and got a list of 2: list of 2: int 1, int 2, list of 1: int 3: .*Join"):
        distribution(Histogram([[1, 2], [3]]))
    with pytest.raises(
        LoggingError, match=r"got a Tensor of shape \(3,\), float32, on the device 'meta', which has no"
    ):
        distribution(Histogram(torch.empty(3, device="meta")))
    far = torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64)
    with pytest.raises(LoggingError, match=r"too far apart to be counted in bins\. Log the histogram of their log"):
        distribution(Histogram(far))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_has_the_values_of_its_parts(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(3), torch.ones(1)], layout=layout)
    assert distribution(Histogram(nested, bins=2)).counts == (3, 1)
