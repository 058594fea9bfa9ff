"""The names of callbacks: unique in a learner, and kept while the list changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flowtrain import Callback, CallbackError
from flowtrain.callbacks import Recorder
from flowtrain.graph.registry import unique_names
from flowtrain.testing import tiny_learner


class At(Callback):
    """Is given a name, or none."""

    def __init__(self, name: str = "") -> None:
        self.name = name


class Other(At): ...


def named(*callbacks: Callback) -> list[str]:
    return [name for _, name in unique_names(list(callbacks))]


def test_names_are_unique() -> None:
    assert named(At(), Other(), At(), At()) == ["At", "Other", "At#2", "At#3"]


def test_a_name_of_ones_own_is_kept_and_never_given_away() -> None:
    assert named(At(), At(name="At#2"), At(), At(name="mine")) == ["At", "At#2", "At#3", "mine"]
    assert named(Other(), At(name="Other")) == ["Other#2", "Other"]


def test_names_stay_when_the_list_changes() -> None:
    learner = tiny_learner(At(), At(), At(), default_callbacks=False)
    learner.remove_callback("At#2")
    assert [callback.name for callback in learner.callbacks] == ["At", "At#3"]
    learner.add_callback(At())
    assert [callback.name for callback in learner.callbacks] == ["At", "At#3", "At#2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: [At(name="mine"), Other(name="mine")],
            "Two callbacks have the name 'mine'. A name is unique in a learner: change one.",
        ),
        (lambda: [At], "At is a class. Pass an instance: At()."),
        (
            lambda: [print],
            "<built-in function print> is no callback. Subclass flowtrain.Callback, or wrap a function: "
            "CustomCallback(f, EpochEnd, TrainingPhase).",
        ),
        (lambda: [At()] * 2, "<At> is in the list twice. Make two instances if you want two."),
    ],
)
def test_what_is_no_list_of_callbacks(make: Callable[[], list[Any]], message: str) -> None:
    with pytest.raises(CallbackError) as caught:
        unique_names(make())
    assert str(caught.value) == message


def test_a_name_stays_with_its_callback_wherever_it_stands() -> None:
    """It is the key of its state."""
    first = Recorder()
    first.name = "Recorder"
    second = Recorder()
    assert unique_names([second, first]) == [(second, "Recorder#2"), (first, "Recorder")]
