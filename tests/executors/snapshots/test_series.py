"""Rule 22: series as they were, in constant time; and what of them another process is shown."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import BatchEnd, Phase, ProtectedException, TrainingPhase, UsageError, ValidationPhase
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.readonly import readonly
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask.cluster.codec import decode, dump_entries, encode, load_entries
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cut, CutMap, Cutter
from tests.support.examples import examples
from tests.support.untyped import untyped

PATH = ("cbstate", "metrics_step")


def series(count: int, *, late: bool = False) -> Series:
    made = Series("cbstate.smooth_loss", late)
    for step in range(count):
        made.push(torch.tensor(step / 2), step)
    return made


def by_phase() -> PhaseMap[Any]:
    return PhaseMap("cbstate.metrics_step", lambda: SeriesMap("cbstate.metrics_step"))


def taken(metrics: PhaseMap[Any], cutter: Cutter) -> Any:
    """What a snapshot holds of series by phase."""
    found = cutter.by_phase(metrics)
    value = Copying(COPIERS, Pool(0), cutter=cutter).copy(metrics) if found is None else found
    cutter.end_event()
    return value


def shown(value: Any) -> Any:
    """What a handler is given for it."""
    return readonly(value, "cbstate.metrics_step")


def travelled(value: Any) -> Any:
    """What another process gets."""
    return decode(encode(value))


def sent(values: Sequence[Any]) -> list[Any]:
    """What another process gets of the events of one batch."""
    entries = [Entry(at, 0, BatchEnd(), TrainingPhase(), {PATH: value}, 0) for at, value in enumerate(values)]
    return [entry.payload[PATH] for entry in load_entries(bytes(dump_entries(entries)))]


# --- one series


@pytest.mark.parametrize("late", [False, True])
def test_a_cut_shows_what_was_there(late: bool) -> None:
    live = series(3, late=late)
    cut = Cutter().series(live)
    live.push(9.0, 9)
    for each in (cut, pickle.loads(pickle.dumps(cut))):
        assert (len(each), each.last(), each.newest()) == (3, (2, 1.0), 1.0)
        assert list(each) == [(0, 0.0), (1, 0.5), (2, 1.0)]
        assert (each.since(2), each.since(-1), each.since(7)) == ([1.0], [1.0], [])
        assert (each.steps, each.values) == ([0, 1, 2], [0.0, 0.5, 1.0])
        assert list(copy.copy(each)) == list(each)
    assert len(live) == 4


def test_a_cut_copies_no_values() -> None:
    live = series(5)
    assert Cut(live, 5)._values is live._values  # pyright: ignore[reportPrivateUsage]  # what makes it constant time


def tail_of(live: Series, start: int, *, late: bool = False) -> Series:
    """What a handler in another process is shown, whose last event was when the series had `start` values."""
    first = Series(live._path, late)  # pyright: ignore[reportPrivateUsage]  # its path
    cutter = Cutter(tail=True, late=late)
    for at, (step, value) in enumerate(zip(range(len(live)), live.since(0), strict=True)):
        if at == start:
            cutter.series(first)
            cutter.end_event()
        first.push(torch.tensor(value), step)
    if start == len(live):
        cutter.series(first)
        cutter.end_event()
    shown = cutter.series(first)
    first.push(9.0, 9)
    return shown


@pytest.mark.parametrize("late", [False, True])
def test_a_tail_has_the_newest_values(late: bool) -> None:
    tail = tail_of(series(10), 7, late=late)
    for each in (tail, pickle.loads(pickle.dumps(tail))):
        assert (len(each), each.last(), each.newest()) == (10, (9, 4.5), 4.5)
        assert (each.since(7), each.since(9), each.since(-2)) == ([3.5, 4.0, 4.5], [4.5], [4.0, 4.5])
        with pytest.raises(UsageError, match=r'since\(6\) asks.*from position 7 on.*smooth_loss": Read\(full=True\)'):
            each.since(6)
        with pytest.raises(UsageError, match=r"it is iterated over, but the handler runs in another process"):
            list(each)


def test_a_tail_refuses_to_be_iterated_over_at_the_first_event_too() -> None:
    """Else the handler would work at its first event, and fail at the second."""
    for each in (tail_of(series(3), 0), pickle.loads(pickle.dumps(tail_of(series(3), 0)))):
        assert each.since(0) == [0.0, 0.5, 1.0]
        with pytest.raises(UsageError, match="it is iterated over"):
            list(each)


def test_positions_are_those_of_the_series() -> None:
    live = series(5)
    cut, tail = Cutter().series(live), tail_of(series(5), 3)
    live.push(9.0, 9)
    assert (cut[-1], cut[0], cut[3:]) == ((4, 2.0), (0, 0.0), [(3, 1.5), (4, 2.0)])
    assert cut.values == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert torch.as_tensor(cut).shape == (5, 2)
    for each in (tail, pickle.loads(pickle.dumps(tail))):
        assert (each[-1], each[3]) == ((4, 2.0), (3, 1.5))
        with pytest.raises(UsageError, match=r"position 2 is asked for.*from position 3 on.*Read\(full=True\)"):
            _ = each[2]
        with pytest.raises(UsageError, match="it is iterated over"):
            _ = each.values


@pytest.mark.parametrize("late", [False, True])
def test_a_tail_without_news_still_has_the_newest(late: bool) -> None:
    tail = tail_of(series(4), 4, late=late)
    for each in (tail, pickle.loads(pickle.dumps(tail))):
        assert (each.last(), each.since(4), each.since(3)) == ((3, 1.5), [], [1.5])


def test_an_empty_series() -> None:
    for each in (Cutter().series(series(0)), Cutter(tail=True).series(series(0))):
        for frozen in (each, pickle.loads(pickle.dumps(each))):
            assert len(frozen) == 0
            assert frozen.since(0) == []
            with pytest.raises(LookupError, match="smooth_loss is empty: nothing has been recorded yet"):
                frozen.last()


def test_nothing_can_be_added() -> None:
    for frozen in (Cutter().series(series(1)), Cutter(tail=True).series(series(1))):
        with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.smooth_loss disallowed"):
            frozen.push(1.0, 1)
        with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.smooth_loss disallowed"):
            frozen.__twin__().push(1.0, 1)


def test_of_a_device_only_what_is_sent_is_read_when_somebody_asks() -> None:
    """On the way to another process the values leave the device with the cut; elements of a tensor stay as they are."""
    live = Series("cbstate.x", late=True)
    first, whole = torch.tensor(0.5), torch.tensor([1.0, 2.0])
    live.push(first, 0)
    live.push(whole, 1)
    cut = Cutter(tail=True, late=True).series(live)
    first.fill_(7.0)  # its value was sent when the cut was made
    found = cut.since(0)
    assert found[0] == 0.5
    assert torch.equal(found[1], whole)
    assert type(live._values[0]) is torch.Tensor  # pyright: ignore[reportPrivateUsage]  # nobody has waited for it


# --- series by name and by phase

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
@given(pushes, st.integers(1, 4), st.booleans())
def test_each_event_sees_what_was_there(events: list[list[Push]], batch: int, late: bool) -> None:
    """All of it here, and elsewhere the length, the newest, and what came since the event before."""
    metrics, here, there = by_phase(), Cutter(late=late), Cutter(tail=True, late=late)
    wanted: list[dict[tuple[Phase, str], list[tuple[int, float]]]] = []
    cuts, tails = list[Any](), list[Any]()
    step = 0
    for event in events:
        for phase, name, count in event:
            for _ in range(count):
                step += 1
                metrics[phase].push(name, step / 2, step)
            metrics[phase].series(name)
        wanted.append({(phase, name): list(series) for phase in metrics for name, series in metrics[phase].items()})
        cuts.append(taken(metrics, here))
        tails.append(taken(metrics, there))
    metrics[TrainingPhase].push("a", -1.0, step + 1)  # nobody sees what comes later
    for expected, cut in zip(wanted, map(shown, cuts), strict=True):
        assert {(phase, name): list(cut[phase][name]) for phase in cut for name in cut[phase]} == expected
    found = [one for start in range(0, len(tails), batch) for one in sent(tails[start : start + batch])]
    before: dict[Any, list[Any]] = {}
    for expected, tail, local in zip(wanted, map(shown, found), map(shown, tails), strict=True):
        assert {(phase, name) for phase in tail for name in tail[phase]} == set(expected)
        for key, pairs in expected.items():
            old = len(before.get(key, ()))
            for series in (tail[key[0]][key[1]], local[key[0]][key[1]]):
                assert len(series) == len(pairs)
                assert series.since(old) == [value for _, value in pairs[old:]]
                assert not pairs or series.last() == pairs[-1]
        before = expected


@pytest.mark.parametrize(
    "take",
    [
        lambda metrics: Copying(COPIERS, Pool(0)).copy(metrics),
        lambda metrics: travelled(Copying(COPIERS, Pool(0), cutter=Cutter(tail=True)).copy(metrics)),
        lambda metrics: taken(metrics, Cutter()),
        lambda metrics: travelled(taken(metrics, Cutter())),
        lambda metrics: taken(metrics, Cutter(tail=True)),
        lambda metrics: travelled(taken(metrics, Cutter(tail=True))),
        lambda metrics: travelled(taken(metrics, Cutter(tail=True, late=True))),
    ],
    ids=["copied", "copied for elsewhere", "here", "here, pickled", "tail", "elsewhere", "elsewhere, of a device"],
)
def test_a_view_shows_them_as_it_shows_live_ones(take: Callable[[Any], Any]) -> None:
    metrics, wrong = by_phase(), cast(Any, 3)
    metrics[TrainingPhase].push("Loss", 0.5, 1)
    found = shown(take(metrics))
    assert list(found) == [TrainingPhase()]
    assert TrainingPhase in found
    assert ValidationPhase not in found
    assert found.get(ValidationPhase) is None
    assert len(found[ValidationPhase]) == 0, "as in place: an empty map, and reading adds nothing"
    assert len(found) == 1
    assert found[TrainingPhase()] is found[TrainingPhase]
    assert found[TrainingPhase]["Loss"].last() == (1, 0.5)
    assert [(name, len(each)) for name, each in found[TrainingPhase].items()] == [("Loss", 1)]
    with pytest.raises(KeyError, match=r"cbstate\.metrics_step has no series 'Lose'; it has: Loss"):
        found[TrainingPhase]["Lose"]
    with pytest.raises(KeyError, match="is kept by phase, and 3 is not one"):
        found[wrong]
    with pytest.raises(ProtectedException):
        found[TrainingPhase] = SeriesMap("x")
    with pytest.raises(ProtectedException):
        found[TrainingPhase].push("Loss", 1.0, 2)
    for series in (found[TrainingPhase]["Loss"], found[TrainingPhase].series("Loss")):
        with pytest.raises(ProtectedException):
            series.push(1.0, 2)


def test_elsewhere_older_values_are_refused() -> None:
    metrics, cutter = by_phase(), Cutter(tail=True)
    for step in range(3):
        metrics[TrainingPhase].push("Loss", step / 2, step)
    taken(metrics, cutter)
    metrics[TrainingPhase].push("Loss", 1.5, 3)
    event = taken(metrics, cutter)
    for found in (shown(event), shown(travelled(event))):
        with pytest.raises(UsageError, match=r"since\(1\) asks for values from position 1 on.*Read\(full=True\)"):
            found[TrainingPhase]["Loss"].since(1)


@pytest.mark.parametrize("late", [False, True])
def test_all_is_sent_again_after_values_were_taken_back(late: bool) -> None:
    """A checkpoint was loaded: the handler's own state went back too, and asks for what it has seen before."""
    metrics, cutter = by_phase(), Cutter(tail=True, late=late)
    for step in range(3):
        metrics[TrainingPhase].push("Loss", step / 2, step)
    taken(metrics, cutter)
    series = metrics[TrainingPhase]["Loss"]
    series.__fill__({"steps": [7, 8, 9], "values": [7.0, 8.0, 9.0]}, {})
    assert shown(travelled(taken(metrics, cutter)))[TrainingPhase]["Loss"].since(0) == [7.0, 8.0, 9.0]
    series.__rewind__(2)
    assert shown(travelled(taken(metrics, cutter)))[TrainingPhase]["Loss"].since(0) == [7.0, 8.0]


