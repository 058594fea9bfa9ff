"""Containers with values by phase, and counters, each with its read-only twin."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import TrainingPhase, ValidationPhase
from flowtrain.callback.phases import Phase
from flowtrain.errors import ProtectedException
from flowtrain.state.by_phase import CONTAINERS, Counts, CountsMap, PhaseMap
from flowtrain.state.readonly import readonly
from flowtrain.state.series import Series, SeriesMap
from tests.support.fired import OODPhase
from tests.support.untyped import untyped

# --- by phase


def test_a_phase_and_its_type_are_one_key() -> None:
    seen: PhaseMap[int] = PhaseMap("cbstate.seen")
    seen[TrainingPhase] = 1
    seen[ValidationPhase()] = 2
    keys: list[Any] = [TrainingPhase, TrainingPhase()]
    for key in keys:
        assert seen[key] == 1
        assert key in seen
        assert seen.get(key) == 1
    assert list(seen) == [TrainingPhase(), ValidationPhase()]
    del seen[TrainingPhase]
    assert all(key not in seen for key in keys)
    assert seen.get(TrainingPhase, "none") == "none"


def test_a_key_that_is_not_there() -> None:
    seen: PhaseMap[int] = PhaseMap("cbstate.seen")
    with pytest.raises(KeyError) as caught:
        seen[TrainingPhase]
    assert caught.value.args == (
        "cbstate.seen has nothing for TrainingPhase; it has: none yet. Where an entry may be missing, write "
        ".get(TrainingPhase).",
    )
    seen[ValidationPhase] = 1
    with pytest.raises(KeyError) as caught:
        seen[TrainingPhase()]
    assert caught.value.args == (
        "cbstate.seen has nothing for TrainingPhase; it has: ValidationPhase. Where an entry may be missing, write "
        ".get(TrainingPhase).",
    )
    for use in (lambda: untyped(seen)["TrainingPhase"], lambda: seen.__setitem__(untyped("TrainingPhase"), 1)):
        with pytest.raises(KeyError) as caught:
            use()
        assert caught.value.args == (
            "cbstate.seen is kept by phase, and 'TrainingPhase' is not one. Write cbstate.seen[phase] or "
            "cbstate.seen[TrainingPhase].",
        )


def test_asking_makes_nothing_and_looking_up_makes_the_value() -> None:
    seen: PhaseMap[list[int]] = PhaseMap("cbstate.seen", list)
    assert TrainingPhase() not in seen
    assert seen.get(TrainingPhase) is None
    assert len(seen) == 0
    seen[TrainingPhase].append(1)
    assert seen[TrainingPhase()] == [1]


PHASES: list[Any] = [TrainingPhase, TrainingPhase(), ValidationPhase, OODPhase()]
CHANGES = ["x[P] = [0]", "x[P].append(0)", "if P in x: del x[P]", "x.pop(P, None)", "x.setdefault(P, [1])",
           "x.update({P: [2]})", "x |= {P: [3]}", "if x: x.popitem()", "x.clear()"]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.sampled_from(PHASES)), max_size=12), st.integers(0, 12))
def test_twins_stay_in_step(steps: list[tuple[str, Any]], watched_from: int) -> None:
    """After any change of the original, a twin made before or after it shows the same content in every way."""
    seen: PhaseMap[Any] = PhaseMap("cbstate.seen", list)
    for number, (statement, phase) in enumerate(steps):
        if number == watched_from:
            readonly(seen, "")
        exec(statement, {"x": seen, "P": phase})
        assert not any(isinstance(key, type) for key in list[Any](seen))
    twin = readonly(seen, "")
    assert readonly(seen, "") is twin
    assert list(twin) == list(seen)
    assert len(twin) == len(seen)
    assert dict(twin.items()) == dict(seen.items())
    assert set(twin.keys()) == set(seen.keys())
    for phase in PHASES:
        assert (phase in twin) == (phase in seen)
        assert twin.get(phase) == seen.get(phase)
    for phase in seen:
        with pytest.raises(ProtectedException):
            twin[phase].append(9)


@pytest.mark.parametrize("statement", ["x[P] = 1", "del x[P]", "x.pop(P)", "x.popitem()", "x.clear()", "x |= {P: 1}",
                                       "x.update({P: 1})", "x.setdefault(P, 1)"])  # fmt: skip
def test_the_twin_of_a_map_by_phase_refuses_changes(statement: str) -> None:
    seen: PhaseMap[int] = PhaseMap("cbstate.seen")
    seen[TrainingPhase] = 5
    with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.seen disallowed"):
        exec(statement, {"x": readonly(seen, ""), "P": TrainingPhase})
    assert dict(seen) == {TrainingPhase(): 5}


def test_a_reader_meets_a_new_phase_first() -> None:
    """A reader that comes before any writer sees an empty series, the one that the writer fills later."""
    metrics = CONTAINERS["metrics_epoch"]("cbstate.metrics_epoch")
    twin = readonly(metrics, "")
    empty = twin[OODPhase]
    assert len(empty) == 0
    metrics[OODPhase()].push("Loss", 1.0, 1)
    assert empty["Loss"].last() == (1, 1.0)


def test_copies_have_twins_of_their_own() -> None:
    seen: PhaseMap[list[int]] = PhaseMap("cbstate.seen", list)
    seen[TrainingPhase].append(1)
    twin = readonly(seen, "")
    for other in (copy.deepcopy(seen), copy.deepcopy(twin)):
        assert type(other) is PhaseMap
        other[TrainingPhase].append(2)
        other[ValidationPhase].append(3)
        assert readonly(other, "")[ValidationPhase] == [3]
    assert dict(seen) == {TrainingPhase(): [1]}
    assert list(twin) == [TrainingPhase()]


# --- counters


def test_counts() -> None:
    counts = Counts((1, 20, 4, 5))
    assert (counts.epochs, counts.steps, counts.steps_epoch, counts.updates) == (1, 20, 4, 5)
    assert repr(counts) == "Counts(epochs=1, steps=20, steps_epoch=4, updates=5)"
    with pytest.raises(AttributeError):
        counts.steps = 2


def test_counts_by_phase_begin_at_zero_and_are_shown_live() -> None:
    history = CountsMap("cbstate.history")
    twin: Any = readonly(history, "")
    assert isinstance(twin, MappingProxyType)
    assert twin[TrainingPhase] == Counts((0, 0, 0, 0))
    history[TrainingPhase()] = Counts((1, 2, 2, 2))
    assert twin[TrainingPhase].steps == twin[TrainingPhase()].steps == 2
    assert TrainingPhase in twin
    assert twin.get(OODPhase) is None
    with pytest.raises(TypeError):
        exec("x[P] = 1", {"x": twin, "P": TrainingPhase()})


def test_reading_a_phase_that_is_not_there_adds_nothing_and_the_reader_sees_what_comes() -> None:
    """Rule 13: a deferred handler reads a copy, so an entry added by its read would be missing in the original."""
    counts = CountsMap("cbstate.history")
    assert (readonly(counts, "cbstate.history")[TrainingPhase].steps, list(counts)) == (0, [])
    series = PhaseMap("cbstate.smooth_loss", lambda: Series("cbstate.smooth_loss"))
    held = readonly(series, "cbstate.smooth_loss")[TrainingPhase]
    assert (len(held), list(series)) == (0, [])
    series[TrainingPhase].push(1.5, 1)
    assert held.last() == (1, 1.5)
    assert list(series) == [TrainingPhase()]


# --- the entries of ``cbstate`` that the learner makes


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_containers_that_the_learner_makes(name: str) -> None:
    path = f"cbstate.{name}"
    made = CONTAINERS[name](path)
    assert path in repr(made)
    if isinstance(made, PhaseMap):
        inner = made[Phase]
        assert isinstance(inner, (Counts, Series, SeriesMap))
        if not isinstance(inner, Counts):
            assert path in repr(inner)  # paths name no phase
    else:
        assert isinstance(made, SeriesMap)


def test_a_copy_has_no_readers() -> None:
    by_phase: PhaseMap[list[int]] = PhaseMap("cbstate.x", make=list)
    waiting = by_phase.awaited(TrainingPhase())
    other = copy.copy(by_phase)
    assert other[TrainingPhase] is not waiting
    assert by_phase[TrainingPhase] is waiting
