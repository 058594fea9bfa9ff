"""Races between running callbacks in place and in their lanes: what is timed, and the verdict.

`CallTimes` has the times of one handler in place, which tell whether a race is worth it. A `Race` has the rounds of
both ways for the lanes that race together. `flowtrain_dask.deferred.placement` says which lanes race, and when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flowtrain.graph.plan import PlanKey
from flowtrain_dask.parallel.decision import CLEAR, LEAST_GAIN, is_faster

__all__ = ["CallTimes", "Race"]

_IN_LANES = (False, True, True, False)
"""Whether each of four rounds of a race is in the lanes. In this order a steady change of speed favours neither way."""


@dataclass
class CallTimes:
    """The times of one handler of a lane in one plan, while it runs in place.

    Attributes:
        plan: The plan.
        wanted: Whether its calls are timed.
        calls: The number of timed calls.
        seconds: The seconds of all timed calls but the first, which may import modules.
        shortest: The seconds of the shortest call.
        costly: How many calls took at least `LEAST_GAIN`.
    """

    plan: PlanKey
    wanted: bool = True
    calls: int = 0
    seconds: float = 0.0
    shortest: float = math.inf
    costly: int = 0

    @property
    def cost(self) -> float:
        """The seconds of one call; 0 as long as it is unknown."""
        return self.seconds / (self.calls - 1) if self.calls > 1 else 0.0

    @property
    def are_costly(self) -> bool:
        """Whether a lane could gain something. One long call tells nothing: the system may have run another program."""
        return self.costly > 1 and self.cost >= LEAST_GAIN

    def add(self, seconds: float) -> None:
        """Count a call."""
        self.calls += 1
        self.seconds += seconds if self.calls > 1 else 0.0
        self.shortest = min(self.shortest, seconds)
        self.costly += seconds >= LEAST_GAIN

    def begin(self) -> None:
        """Have the calls timed anew."""
        self.wanted, self.calls, self.seconds, self.shortest, self.costly = True, 0, 0.0, math.inf, 0


@dataclass(eq=False)
class Race:
    """Rounds of training with the events of some lanes in place and in the lanes, by turns.

    Attributes:
        lanes: How many lanes race together.
        least: The seconds that their handlers take at least in a round in place; 0 if unknown.
        began: When the present round began; ``None`` between two rounds.
        deferred: Whether the events of the present round go to the lanes.
        here: The seconds of each round in place.
        there: The seconds of each round in the lanes.
    """

    lanes: int = 1
    least: float = 0.0
    began: float | None = None
    deferred: bool = False
    here: list[float] = field(default_factory=list[float])
    there: list[float] = field(default_factory=list[float])

    def begin(self, now: float) -> None:
        """Begin the next round."""
        self.began, self.deferred = now, _IN_LANES[(len(self.here) + len(self.there)) % len(_IN_LANES)]

    def end(self, seconds: float) -> None:
        """End the present round."""
        self.began = None
        (self.there if self.deferred else self.here).append(seconds)

    @property
    def verdict(self) -> bool | None:
        """Whether training is faster with the lanes; ``None`` as long as this is open."""
        if len(self.there) > 1 and max(self.there) * CLEAR < self.least:
            return True  # the handlers alone take longer than whole rounds in the lanes
        return is_faster(self.there, self.here) if len(self.here) == len(self.there) else None

    @property
    def spent(self) -> float:
        """The seconds of all rounds."""
        return sum(self.here) + sum(self.there)