def test_a_series_that_is_replaced_is_another_one() -> None:
    metrics, cutter = by_phase(), Cutter(tail=True)
    for value in (0.5, 1.0):
        metrics[TrainingPhase].push("Loss", value, 1)
    taken(metrics, cutter)
    metrics[TrainingPhase].__rewind__({})
    for value in (2.0, 3.0, 4.0):
        metrics[TrainingPhase].push("Loss", value, 1)
    assert shown(travelled(taken(metrics, cutter)))[TrainingPhase]["Loss"].since(0) == [2.0, 3.0, 4.0]
    metrics[TrainingPhase] = SeriesMap("cbstate.metrics_step")
    metrics[TrainingPhase].push("Loss", 5.0, 1)
    assert shown(travelled(taken(metrics, cutter)))[TrainingPhase]["Loss"].since(0) == [5.0]
    del metrics[TrainingPhase]
    assert list(shown(taken(metrics, cutter))) == []


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_a_snapshot_keeps_the_values_that_the_series_drops(tail: bool, late: bool) -> None:
    """Three events wait while training drops values; each shows what was there, and how many were dropped before."""
    metrics, cutter, waiting, expected = by_phase(), Cutter(tail=tail, late=late), list[Any](), list[Any]()
    live = metrics[TrainingPhase()].series("Loss")
    live._late = late
    for step in range(12):
        live.push(torch.tensor(float(step)), step)
        live.shorten(3)
        waiting.append(taken(metrics, cutter))
        expected.append((len(live), live.dropped, live.last(), list(live)))
    for event, (length, dropped, last, pairs) in zip(sent(waiting) if tail else waiting, expected, strict=True):
        cut = shown(event)[TrainingPhase]["Loss"]
        assert (len(cut), cut.dropped, cut.last()) == (length, dropped, last)
        if not tail:
            assert list(cut) == pairs


