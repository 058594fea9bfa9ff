"""Where marked series are read from: the learner's own, and what has travelled."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import TrainingPhase, UsageError
from flowtrain.state.series import Series
from flowtrain_dask.snapshots.sources import Here, Layout, Source, There
from tests.support.examples import examples

LAYOUT = Layout("cbstate.x", None, {TrainingPhase(): ("cbstate.x", 0, ("a", "b"))})


def series_of(count: int, path: str = "cbstate.x.a") -> Series:
    series = Series(path)
    for step in range(count):
        series.push(step / 2, 10 + step)
    return series


def travelled(source: Here, before: tuple[int, ...], first: tuple[int, ...], last: tuple[int, ...]) -> There:
    return There(source.layout, pickle.loads(pickle.dumps(source.columns(before, first, last))))


def test_here_all_of_a_series_is_shown_as_long_as_it_was() -> None:
    series = series_of(5)
    source = Here(LAYOUT, [series], tail=False)
    shown = source.series(0, 2, 3)
    series.push(9.0, 99)
    assert list(shown) == [(10, 0.0), (11, 0.5), (12, 1.0)]
    assert (len(shown), shown.last(), shown.since(1)) == (3, (12, 1.0), [0.5, 1.0])
    assert len(source.series(0, 0, 0)) == 0


@pytest.mark.parametrize("where", ["here", "there"])
def test_for_another_process_the_older_values_are_left_out(where: str) -> None:
    here = Here(LAYOUT, [series_of(5)], tail=True)
    source: Source = here if where == "here" else travelled(here, (0,), (5,), (5,))
    shown = source.series(0, 2, 4)
    assert (len(shown), shown.last(), shown.since(2)) == (4, (13, 1.5), [1.0, 1.5])
    with pytest.raises(UsageError, match=r"since\(1\) asks for values from position 1 on"):
        shown.since(1)
    with pytest.raises(UsageError, match="it is iterated over"):
        list(shown)


@settings(max_examples=examples(100))
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(0, 3))
def test_what_has_travelled_shows_what_the_learner_would_show(growth: list[int], later: int) -> None:
    """For each event of a batch; the first number is how long the series was before it."""
    lengths = [sum(growth[:end]) for end in range(1, len(growth) + 1)]
    series = series_of(lengths[-1] + later)
    here = Here(LAYOUT, [series], tail=True)
    there = travelled(here, (lengths[0],), (lengths[1],), (lengths[-1],))
    for before, length in pairwise(lengths):
        for shown in (here.series(0, before, length), there.series(0, before, length)):
            assert len(shown) == length
            assert shown.since(before) == [step / 2 for step in range(before, length)]
            assert not length or shown.last() == (9 + length, (length - 1) / 2)


def test_a_column_holds_what_its_batch_needs() -> None:
    """From the first event on, and the newest value always; what came after the last event stays behind."""
    source = Here(LAYOUT, [series_of(6), series_of(3, "cbstate.x.b")], tail=True)
    grown, still = source.columns((2, 3), (3, 3), (5, 3))
    assert grown == ("cbstate.x.a", 2, [12, 13, 14], [1.0, 1.5, 2.0])
    assert still == ("cbstate.x.b", 2, [12], [1.0])


def test_a_column_does_not_grow_with_its_series() -> None:
    series = series_of(2)
    [column] = Here(LAYOUT, [series], tail=True).columns((0,), (2,), (2,))
    series.push(9.0, 99)
    assert (column.steps, column.values) == ([10, 11], [0.0, 0.5])


def test_an_empty_series_travels() -> None:
    there = travelled(Here(LAYOUT, [series_of(0)], tail=True), (0,), (0,), (0,))
    shown = there.series(0, 0, 0)
    assert (len(shown), shown.since(0)) == (0, [])
    with pytest.raises(LookupError, match="is empty"):
        shown.last()


def test_series_without_a_length_are_an_error() -> None:
    """A mark has one for each series of its layout; fewer would leave series out without a word."""
    with pytest.raises(ValueError, match="zip"):
        Here(LAYOUT, [series_of(1), series_of(1)], tail=True).columns((0,), (1,), (1,))
