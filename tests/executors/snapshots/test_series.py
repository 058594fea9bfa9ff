"""Rule 22: series as they were, in constant time; and what of them another process gets."""

from __future__ import annotations

import pickle

import pytest
import torch

from flowtrain import ProtectedException, UsageError
from flowtrain.state.series import Series
from flowtrain_dask.snapshots.series import Cut, Tail


def series(count: int, *, late: bool = False) -> Series:
    made = Series("cbstate.smooth_loss", late)
    for step in range(count):
        made.push(torch.tensor(step / 2), step)
    return made


@pytest.mark.parametrize("late", [False, True])
def test_a_cut_shows_what_was_there(late: bool) -> None:
    live = series(3, late=late)
    cut = Cut(live)
    live.push(9.0, 9)
    assert (len(cut), cut.last(), cut.newest()) == (3, (2, 1.0), 1.0)
    assert list(cut) == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert (cut.since(2), cut.since(-1), cut.since(7)) == ([1.0], [1.0], [])
    assert list(pickle.loads(pickle.dumps(cut))) == list(cut)
    assert len(live) == 4


def test_a_cut_copies_no_values() -> None:
    live = series(5)
    assert Cut(live)._values is live._values  # pyright: ignore[reportPrivateUsage]  # what makes it constant time


@pytest.mark.parametrize("late", [False, True])
def test_a_tail_has_the_newest_values(late: bool) -> None:
    live = series(10, late=late)
    tail = Tail(live, 7)
    live.push(9.0, 9)
    for each in (tail, pickle.loads(pickle.dumps(tail))):
        assert (len(each), each.last()) == (10, (9, 4.5))
        assert (each.since(7), each.since(9)) == ([3.5, 4.0, 4.5], [4.5])
        with pytest.raises(UsageError, match=r'since\(6\) asks.*from position 7 on.*smooth_loss": Read\(full=True\)'):
            each.since(6)
        with pytest.raises(UsageError, match=r"it is iterated over, but the handler runs in another process"):
            list(each)


def test_positions_are_those_of_the_series() -> None:
    live = series(5)
    cut, tail = Cut(live), Tail(live, 3)
    live.push(9.0, 9)
    assert (cut[-1], cut[0], cut[3:]) == ((4, 2.0), (0, 0.0), [(3, 1.5), (4, 2.0)])
    assert cut.values == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert torch.as_tensor(cut).shape == (5, 2)
    assert (tail[-1], tail[3]) == ((4, 2.0), (3, 1.5))
    with pytest.raises(UsageError, match=r"position 2 is asked for.*from position 3 on.*Read\(full=True\)"):
        _ = tail[2]
    with pytest.raises(UsageError, match="it is iterated over"):
        _ = tail.values


def test_a_tail_without_news_still_has_the_newest() -> None:
    assert Tail(series(4), 4).last() == (3, 1.5)
    assert Tail(series(4), 4).since(4) == []


def test_an_empty_series() -> None:
    for frozen in (Cut(series(0)), Tail(series(0), 0)):
        assert len(frozen) == 0
        assert frozen.since(0) == []
        with pytest.raises(LookupError, match="smooth_loss is empty: nothing has been recorded yet"):
            frozen.last()


def test_nothing_can_be_added() -> None:
    for frozen in (Cut(series(1)), Tail(series(1), 0)):
        with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.smooth_loss disallowed"):
            frozen.push(1.0, 1)