def test_to_take_series_by_name_makes_none_of_them_at_each_event() -> None:
    """Those of the first event share the lists of the live ones, and serve the later events."""
    metrics = by_phase()
    for cutter in (Cutter(), Cutter(tail=True)):
        made: list[Any] = []
        for step in range(3):
            metrics[TrainingPhase].push("Loss", 0.5, step)
            found = shown(taken(metrics, cutter))[TrainingPhase]
            assert type(found) is CutMap
            made.append(untyped(found)._series["Loss"])
        assert made[0] is made[1] is made[2]
        assert made[0]._values is untyped(metrics[TrainingPhase]["Loss"])._values


def test_what_travels_does_not_grow_with_the_series() -> None:
    """An event of a long training: the values since the event before, and no others."""
    metrics, cutter = by_phase(), Cutter(tail=True)
    for step in range(10_000):
        metrics[TrainingPhase].push("Loss", step / 2, step)
        metrics[ValidationPhase].push("Loss", step / 2, step)
    taken(metrics, cutter)
    metrics[TrainingPhase].push("Loss", 0.5, 10_000)
    assert len(encode(taken(metrics, cutter))) < 1000


def test_a_batch_has_each_value_once() -> None:
    """Its events share the values: an event costs its lengths, and not an object for each series."""
    metrics, cutter = by_phase(), Cutter(tail=True)
    batch = list[Any]()
    for step in range(50):
        for name in ("Loss", "Accuracy"):
            metrics[TrainingPhase].push(name, step + 0.5, step)
        batch.append(taken(metrics, cutter))
    found = [shown(each)[TrainingPhase] for each in sent(batch)]
    assert len({id(each._series["Loss"]) for each in found}) == 1
    assert [each["Accuracy"].since(at) for at, each in enumerate(found)] == [[step + 0.5] for step in range(50)]
    assert [len(each["Loss"]) for each in found] == [*range(1, 51)]
    with pytest.raises(UsageError, match=r"since\(8\) asks for values from position 8 on.*from position 9 on"):
        found[9]["Loss"].since(8)


