"""Loggables: what they are, and that they travel."""

from __future__ import annotations

import pickle

import pytest
import torch

from flowtrain import logging
from flowtrain.logging import loggables
from flowtrain.logging.loggables import Histogram, Loggable, Settings, Text, Value


@pytest.mark.parametrize("loggable", [Value(0.5), Text("a"), Histogram([1.0, 2.0], bins=2), Settings({"lr": 0.1})])
def test_they_travel_to_other_processes_and_are_frozen(loggable: Loggable) -> None:
    copy = pickle.loads(pickle.dumps(loggable))
    assert type(copy) is type(loggable)
    assert vars(copy) == vars(loggable)
    with pytest.raises(AttributeError, match="cannot assign"):
        loggable.value = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]  # what is tested


def test_two_are_compared_by_identity() -> None:
    """Tensors cannot be compared with ``==`` to one truth value."""
    assert Value(torch.ones(2)) != Value(torch.ones(2))


def test_all_of_them_are_public() -> None:
    kinds = {name for name in loggables.__all__ if name != "Group"}
    assert kinds <= set(logging.__all__)
    assert {name for name in kinds if issubclass(getattr(loggables, name), Loggable)} == kinds
