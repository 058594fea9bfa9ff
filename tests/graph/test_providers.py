"""The table of who provides an entry of ``cbstate``: names only, so held against the bundled callbacks here."""

from __future__ import annotations

import pytest

import flowtrain.callbacks
from flowtrain import Callback, TrainingPhase, Write
from flowtrain.callback.access import declare, union
from flowtrain.graph.checks import PROVIDERS
from flowtrain.state.by_phase import CONTAINERS


def make(name: str) -> Callback:
    """Make a bundled callback by its name."""
    if name == "Traces":
        return flowtrain.callbacks.Traces({"One": lambda learner: 1.0}, TrainingPhase)
    if name == "Scheduler":
        return flowtrain.callbacks.Scheduler({flowtrain.callbacks.LearningRate: 0.1})
    made: Callback = getattr(flowtrain.callbacks, name)()
    return made


def written(callback: Callback) -> set[str]:
    """The entries of ``cbstate`` that a callback, or one of its handlers, declares to write."""
    every = [callback.state_access(), *(handler.access or {} for _, handler in callback.handlers())]
    found = union([declare(access, callback.name) for access in every])
    return {path[1] for path, kind in found if path[0] == "cbstate" and isinstance(kind, Write)}


@pytest.mark.parametrize(("entry", "name"), sorted(PROVIDERS.items()))
def test_the_provider_is_bundled_and_writes_the_entry(entry: str, name: str) -> None:
    """Rule 10: the message for a missing entry names a callback that really makes it."""
    assert name in flowtrain.callbacks.__all__
    assert entry in written(make(name))


@pytest.mark.parametrize("entry", sorted(PROVIDERS))
def test_the_entry_is_one_that_the_learner_makes(entry: str) -> None:
    assert entry in CONTAINERS


def test_no_bundled_entry_is_without_provider() -> None:
    """Every default callback's own entries are in the table."""
    made = {entry for name in ("Recorder", "Metrics", "SmoothLoss") for entry in written(make(name))}
    assert made <= PROVIDERS.keys()
