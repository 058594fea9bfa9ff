"""Pickling for files: values come back, and neither writing nor reading touches a function that could do harm."""

from __future__ import annotations

import collections
import enum
import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flowtrain import BatchEnd, Phase, TrainingPhase
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.learner_state import Named, State
from flowtrain.state.parameters import NamedTensors
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask import register_copier
from flowtrain_dask.cluster.codec import Encoded, decode, encode
from flowtrain_dask.cluster.plain_pickling import PlainPickler, loads


class Colour(enum.Enum):
    """An enumeration of a user."""

    RED = 1


@dataclass
class Pair:
    """A dataclass of a user."""

    left: Any
    right: Any


class Point(NamedTuple):
    """A named tuple of a user."""

    x: Any
    y: Any


class Warm(BatchEnd):
    """An event of a user."""


class Own:
    """A class of a user that no rule knows."""

    def __init__(self, value: int) -> None:
        self.value = value


class Known(Own):
    """A class of a user with a copier."""


register_copier(Known, lambda value: Known(value.value))


def through(value: Any) -> Any:
    """Return a value as a file gives it back."""
    return decode(bytes(Encoded(value, None, PlainPickler)), loads)


def series() -> SeriesMap:
    """Return a map with one series."""
    made = SeriesMap("cbstate.metrics_step")
    made.push("Loss", 0.5, 1)
    return made


VALUES: list[Any] = [
    None, True, 3, 2.5, 1j, "text", b"bytes", [1], (2,), {"a": {3}}, frozenset({4}), slice(1, 2), range(3),
    collections.deque([1, 2]), collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]),
    types.SimpleNamespace(a=1), torch.float16, torch.Size([2, 3]), torch.device("cpu"), np.arange(4.0), np.float32(3),
    np.array(["a", "bc"]), Colour.RED, Pair(1, [2]), Point(1, 2), TrainingPhase(), Counts((1, 2, 3, 4)), int, Pair,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}")
def test_values_come_back(value: Any) -> None:
    found = through(value)
    assert type(found) is type(value)
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(10)[::3],
        torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(0, 3),
        torch.eye(2).to_sparse(),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    ],
    ids=["transposed", "strided", "requires_grad", "parameter", "conjugate", "empty", "sparse", "bfloat16"],
)
def test_tensors_come_back(tensor: torch.Tensor) -> None:
    found = through([tensor, tensor])
    assert found[0] is found[1]
    assert (type(found[0]), found[0].dtype, found[0].requires_grad) == (
        type(tensor),
        tensor.dtype,
        tensor.requires_grad,
    )
    assert torch.equal(found[0].to_dense(), tensor.to_dense())


def test_objects_come_back() -> None:
    event, module = Warm(), torch.nn.Linear(2, 3)
    found = through([event, module, Known(3)])
    assert type(found[0]) is Warm
    assert torch.equal(found[1].weight, module.weight)
    assert (type(found[2]), found[2].value) == (Known, 3)


def test_containers_of_flowtrain_come_back() -> None:
    by_phase: PhaseMap[Any] = PhaseMap("cbstate.x", list)
    by_phase[TrainingPhase()].append(1)
    counts = CountsMap("cbstate.history")
    state = State("cbstate")
    state.mine = {"a": torch.ones(1)}
    found = through(
        [by_phase, series(), counts, state, Named("model", {"a": 1}), NamedTensors({"w": torch.ones(2)}, {})]
    )
    assert found[0][TrainingPhase()] == [1]
    assert list(found[1]["Loss"]) == [(1, 0.5)]
    assert len(found[2]) == 0
    assert torch.equal(found[3].mine["a"], torch.ones(1))
    assert dict(found[4]) == {"a": 1}
    assert torch.equal(found[5]["w"], torch.ones(2))
    assert type(found[1]["Loss"]) is Series


def local_class() -> object:
    """Return an object of a class that no module has."""

    @dataclass
    class Inside:
        """Inside."""

    return Inside()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (print, "builtins.print"),
        (os.execv, "posix.execv"),
        (lambda: 1, "<lambda>"),
        (Own(1), "Own"),
        (local_class(), "Inside"),
        (torch.load, "torch.serialization.load"),
        ("text".upper, "str.upper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_runs_code_is_not_written(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=r"cannot be in a file") as caught:
        through([value])
    assert named in str(caught.value)


class Evil:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (Evil(os.execv, "/bin/true", ("true",)), "posix.execv"),
        (Evil(eval, "1"), "builtins.eval"),
        (Evil(getattr, "text", "upper"), "builtins.getattr"),
        (Evil(pickle.loads, b"N."), "_pickle.loads"),
        (Evil(torch.load, "file"), "torch.serialization.load"),
        (Evil(Own, 1), "Own"),
        (Evil(type, "A", (), {}), "builtins.type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_others_calls_nothing(evil: Evil, named: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which is no type of a value, or is not imported") as caught:
        loads(pickle.dumps([evil]))
    assert named in str(caught.value)


def test_the_pickles_for_workers_are_refused() -> None:
    """They may hold a tensor that torch unpickles, and code by value."""
    for value in (torch.eye(2).to_sparse(), lambda: 1):
        with pytest.raises(pickle.UnpicklingError):
            decode(encode(value), loads)


def test_reading_imports_nothing() -> None:
    module = "colorsys"
    before = sys.modules.pop(module, None)
    with pytest.raises(pickle.UnpicklingError, match=f"it names {module}.rgb_to_hsv"):
        loads(f"c{module}\nrgb_to_hsv\n.".encode())
    assert module not in sys.modules
    if before is not None:
        sys.modules[module] = before


def test_phases_of_a_user_are_plain() -> None:
    class Late(Phase):
        """A phase that no module has."""

    with pytest.raises(TypeError, match="Late cannot be in a file without code"):
        through(Late())
