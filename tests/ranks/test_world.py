"""The contract of `World`: processes keep it, and so do the threads that stand for ranks in other tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flowtrain.core.world import World, find_world
from flowtrain.errors import RemoteError
from tests.support.meeting import Meeting, MetWorld
from tests.support.ranks import Ranks, returned


def exchanges(world: World) -> list[list[Any]]:
    """Exchange a short value, one that needs a second collective on one rank, and nothing."""
    long = "x" * (5000 if world.rank else 1)
    return [world.exchange((world.rank, "short")), [len(each) for each in world.exchange(long)], world.exchange(None)]


def sums(world: World) -> list[int]:
    return world.sum([world.rank, 1, 2**40])


def loses(world: World) -> list[object]:
    """End on rank 1, and go on exchanging on the main rank; return what each exchange raises there."""
    found: list[object] = [world.exchange(0), world.lost]
    for number in range(2 if world.main else 0):
        try:
            world.exchange(number)
        except RemoteError as error:
            found += [type(error).__name__, world.lost]
    if not world.main:
        raise ValueError("ended")
    return found


def gives_up(world: World) -> list[object]:
    """Exchange nothing after giving up, so that no rank is awaited."""
    world.give_up()
    try:
        return world.exchange(0)
    except RemoteError as error:
        return [type(error).__name__, world.lost]


def on_process(function: Callable[[World], Any]) -> Any:
    world = find_world("ddp")
    assert world is not None
    return function(world)


class WorldContract:
    """The promises, each checked on two ranks."""

    def outcomes(self, ranks: Ranks, function: Callable[[World], Any]) -> Sequence[Any]:
        """Return the results of a function on both ranks; ``None`` for a rank that has failed."""
        raise NotImplementedError

    def test_every_rank_gets_the_values_of_all_in_their_order(self, ranks: Ranks) -> None:
        found = [[(0, "short"), (1, "short")], [1, 5000], [None, None]]
        assert self.outcomes(ranks, exchanges) == [found, found]

    def test_sums_are_exact(self, ranks: Ranks) -> None:
        assert self.outcomes(ranks, sums) == [[1, 2, 2**41]] * 2

    def test_a_rank_that_has_ended_is_not_awaited(self, ranks: Ranks) -> None:
        assert self.outcomes(ranks, loses) == [[[0, 0], False, "RemoteError", True, "RemoteError", True], None]

    def test_a_rank_that_has_given_up_makes_no_exchange(self, ranks: Ranks) -> None:
        assert self.outcomes(ranks, gives_up) == [["RemoteError", True]] * 2


class TestProcesses(WorldContract):
    def outcomes(self, ranks: Ranks, function: Callable[[World], Any]) -> Sequence[Any]:
        if function is not loses:
            return returned(ranks.run(on_process, function))
        return [outcome.value for outcome in ranks.run(on_process, function)]


class TestThreads(WorldContract):
    def outcomes(self, ranks: Ranks, function: Callable[[World], Any]) -> Sequence[Any]:
        meeting = Meeting(2, timeout=20.0)
        found = meeting.each(lambda rank: function(MetWorld(meeting, rank)))
        return [None if isinstance(each, BaseException) else each for each in found]
