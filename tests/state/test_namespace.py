"""Namespaces: entries and their twins go together, and a restore point gives all of it back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import TrainingPhase, ValidationPhase
from flowtrain.errors import MissingStateError, ProtectedException, UsageError
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.namespace import State, Twins, restore_point
from flowtrain.state.readonly import ReadOnlyList
from flowtrain.state.series import Series, SeriesMap

# --- entries and their twins


def test_entries_and_twins_go_together() -> None:
    state = State("cbstate")
    state.best = 0.5
    state.seen = [1]
    twins = state.__twins__
    assert (state.best, twins.best) == (0.5, 0.5)
    assert type(state.seen) is list
    assert type(twins.seen) is ReadOnlyList
    assert twins.seen is twins.seen  # one twin for each assigned value
    for namespace in (state, twins):
        assert list(namespace) == ["best", "seen"]
        assert len(namespace) == 2
        assert "seen" in namespace
        assert "other" not in namespace
    state.seen = {"a": 1}
    assert twins.seen == {"a": 1}
    del state.seen
    assert list(state) == list(twins) == ["best"]
    assert (repr(state), repr(twins)) == ("State(cbstate: best)", "Twins(cbstate: best)")


@pytest.mark.parametrize("side", ["state", "twins"])
def test_a_missing_entry_names_what_is_there(side: str) -> None:
    state = State("cbstate")
    seen: Any = state if side == "state" else state.__twins__
    with pytest.raises(MissingStateError) as caught:
        _ = seen.history
    assert str(caught.value) == "cbstate.history does not exist (yet). cbstate has: nothing."
    state.history = 1
    with pytest.raises(MissingStateError) as caught:
        _ = seen.histroy
    assert str(caught.value) == ("cbstate.histroy does not exist (yet). cbstate has: history. Did you mean 'history'?")
    assert caught.value.path == "cbstate.histroy"
    assert not hasattr(seen, "other")


def test_only_what_is_there_can_be_deleted() -> None:
    with pytest.raises(MissingStateError, match=r"cbstate\.x does not exist \(yet\)"):
        del State("cbstate").x


@pytest.mark.parametrize("statement", ["x.best = 1", "del x.best", "x.new = 1"])
def test_twins_cannot_be_assigned(statement: str) -> None:
    state = State("cbstate")
    state.best = 0.5
    with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.\w+ disallowed"):
        exec(statement, {"x": state.__twins__})
    assert list(state) == ["best"]


@pytest.mark.parametrize("made", [CountsMap("cbstate.x"), PhaseMap("cbstate.x"), SeriesMap("cbstate.x"), Series("x")])
def test_a_series_is_filled_and_never_replaced(made: Any) -> None:
    state = State("cbstate")
    state.x = made
    state.x = made  # assigning the same object changes nothing
    with pytest.raises(UsageError) as caught:
        state.x = []
    assert str(caught.value) == (
        f"cbstate.x is a {type(made).__name__} and is filled, never replaced: others hold it. "
        f"Write into it, as cbstate.x[phase] = ... or .push(...)."
    )
    assert state.x is made


def test_a_namespace_inside_has_twins_too() -> None:
    state = State("cbstate")
    state.mine = State("cbstate.mine")
    state.mine.seen = [1]
    twin = state.__twins__.mine
    assert isinstance(twin, Twins)
    assert twin.seen == [1]
    with pytest.raises(ProtectedException, match=r"Learner\.cbstate\.mine\.seen"):
        twin.seen = [2]
    with pytest.raises(MissingStateError) as caught:
        _ = twin.other
    assert str(caught.value) == "cbstate.mine.other does not exist (yet). cbstate.mine has: seen."


# --- restore points

values: st.SearchStrategy[Any] = st.recursive(
    st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.lists(inner, max_size=3).map(deque)
        | st.sets(st.integers(0, 5), max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)
names = st.sampled_from(["a", "b", "c"])


def filled(draw: st.DrawFn, path: str) -> Any:
    kind = draw(st.sampled_from(["plain", "plain", "series", "map", "by phase", "counts", "lists by phase", "state"]))
    if kind == "plain":
        return draw(values)
    if kind == "series":
        series = Series(path)
        for step in range(draw(st.integers(0, 3))):
            series.push(step, step)
        return series
    if kind == "map":
        named = SeriesMap(path)
        for name in draw(st.lists(names, max_size=3)):
            named.push(name, 1, 1)
        return named
    if kind == "counts":
        counts = CountsMap(path)
        counts[TrainingPhase()] = Counts((1, 2, 3, 4))
        return counts
    if kind == "state":
        inner = State(path)
        for name in draw(st.sets(names)):
            setattr(inner, name, draw(values))
        return inner
    by_phase: PhaseMap[Any] = PhaseMap(path, list if kind == "lists by phase" else lambda: SeriesMap(path))
    for phase in draw(st.lists(st.sampled_from([TrainingPhase, ValidationPhase]), max_size=2)):
        if kind == "lists by phase":
            by_phase[phase].append(draw(values))
        else:
            by_phase[phase].push("Loss", 1, 1)
    return by_phase


@st.composite
def states(draw: st.DrawFn) -> State:
    state = State("cbstate")
    for name in draw(st.sets(names)):
        setattr(state, name, filled(draw, f"cbstate.{name}"))
    return state


def content(value: Any) -> Any:
    """Return the content of a value, with the identity of every container in it."""
    if isinstance(value, State):
        return id(value), {name: content(value.__dict__[name]) for name in value}
    if isinstance(value, dict):
        return id(value), {key: content(item) for key, item in value.items()}
    if isinstance(value, (list, deque)):
        return id(value), [content(item) for item in value]
    if isinstance(value, tuple):
        return [content(item) for item in value]
    if isinstance(value, set):
        return id(value), set(value)
    if isinstance(value, Series):
        return id(value), list(value)
    if isinstance(value, SeriesMap):
        return id(value), {name: content(series) for name, series in value.items()}
    return value


def damage(draw: Any, value: Any) -> None:
    """Change a value, or something nested in it, in place and at random."""
    inside: list[Any] = []
    if isinstance(value, (State, dict)):
        inside = list((vars(value) if isinstance(value, State) else value).values())
    elif isinstance(value, (list, deque, tuple)):
        inside = list(value)
    for item in inside:
        if draw(st.booleans()):
            damage(draw, item)
    if isinstance(value, State):
        for name in draw(st.sets(names)):
            if draw(st.booleans()) and name in value:
                delattr(value, name)
            elif not isinstance(value.__dict__.get(name), (PhaseMap, Series, SeriesMap)):
                setattr(value, name, draw(values))
    elif isinstance(value, CountsMap):
        value[ValidationPhase()] = Counts((9, 9, 9, 9))
    elif isinstance(value, PhaseMap):
        exec(draw(st.sampled_from(["x.clear()", "x[P]", "x.update({P: 1})"])), {"x": value, "P": ValidationPhase})
    elif isinstance(value, dict):
        exec(draw(st.sampled_from(["x.clear()", "x.update(z=[1])", "x.pop('a', 0)"])), {"x": value})
    elif isinstance(value, (list, deque)):
        exec(draw(st.sampled_from(["x.clear()", "x.append([1])", "x.reverse()"])), {"x": value})
    elif isinstance(value, set):
        exec(draw(st.sampled_from(["x.clear()", "x.add(77)"])), {"x": value})
    elif isinstance(value, Series):
        value.push(5, 5)
    elif isinstance(value, SeriesMap):
        value.push(draw(st.sampled_from(["a", "new"])), 5, 5)


@given(states(), st.data())
def test_a_restore_point_gives_back_exactly_what_was_there(state: State, data: st.DataObject) -> None:
    """Rule 11: a refused change restores `cbstate` in the same containers, because views hold them."""
    before = content(state)
    restore = restore_point(state)
    draw: Any = data.draw
    damage(draw, state)
    restore()
    assert content(state) == before
    assert list(state) == list(state.__twins__)
    assert list(state) == list(before[1])
    for name in state:
        value, twin = state.__dict__[name], getattr(state.__twins__, name)
        if isinstance(value, PhaseMap):
            assert list(twin.keys()) == list(value)
        elif isinstance(value, (list, dict, deque, set)):
            assert twin == value
        elif isinstance(value, Series):
            assert list(twin) == list(value)
        elif isinstance(value, SeriesMap):
            assert {key: list(series) for key, series in twin.items()} == {
                key: list(series) for key, series in value.items()
            }


@pytest.mark.parametrize("make", [lambda: torch.zeros(2), object, dict])
def test_other_values_come_back_by_reference(make: Callable[[], Any]) -> None:
    state = State("cbstate")
    state.x = value = make()
    restore = restore_point(state)
    state.x = 1
    state.new = 2
    restore()
    assert state.x is value
    assert "new" not in state


def test_a_container_that_holds_itself_is_no_trap() -> None:
    state = State("cbstate")
    state.x = found = list[Any]([1])
    found.append(found)
    restore = restore_point(state)
    state.x.clear()
    restore()
    assert state.x[0] == 1
    assert state.x[1] is state.x


def test_twins_that_are_held_see_the_restored_content() -> None:
    state = State("cbstate")
    state.history = CountsMap("cbstate.history")
    state.seen = [1]
    history, seen = state.__twins__.history, state.__twins__.seen
    restore = restore_point(state)
    state.history[TrainingPhase()] = Counts((1, 1, 1, 1))
    state.seen.append(2)
    restore()
    assert (len(history), list(seen)) == (0, [1])