def test_events_between_which_nothing_came_have_the_series_once() -> None:
    """A batch has what was the case at all of its events, such as the series of a validation, in it only once."""
    metrics, cutter = by_phase(), Cutter(tail=True)
    metrics[TrainingPhase].push("Loss", 0.5, 1)
    first, second, third, fourth = (shown(taken(metrics, cutter))[TrainingPhase] for _ in range(4))
    assert [len(each["Loss"].since(-1)) for each in (first, second, third)] == [1, 1, 1]
    assert first["Loss"].since(0) == [0.5]
    assert third is fourth is not first
    metrics[TrainingPhase].push("Loss", 0.25, 2)
    assert shown(taken(metrics, cutter))[TrainingPhase]["Loss"].since(1) == [0.25]


def test_what_has_travelled_travels_on() -> None:
    """A callback keeps the series in an attribute, and its state comes home."""
    metrics, cutter = by_phase(), Cutter(tail=True)
    for step in range(3):
        metrics[TrainingPhase].push("Loss", step / 2, step)
        metrics[TrainingPhase].push("Accuracy", step / 4, step)
    event = taken(metrics, cutter)
    found = shown(event)[TrainingPhase]
    for each in (
        found,
        travelled(found),
        travelled(travelled(found)),
        travelled(shown(travelled(event)))[TrainingPhase],
    ):
        assert each["Loss"].last() == travelled(each["Loss"]).last() == (2, 1.0)
        assert each["Accuracy"].since(2) == [0.5]
        assert len(each["Accuracy"]) == 3


def test_a_map_by_phase_of_something_else_is_copied_as_all_else_is() -> None:
    numbers: PhaseMap[Any] = PhaseMap("cbstate.x", lambda: 0)
    assert Cutter().by_phase(numbers) is None, "empty, but its phases will not be series"
    numbers[TrainingPhase] = 1
    assert Cutter().by_phase(numbers) is None
    one = PhaseMap[Any]("cbstate.x", lambda: Series("cbstate.x"))
    one[TrainingPhase].push(0.5, 1)
    assert Cutter().by_phase(one) is None

    class Own(SeriesMap):
        pass

    assert Cutter().by_phase(PhaseMap("cbstate.x", lambda: Own("cbstate.x"))) is None
    metrics = by_phase()
    metrics[TrainingPhase].push("Loss", 0.5, 1)
    metrics[ValidationPhase] = Own("cbstate.metrics_step")
    cutter = Cutter(tail=True)
    assert cutter.by_phase(metrics) is None
    found = Copying(COPIERS, Pool(0), cutter=cutter).copy(metrics)
    assert found[TrainingPhase]["Loss"].since(0) == [0.5], "a cut that was not used does not count as shown"
