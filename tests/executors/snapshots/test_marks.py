"""Marks: series as long as they were, here and elsewhere."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import BatchEnd, Phase, TrainingPhase, UsageError, ValidationPhase
from flowtrain.errors import ProtectedException
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask.cluster.entries import dump_entries, load_entries
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.marks import Marked, Marker
from tests.support.examples import examples

PATH = ("cbstate", "metrics_step")


def make() -> PhaseMap[Any]:
    return PhaseMap("cbstate.metrics_step", lambda: SeriesMap("cbstate.metrics_step"))


def marked(marker: Marker, metrics: PhaseMap[Any]) -> Marked:
    found = marker.mark(metrics)
    assert found is not None
    return found


def travelled(*payloads: Marked) -> list[Any]:
    """What another process gets of events that come in one batch."""
    entries = [Entry(at, 0, BatchEnd(), TrainingPhase(), {PATH: each}, 0) for at, each in enumerate(payloads)]
    return [entry.payload[PATH] for entry in load_entries(bytes(dump_entries(entries)))]


Push = tuple[type[Phase], str, int]
pushes = st.lists(
    st.lists(
        st.tuples(st.sampled_from([TrainingPhase, ValidationPhase]), st.sampled_from("abc"), st.integers(0, 3)),
        max_size=4,
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=examples(200))
@given(pushes, st.integers(1, 4))
def test_each_event_sees_what_was_there(events: list[list[Push]], batch: int) -> None:
    """Rule 22: all of it here, and elsewhere the length, the newest, and what came since the event before."""
    metrics, here, there = make(), Marker(tail=False), Marker(tail=True)
    wanted: list[dict[tuple[Phase, str], list[tuple[int, float]]]] = []
    cuts, tails = list[Marked](), list[Marked]()
    step = 0
    for event in events:
        for phase, name, count in event:
            for _ in range(count):
                step += 1
                metrics[phase].push(name, step / 2, step)
            metrics[phase].series(name)
        wanted.append({(phase, name): list(series) for phase in metrics for name, series in metrics[phase].items()})
        cuts.append(marked(here, metrics))
        tails.append(marked(there, metrics))
    metrics[TrainingPhase].push("a", -1.0, -1)  # nobody sees what comes later
    for expected, cut in zip(wanted, cuts, strict=True):
        assert {(phase, name): list(cut[phase][name]) for phase in cut for name in cut[phase]} == expected
    found = [one for start in range(0, len(tails), batch) for one in travelled(*tails[start : start + batch])]
    before: dict[Any, list[Any]] = {}
    for expected, tail, local in zip(wanted, found, tails, strict=True):
        for key, pairs in expected.items():
            old = len(before.get(key, ()))
            for series in (tail[key[0]][key[1]], local[key[0]][key[1]]):
                assert len(series) == len(pairs)
                assert series.since(old) == [value for _, value in pairs[old:]]
                assert not pairs or series.last() == pairs[-1]
        before = expected


def test_it_is_the_map_that_views_show() -> None:
    metrics, wrong = make(), cast(Any, 3)
    metrics[TrainingPhase].push("Loss", 0.5, 1)
    for shown in (marked(Marker(tail=False), metrics), *travelled(marked(Marker(tail=True), metrics))):
        assert shown.__twin__() is shown
        assert list(shown) == [TrainingPhase()]
        assert TrainingPhase in shown
        assert ValidationPhase not in shown
        assert len(shown) == 1
        assert shown.get(ValidationPhase) is None
        assert len(shown[ValidationPhase]) == 0, "as in place: an empty map, and reading adds nothing"
        assert len(shown) == 1
        assert shown[TrainingPhase()] is shown[TrainingPhase()]
        assert shown[TrainingPhase]["Loss"].last() == (1, 0.5)
        for each in (shown.keys(), shown.values(), shown.items(), reversed(shown), [repr(shown)]):
            assert len(list(each)) == 1, "also what has not been looked at yet"
        assert repr(shown) == repr(metrics.__twin__())
        assert len(shown.copy()) == len(shown | {}) == 1
        assert (shown == shown.copy(), shown != shown.copy()) == (True, False)
        with pytest.raises(KeyError, match=r"has no series 'Lose'.*Did you mean 'Loss'|has no series 'Lose'"):
            shown[TrainingPhase]["Lose"]
        with pytest.raises(KeyError, match="is kept by phase, and 3 is not one"):
            shown[wrong]
        with pytest.raises(ProtectedException):
            shown[TrainingPhase].push("Loss", 1.0, 2)
        with pytest.raises(ProtectedException):
            shown[TrainingPhase] = SeriesMap("x")
        with pytest.raises(ProtectedException):
            shown[TrainingPhase]["Loss"].push(1.0, 2)


def test_elsewhere_older_values_are_refused() -> None:
    metrics, marker = make(), Marker(tail=True)
    for step in range(3):
        metrics[TrainingPhase].push("Loss", step / 2, step)
    marked(marker, metrics)
    metrics[TrainingPhase].push("Loss", 1.5, 3)
    event = marked(marker, metrics)
    for shown in (event, *travelled(event)):
        with pytest.raises(UsageError, match=r"since\(1\) asks for values from position 1 on.*Read\(full=True\)"):
            shown[TrainingPhase]["Loss"].since(1)


def test_all_is_sent_again_after_values_were_taken_back() -> None:
    """A checkpoint was loaded: the handler's own state went back too, and asks for what it has seen before."""
    metrics, marker = make(), Marker(tail=True)
    for step in range(3):
        metrics[TrainingPhase].push("Loss", step / 2, step)
    marked(marker, metrics)
    series = metrics[TrainingPhase]["Loss"]
    series.__fill__({"steps": [7, 8, 9], "values": [7.0, 8.0, 9.0]}, {})
    assert travelled(marked(marker, metrics))[0][TrainingPhase]["Loss"].since(0) == [7.0, 8.0, 9.0]
    series.__rewind__(2)
    assert travelled(marked(marker, metrics))[0][TrainingPhase]["Loss"].since(0) == [7.0, 8.0]


def test_a_series_that_is_replaced_is_another_one() -> None:
    metrics, marker = make(), Marker(tail=True)
    for value in (0.5, 1.0):
        metrics[TrainingPhase].push("Loss", value, 1)
    marked(marker, metrics)
    metrics[TrainingPhase].__rewind__({})
    for value in (2.0, 3.0, 4.0):
        metrics[TrainingPhase].push("Loss", value, 1)
    assert travelled(marked(marker, metrics))[0][TrainingPhase]["Loss"].since(0) == [2.0, 3.0, 4.0]
    del metrics[TrainingPhase]
    assert list(marked(marker, metrics)) == []


def test_what_is_no_series_is_not_marked() -> None:
    numbers: PhaseMap[Any] = PhaseMap("cbstate.x", lambda: 0)
    assert Marker(tail=False).mark(numbers) is None, "empty, but its phases will not be series"
    numbers[TrainingPhase] = 1
    assert Marker(tail=False).mark(numbers) is None
    one = PhaseMap[Any]("cbstate.x", lambda: Series("cbstate.x"))
    one[TrainingPhase].push(0.5, 1)
    assert Marker(tail=False).mark(one) is None

    class Own(SeriesMap):
        pass

    assert Marker(tail=False).mark(PhaseMap("cbstate.x", lambda: Own("cbstate.x"))) is None
    metrics, marker = make(), Marker(tail=False)
    metrics[TrainingPhase].push("Loss", 0.5, 1)
    marked(marker, metrics)
    metrics[ValidationPhase] = Own("cbstate.metrics_step")
    assert marker.mark(metrics) is None
