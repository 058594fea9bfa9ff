"""How handlers are spread over strands: always something that can run, packed longest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain import Access, BatchEnd, Callback, Event, LearnerView, Phase, Write, on
from flowtrain_dask.parallel.strands import MOST_STRANDS, Strands, fuse, is_chain, needs_training_thread, pack
from tests.support.handlers import plan_of


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[float], frozenset[int]]:
    """Direct predecessors, costs, and who stays on the training thread."""
    count = draw(st.integers(1, 12))
    ancestors: list[set[int]] = []
    before: list[tuple[int, ...]] = []
    for position in range(count):
        wanted = draw(st.sets(st.integers(0, position - 1), max_size=4)) if position else set[int]()
        implied = set[int]().union(*(ancestors[one] for one in wanted))
        before.append(tuple(sorted(wanted - implied)))
        ancestors.append(wanted | implied)
    costs = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.0, 7.0]), min_size=count, max_size=count))
    return before, costs, frozenset(draw(st.sets(st.integers(0, count - 1), max_size=4)))


def rounds(strands: Strands, before: list[tuple[int, ...]]) -> list[int]:
    """Run the strands by hand, as slowly as they can: always the last strand whose first handler need not wait."""
    left = [list(strand) for strand in strands.strands]
    done: list[int] = []
    while any(left):
        can = [strand for strand in left if strand and not strands.waits[strand[0]] & ~sum(1 << one for one in done)]
        assert can, f"nobody can run: {left} wait for each other"
        position = can[-1].pop(0)
        assert set(before[position]) <= set(done), f"{position} starts before {before[position]}"
        done.append(position)
    return done


@given(dags(), st.integers(1, 4), st.one_of(st.just(frozenset[int]()), st.frozensets(st.integers(0, 12))))
def test_strands_keep_every_edge_and_never_get_stuck(
    dag: tuple[list[tuple[int, ...]], list[float], frozenset[int]], workers: int, waiting: frozenset[int]
) -> None:
    """Rule 13: whoever is slow, no handler starts before its predecessors, and no two strands wait for each other."""
    before, costs, home = dag
    waiting = waiting & set(range(len(before)))
    strands = pack(before, costs, workers, home, waiting)
    assert sorted(rounds(strands, before)) == list(range(len(before)))
    assert 1 <= len(strands.strands) <= workers + len(waiting)
    assert all(strands.strands[1:])
    assert home <= set(strands.strands[0]), "rule 6: what draws random numbers stays on the training thread"
    waited_for = [one for position, each in enumerate(before) for one in each if strands.waits[position] >> one & 1]
    assert strands.signals == sum(1 << one for one in set(waited_for))
    assert strands.work == pytest.approx(sum(costs))
    assert max(costs) - 1e-9 <= strands.span <= sum(costs) + 1e-9


def test_longest_first_fills_the_strands_evenly() -> None:
    strands = pack([()] * 5, [1.0, 2.0, 3.0, 1.0, 5.0], 2)
    assert strands.strands == ((4, 0), (2, 1, 3))
    assert strands.saves == pytest.approx(6.0)


def test_handlers_that_wait_have_strands_of_their_own_and_those_that_compute_share_the_cores() -> None:
    strands = pack([()] * 4, [1.0] * 4, 2, (), range(4))
    assert (strands.strands, strands.span) == (((0,), (1,), (2,), (3,)), 1.0)
    strands = pack([()] * 5, [2.0, 2.0, 2.0, 1.0, 1.0], 2, (), {0, 1})
    assert {3, 4} < set(strands.strands[0]) | set(strands.strands[1]), "two that compute, on two cores"
    assert len(pack([()] * 99, [1.0] * 99, 2, (), range(99)).strands) == MOST_STRANDS
    # A chain that computes at all needs a core.
    assert len(pack([(), (0,), (), (2,)], [1.0] * 4, 1, (), {0, 2}).strands) == 1


def test_a_chain_is_fused_and_stays_on_one_strand() -> None:
    before = [(), (0,), (1,), (), (2, 3)]
    assert fuse(before, frozenset()) == [[0, 1, 2], [3], [4]]
    strands = pack(before, [1.0] * 5, 2)
    assert strands.strands == ((0, 1, 2, 4), (3,))
    assert strands.waits == (0, 0, 0, 0, 1 << 3)
    assert strands.signals == 1 << 3


def test_a_chain_is_cut_where_a_handler_must_stay_on_the_training_thread() -> None:
    assert fuse([(), (0,), (1,)], {1}) == [[0], [1], [2]]
    strands = pack([(), (), ()], [1.0, 1.0, 1.0], 2, on_training_thread={2})
    assert 2 in strands.strands[0]
    assert len(strands.strands) == 2


def test_the_training_thread_leaves_the_rest_to_others_while_it_has_its_own() -> None:
    strands = pack([(), (), ()], [1.0, 1.0, 1.0], 2, on_training_thread={1, 2})
    assert strands.strands == ((1, 2), (0,))


class Plain(Callback):
    @on(BatchEnd)
    def go(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


class Draws(Plain):
    def state_access(self) -> Access:
        return {"resource.rng.numpy": Write()}


class After(Plain):
    def run_after(self) -> tuple[type[Callback], ...]:
        return (Plain,)


def test_what_is_a_chain_and_who_stays_is_read_from_the_plan() -> None:
    def plan(*callbacks: Callback) -> tuple[bool, frozenset[int]]:
        made = plan_of(*callbacks)
        return is_chain(made), needs_training_thread(made)

    nobody: frozenset[int] = frozenset()
    assert plan(Plain()) == (True, nobody)
    assert plan(Plain(), Plain()) == (False, nobody)
    assert plan(Draws(), Draws()) == (True, frozenset({0, 1}))
    assert plan(Plain(), Draws()) == (False, frozenset({1}))
    assert plan(Plain(), After()) == (True, nobody)
