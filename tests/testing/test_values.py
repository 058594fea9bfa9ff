"""Values by path: the values of a learner are found, and compared bit for bit instead of by identity."""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import TrainingPhase, ValidationPhase
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.series import Series, SeriesMap
from flowtrain.testing import tiny_learner
from flowtrain.testing.values import learner_leaves, show_difference, values_in


def by_path(value: Any) -> dict[str, str]:
    return {path: leaf.shown for path, leaf in values_in(value, "x")}


def bits(value: Any) -> dict[str, object]:
    return {path: leaf.bits for path, leaf in values_in(value, "x")}


@dataclass
class Box:
    """An object with attributes."""

    inside: Any


class Slotted:
    __slots__ = ("__hidden", "shown")

    def __init__(self, hidden: int) -> None:
        self.__hidden = hidden
        self.shown = [hidden]


def series() -> Series:
    found = Series("x")
    found.push(0.5, 1)
    found.push(float("nan"), 2)
    return found


def test_paths_read_like_python() -> None:
    assert by_path({"a": [1, Box(2.5)], TrainingPhase(): None}) == {
        "x": "keys 'a', TrainingPhase",
        "x['a']": "2 items",
        "x['a'][0]": "1",
        "x['a'][1]": "Box",
        "x['a'][1].inside": "2.5",
        "x[TrainingPhase]": "None",
    }
    phases: PhaseMap[SeriesMap] = PhaseMap("x", lambda: SeriesMap("x"))
    phases[TrainingPhase].push("Loss", 0.5, 3)
    assert by_path(phases)["x[TrainingPhase]['Loss'][0][1]"] == "0.5"


VALUES: list[tuple[Any, Any]] = [
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    (1.0, 1.0000000000000002),
    (complex(0, 0.0), complex(0, -0.0)),
    ("a", b"a"),
    ([1, 2], [2, 1]),
    ([1], (1, 1)),
    ({1, 2}, {1, 3}),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    (Box([1]), Box([2])),
    (Slotted(1), Slotted(2)),
    (partial(max, 1), partial(max, 2)),
    (Path("a"), Path("b")),
    (torch.zeros(2), torch.zeros(3)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    (torch.zeros(2), torch.tensor([0.0, -0.0])),
    (torch.tensor([1 + 1j]), torch.tensor([1 + 1j]).conj()),
    (np.zeros(2), np.array([0, 1.0])),
    (np.float32(1), np.float32(2)),
    (torch.float32, torch.float64),
    (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)),
    (torch.nn.Dropout(), torch.nn.Dropout().eval()),
    (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    (random.Random(1), random.Random(2)),
    (series(), Series("x")),
]


@pytest.mark.parametrize(
    ("one", "other"), VALUES, ids=[f"{type(one).__name__}-{n}" for n, (one, _) in enumerate(VALUES)]
)
def test_what_differs_and_what_does_not(one: Any, other: Any) -> None:
    """A copy is equal, even with ``nan``; a difference of one bit is found."""
    again = one.clone_state() if isinstance(one, torch.Generator) else copy.deepcopy(one)
    assert bits(one) == bits(again)
    assert bits(one) != bits(other)


def test_the_order_of_entries_is_not_compared() -> None:
    """Independent callbacks may add their entries in any order."""
    assert bits({"a": 1, "b": 2}) == bits({"b": 2, "a": 1})


def test_what_is_not_looked_into() -> None:
    """Each run has its own locks, learners and functions, so they are not compared."""
    with tiny_learner() as one, tiny_learner() as other:
        for make in (threading.Lock, object):
            assert bits([make()]) == bits([make()])
        assert bits([one, one.executor]) == bits([other, other.executor])
    assert by_path(by_path)["x"].endswith(".by_path")


def test_a_value_that_holds_itself() -> None:
    value: list[Any] = [1]
    value.append({"again": value})
    assert by_path(value)["x[1]['again']"] == "the same as x"
    shared = [1]
    assert by_path([shared, shared])["x[1][0]"] == "1"


def test_all_of_a_learner() -> None:
    with tiny_learner(
        model={"one": torch.nn.Linear(1, 1), "two": torch.nn.BatchNorm1d(1)},
        optimizer={"one": torch.optim.AdamW},
        data={},
    ) as learner:
        learner.state.params["one.weight"].grad = torch.ones(1, 1)
        learner.core.step(["one"])
        found = dict(learner_leaves(learner))
        for path in (
            "model.one.weight",
            "model.two.running_mean",
            "model.two.training",
            "optimizer.one.param_groups[0]['lr']",
            "optimizer.one.state['one.weight']['exp_avg']",
            "cbstate.history",
            "callbacks.Metrics.name",
        ):
            assert path in found, [*found]
        assert found["callbacks.Metrics.name"].shown == "'Metrics'"
    with tiny_learner(n_batches=2) as learner:
        learner.fit(1)
        found = dict(learner_leaves(learner))
        assert found["cbstate.history[ValidationPhase]"].shown == "4 items"
        assert learner.cbstate.history[ValidationPhase].steps == 2
        assert "batch.outputs" in found


def test_how_a_difference_is_shown() -> None:
    def shown(one: Any, other: Any) -> tuple[str, str]:
        return show_difference(dict(values_in(one, "x"))["x"], dict(values_in(other, "x"))["x"])

    far = torch.zeros(2, 2)
    far[1, 0] = 1.5
    assert shown(torch.zeros(2, 2), far) == ("0.0 at [1, 0]", "1.5 at [1, 0]")
    assert shown(torch.tensor(1), torch.tensor(2)) == ("1 (torch.int64, shape ())", "2 (torch.int64, shape ())")
    assert shown(torch.zeros(2), torch.zeros(3))[1] == "a tensor (torch.float32, shape (3,))"
    assert show_difference(None, dict(values_in(1, "x"))["x"]) == ("not there", "1")
