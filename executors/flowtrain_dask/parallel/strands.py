"""Strands: the handlers of a plan spread over threads. Each strand runs its handlers one after the other.

One dask task for each handler would cost 40 to 70 microseconds of scheduling, so a strand puts many handlers into one
task. There are at most as many strands as workers, and more for handlers that wait, for a disk or a network, and so
need no core. Every strand has a thread to itself; the first strand has the training thread. So a strand never waits for
a thread, only for a handler of another strand. `pack` makes the strands:

1. It fuses linear chains: handlers of which each waits for the one before it alone, and nothing else waits for that.
2. It places the chains one by one (list scheduling). Of the chains whose predecessors are placed, the one with the
   longest path to the end comes first, on the strand where it can start first.
3. A strand keeps the order in which its chains were placed. Over all strands this is a topological order, so the first
   handler that has not run can always run: two strands cannot wait for each other for ever.

Where an edge leads from one strand to another, the later handler waits (`Strands.waits`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flowtrain.callback.callback import draws_own
from flowtrain.graph.plan import Plan

__all__ = ["MOST_STRANDS", "Strands", "fuse", "is_chain", "needs_training_thread", "pack"]


@dataclass(frozen=True)
class Strands:
    """How the handlers of a plan are spread over threads.

    Attributes:
        strands: The positions of each strand, in the order in which they run. The first strand is the training
            thread's, and the only one that may be empty.
        waits: For each position, the positions on other strands that it waits for, as the bits of an integer.
        signals: The positions that another strand waits for, as bits.
        work: The seconds of all handlers together.
        span: The seconds of the event when the strands run at the same time.
    """

    strands: tuple[tuple[int, ...], ...]
    waits: tuple[int, ...]
    signals: int
    work: float
    span: float

    @property
    def saves(self) -> float:
        """The seconds that running at the same time saves, if that itself cost nothing."""
        return self.work - self.span


def is_chain(plan: Plan) -> bool:
    """Tell whether no two handlers of a plan may run at the same time."""
    return all(ancestors == (1 << position) - 1 for position, ancestors in enumerate(plan.ancestors))


def needs_training_thread(plan: Plan) -> frozenset[int]:
    """Return the positions of the handlers that only the training thread may run: those that draw, and arrivals.

    All threads of a process share the generators, so a draw on another thread would change the draws of training.
    """
    return frozenset(
        position
        for position, planned in enumerate(plan.handlers)
        if draws_own(planned.callback)
        or planned.node.writer is not None
        or any(path[:2] == ("resource", "rng") for path, _ in planned.node.access[planned.handler])
    )


def fuse(before: Sequence[Sequence[int]], on_training_thread: Collection[int]) -> list[list[int]]:
    """Return the positions as linear chains, ordered by the first position of each.

    Args:
        before: For each position, its direct predecessors.
        on_training_thread: The positions that the training thread must run. A chain has either only such positions
            or none of them.
    """
    followers = [0] * len(before)
    for each in before:
        for one in each:
            followers[one] += 1
    chains: list[list[int]] = []
    chain_of: list[list[int]] = []
    for position, each in enumerate(before):
        same_thread = bool(each) and (each[0] in on_training_thread) == (position in on_training_thread)
        if len(each) == 1 and followers[each[0]] == 1 and same_thread:
            chain = chain_of[each[0]]
        else:
            chain = []
            chains.append(chain)
        chain.append(position)
        chain_of.append(chain)
    return chains


MOST_STRANDS = 32
"""How many strands there are at most, if more handlers wait than there are workers."""


def pack(
    before: Sequence[Sequence[int]],
    costs: Sequence[float],
    workers: int,
    on_training_thread: Collection[int] = (),
    waiting: Collection[int] = (),
) -> Strands:
    """Spread handlers over strands.

    Args:
        before: For each position, its direct predecessors, which have smaller positions.
        costs: The seconds that each handler takes.
        workers: How many strands there may be for handlers that compute.
        on_training_thread: The positions that the training thread must run; they go to the first strand.
        waiting: The positions of the handlers that wait most of their time. Chains of these alone may have strands of
            their own beside those for `workers`.
    """
    chains = fuse(before, on_training_thread)
    chain_of = {position: index for index, chain in enumerate(chains) for position in chain}
    # Only the first handler of a chain waits for other chains. The others have one predecessor each, in the same chain.
    waits_for = [{chain_of[one] for one in before[chain[0]]} for chain in chains]
    takes = [sum(costs[position] for position in chain) for chain in chains]
    to_the_end = list(takes)  # the seconds from the start of a chain to the end of the longest path that begins with it
    # A chain stands behind the chains that it waits for, so from the end each one is complete when it is read.
    for index in reversed(range(len(chains))):
        for one in waits_for[index]:
            to_the_end[one] = max(to_the_end[one], takes[one] + to_the_end[index])

    waits = [all(position in waiting for position in chain) for chain in chains]
    free = [0.0] * max(workers, min(MOST_STRANDS, workers + sum(waits)))
    strands: list[list[int]] = [[] for _ in free]
    end: dict[int, float] = {}
    left = set(range(len(chains)))
    while left:
        # The chain with the longest way to the end goes first. Ties go by position, so that a plan has the same strands
        # in every run.
        ready = [index for index in left if waits_for[index] <= end.keys()]
        index = min(ready, key=lambda one: (-to_the_end[one], one))
        start = max((end[one] for one in waits_for[index]), default=0.0)
        if chains[index][0] in on_training_thread:
            strand = 0
        else:  # on a tie the training thread takes the chain, unless handlers are left that only it may run
            reserved = any(chains[one][0] in on_training_thread for one in left)
            allowed = len(free) if waits[index] else workers
            strand = min(range(allowed), key=lambda one: (max(free[one], start), one == 0 and reserved, one))
        free[strand] = end[index] = max(free[strand], start) + takes[index]
        strands[strand] += chains[index]
        left.discard(index)
    return _with_waits(before, costs, [strands[0], *(each for each in strands[1:] if each)], max(free))


def _with_waits(
    before: Sequence[Sequence[int]], costs: Sequence[float], strands: Sequence[Sequence[int]], span: float
) -> Strands:
    strand_of = {position: number for number, strand in enumerate(strands) for position in strand}
    waits = [0] * len(before)
    signals = 0
    for position, each in enumerate(before):
        for one in each:
            if strand_of[one] != strand_of[position]:
                waits[position] |= 1 << one
                signals |= 1 << one
    return Strands(tuple(tuple(strand) for strand in strands), tuple(waits), signals, sum(costs), span)
