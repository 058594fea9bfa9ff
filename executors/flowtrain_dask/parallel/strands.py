"""From a graph to strands: which handlers run one after the other, on which thread.

A task for each handler costs 40 to 70 microseconds of scheduling; a strand is many handlers in one task. There are at
most as many strands as workers, and every strand has a thread of its own, the first one the training thread. So no
strand ever waits for a thread, only for a handler of another strand, and all of them are handed out at once.

1. Linear chains are fused: handlers of which each waits for exactly the one before it, and is the only one to do so.
2. The chains are placed one by one: among those whose predecessors have been placed, the one with the longest way to
   the end goes first, to the strand on which it can start first.
3. A strand keeps the order in which its chains were placed. That order is a topological one over all strands, so the
   first handler of it that has not run can always run, and no two strands wait for each other.

Where an edge goes from one strand to another, the later handler waits (`Strands.waits`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flowtrain.callback.callback import draws_own
from flowtrain.graph.plan import Plan

__all__ = ["Strands", "at_home", "is_chain", "pack"]


@dataclass(frozen=True)
class Strands:
    """How the handlers of a plan are spread over threads.

    Attributes:
        strands: The positions of each strand in the order in which they run. The first strand is the training
            thread's. None is empty, except that the first may be.
        waits: For each position, the positions of other strands that it waits for, as the bits of an integer.
        signals: The positions that another strand waits for, as bits.
        work: What all handlers take together, in seconds.
        span: What the event takes when the strands run at the same time, in seconds.
    """

    strands: tuple[tuple[int, ...], ...]
    waits: tuple[int, ...]
    signals: int
    work: float
    span: float

    @property
    def saves(self) -> float:
        """How many seconds less than one after the other, if running at the same time cost nothing."""
        return self.work - self.span


def is_chain(plan: Plan) -> bool:
    """Tell whether no two handlers of a plan may run at the same time."""
    return all(ancestors == (1 << position) - 1 for position, ancestors in enumerate(plan.ancestors))


def at_home(plan: Plan) -> frozenset[int]:
    """Return the positions of the handlers that stay on the training thread: those that may draw random numbers."""
    return frozenset(
        position
        for position, step in enumerate(plan.steps)
        if draws_own(step.callback)
        or any(path[:2] == ("resource", "rng") for path, _ in step.node.access[step.handler])
    )


def fuse(before: Sequence[Sequence[int]], home: Collection[int]) -> list[list[int]]:
    """Return the positions as linear chains, by the position of their first.

    Args:
        before: For each position, its direct predecessors.
        home: The positions of the training thread; a chain is wholly among them or wholly not.
    """
    followers = [0] * len(before)
    for each in before:
        for one in each:
            followers[one] += 1
    chains: list[list[int]] = []
    chain_of: list[list[int]] = []
    for position, each in enumerate(before):
        if len(each) == 1 and followers[each[0]] == 1 and (each[0] in home) == (position in home):
            chain = chain_of[each[0]]
        else:
            chain = []
            chains.append(chain)
        chain.append(position)
        chain_of.append(chain)
    return chains


def pack(before: Sequence[Sequence[int]], costs: Sequence[float], workers: int, home: Collection[int] = ()) -> Strands:
    """Spread handlers over strands.

    Args:
        before: For each position, its direct predecessors; each comes before it.
        costs: The seconds that each handler takes.
        workers: How many strands there may be.
        home: The positions that go to the first strand.
    """
    chains = fuse(before, home)
    chain_of = {position: index for index, chain in enumerate(chains) for position in chain}
    waits_for = [{chain_of[one] for one in before[chain[0]]} for chain in chains]
    takes = [sum(costs[position] for position in chain) for chain in chains]
    to_the_end = list(takes)
    for index in reversed(range(len(chains))):
        for one in waits_for[index]:
            to_the_end[one] = max(to_the_end[one], takes[one] + to_the_end[index])

    free = [0.0] * workers
    strands: list[list[int]] = [[] for _ in free]
    end: dict[int, float] = {}
    left = set(range(len(chains)))
    while left:
        ready = [index for index in left if waits_for[index] <= end.keys()]
        index = min(ready, key=lambda one: (-to_the_end[one], one))
        start = max((end[one] for one in waits_for[index]), default=0.0)
        if chains[index][0] in home:
            strand = 0
        else:  # on a tie the training thread goes first, unless it still has handlers that nobody else may run
            more = any(chains[one][0] in home for one in left)
            strand = min(range(len(free)), key=lambda one: (max(free[one], start), one == 0 and more, one))
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
