"""Where the callbacks of a lane run: in place or in the lane, decided by what each way costs training.

Under ``defer="auto"`` the gain of a lane is measured and never predicted, because it depends on the work of the
handlers: a handler that holds the interpreter's lock gains nothing on a thread. All callbacks of a lane move together,
through these modes (`Placement.mode`):

1. *in place*: at first each handler is timed. If its first `TIMED` calls took less than `LEAST_GAIN` on average, its
   plan gets the plain call back: from then on the handler costs what it costs under the serial executor.
2. *waiting*, then *racing*: as soon as a handler has taken longer than that, rounds from one of its events to its next
   one, training included, are timed by turns with the lane's events in place and in the lane, in the order A B B A. A
   round in the lane ends when the lane is empty. The rounds are compared as in `flowtrain_dask.parallel.decision`.
3. *in place* or *lane*: the way that won. It is measured again (`Placement.look_again`) when an epoch begins, but so
   seldom that races take at most a hundredth of the time.

The lane is empty at each move to place, and nothing is in it until the move back. So the events of its callbacks keep
their order, and the callbacks have the state that they would have in a serial run.

One race runs at a time (`Turn`), because the rounds of two would disturb each other. Lanes that wait for their race at
the same event race together first: four callbacks that sleep gain little one by one, and much together. If together
they gain nothing, or when they are measured again, each races alone.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.report import PlaceReport
from flowtrain_dask.parallel.decision import HOLD_FACTOR, LEAST_GAIN, in_ms, is_faster

__all__ = ["TIMED", "Mode", "Placement", "PlanKey", "Spot", "Turn"]

TIMED = 30
"""How many calls of a handler are timed before it is left in place, at most."""

_LEAST_HOLD = 10.0
"""Seconds for which a decision holds at least."""

_TURNS = (False, True, True, False)
"""Whether each of four rounds of a race is in the lane. In this order a steady change of speed favours neither way."""

Mode = Literal["in place", "waiting", "racing", "lane"]

PlanKey: TypeAlias = tuple[type[Event], type[Phase]]
"""The event type and phase type of a plan."""


@dataclass
class Spot:
    """One handler of a lane in one plan.

    Attributes:
        plan: The plan.
        timed: Whether its calls in place are timed.
        calls: The number of timed calls.
        seconds: The seconds of all timed calls but the first, which may import modules.
        costly: How many of these calls took at least `LEAST_GAIN`.
    """

    plan: PlanKey
    timed: bool = True
    calls: int = 0
    seconds: float = 0.0
    costly: int = 0

    @property
    def cost(self) -> float:
        """The seconds of one call in place; 0 as long as it is unknown."""
        return self.seconds / (self.calls - 1) if self.calls > 1 else 0.0

    def add(self, seconds: float) -> None:
        """Count a call."""
        self.calls += 1
        if self.calls > 1:
            self.seconds += seconds
            self.costly += seconds >= LEAST_GAIN

    @property
    def is_costly(self) -> bool:
        """Whether a lane could gain something. One long call is none: the system may have run another program."""
        return self.costly > 1 and self.cost >= LEAST_GAIN

    def begin(self) -> None:
        """Have the calls timed anew."""
        self.timed, self.calls, self.seconds, self.costly = True, 0, 0.0, 0


class Turn:
    """Lets one lane, with its companions, race at a time."""

    def __init__(self) -> None:
        # All of these refer to this object.
        self._holder: weakref.ref[Placement] | None = None
        self._placements: WeakSet[Placement] = WeakSet()

    def add(self, placement: Placement) -> None:
        """Take note of a lane that may race."""
        self._placements.add(placement)

    def companions(self, placement: Placement) -> tuple[Placement, ...]:
        """Return the lanes that can race together with one that has the turn: they wait for it at the same event."""
        anchor = placement.anchor
        if placement.alone or anchor is None:
            return ()
        waiting = [each for each in self._placements if each.mode == "waiting" and not each.alone]
        others = [each for each in waiting if each is not placement and each.is_remote == placement.is_remote]
        return tuple(each for each in others if each.anchor is not None and each.anchor.plan == anchor.plan)

    @property
    def holder(self) -> Placement | None:
        """The lane that races."""
        return None if self._holder is None else self._holder()

    def take(self, placement: Placement) -> bool:
        """Let a lane race if no other one does; return whether it races.

        A lane with frequent events takes the turn from one that has had none since its own last event. Otherwise a race
        whose rounds are epochs would keep it waiting for many epochs.
        """
        holder = self.holder
        if holder is None or holder.last < placement.last:
            self._holder = weakref.ref(placement)
        return self.holder is placement

    def give_back(self, placement: Placement) -> None:
        """Let another lane race."""
        if self.holder is placement:
            self._holder = None


class Placement:
    """The callbacks of one lane, the place where they run, and the lane itself from its first event on.

    Args:
        nodes: The callbacks.
        name: The name of the lane.
        first: The number of its first event, for identities.
        make_lane: Makes the lane.
        stopping: Returns whether training is about to stop; then nothing waits for the lane.
        is_remote: Whether the lane is on a cluster.
        turn: Lets one lane race at a time; ``None``: all events go to the lane.
        stale: Gets the plans that must be compiled again because their handlers are called in another way.
        clock: Returns the time in seconds.

    Attributes:
        nodes, name, first, is_remote: The same.
        lane: The lane, once it has had an event.
        mode: See the docstring of the module.
        deferred: Whether events go to the lane now.
        anchor: The handler whose events divide the rounds of a race; ``None`` if no race is to come or runs.
        last: When the anchor was last called.
        alone: Whether the next race of the lane is without others.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        name: str,
        first: int,
        make_lane: Callable[[Placement], Lane],
        stopping: Callable[[], bool],
        is_remote: bool,
        turn: Turn | None,
        stale: set[PlanKey],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.nodes = nodes
        self.name = name
        self.first = first
        self.is_remote = is_remote
        self.lane: Lane | None = None
        self.mode: Mode = "lane" if turn is None else "in place"
        self.deferred = turn is None
        self.anchor: Spot | None = None
        self.last = 0.0
        self.alone = False
        self._companions: tuple[Placement, ...] = ()  # the lanes that do in the race what this one does
        self._make_lane = make_lane
        self._stopping = stopping
        self._turn = turn
        self._stale = stale
        self._clock = clock
        self._spots: dict[tuple[PlanKey, Node, Handler], Spot] = {}
        self._raced: Spot | None = None  # the anchor of the last race
        self._others = 0  # how many other lanes were in the last race
        self._rounds: tuple[list[float], list[float]] = [], []  # the seconds of rounds in place, and in the lane
        self._handing: list[float] = []  # the seconds that handing over took in the race
        self._began: float | None = None  # when the present round began
        self._decided_at = 0.0
        if turn is not None:
            turn.add(self)

    def position(self, node: Node, handler: Handler) -> int:
        """Return the position of a handler in the job of the lane."""
        return [(one, each) for one in self.nodes for _, each in one.handlers].index((node, handler))

    def opened(self) -> Lane:
        """Return the lane, and make it if there is none yet."""
        self.lane = self.lane or self._make_lane(self)
        return self.lane

    def move(self, deferred: bool) -> bool:
        """Have the next events go to the lane or run in place; return whether this is so now.

        Before events run in place, this waits until the lane is empty and the callbacks have their state. If the lane
        has failed, or training is about to stop, the events go to the lane as before.
        """
        if self.deferred and not deferred and not self._emptied():
            return False
        self.deferred = deferred
        return True

    def _emptied(self) -> bool:
        """Wait until the lane is empty; return whether it is, and neither failed nor retired."""
        lane = self.lane
        if lane is None:
            return True
        with lane.waited_for():
            while not lane.over and not lane.flush(0.25) and not self._stopping():
                pass
        return not lane.over and lane.idle

    def settled(self, plan: PlanKey, node: Node, handler: Handler) -> Literal["", "in place", "lane"]:
        """Return where a handler of a plan runs; empty while this is being measured."""
        if self.mode == "lane":
            return "lane"
        spot = self._spots.get((plan, node, handler))
        return "in place" if self.mode == "in place" and spot is not None and not spot.timed else ""

    def node(self, plan: PlanKey, node: Node, handler: Handler, call: Call, hand_over: Call) -> Call:
        """Return the function that a plan calls for a handler.

        Args:
            plan: The plan.
            node: The callback of the handler.
            handler: The handler.
            call: Calls the handler in place.
            hand_over: Takes a snapshot, and puts it into the lane.
        """
        if self._turn is None:
            return hand_over
        spot = self._spots.setdefault((plan, node, handler), Spot(plan))
        clock = self._clock

        def run(event: Event, phase: Phase, view: Any) -> None:
            """Run the handler in place or hand its event over, and measure this as long as nothing is decided."""
            if self.anchor is spot:
                self._turn_of_anchor()
            if self.deferred and self.mode != "racing":
                hand_over(event, phase, view)
            elif self.deferred:
                begin = clock()
                hand_over(event, phase, view)
                self._handing.append(clock() - begin)
                self.opened().process_soon()
            elif spot.timed:
                begin = clock()
                call(event, phase, view)
                self._add(spot, clock() - begin)
            else:
                call(event, phase, view)

        return run

    def _add(self, spot: Spot, seconds: float) -> None:
        """Count a call in place that took some seconds."""
        spot.add(seconds)
        if spot.is_costly:
            if self.mode == "in place":
                self.mode, self.anchor = "waiting", spot
                self._compile_all()  # handlers with the plain call would overtake those whose events go to the lane
        elif spot.calls >= TIMED:
            spot.timed = False
            self._decided_at = self._clock()
            self._stale.add(spot.plan)

    def _turn_of_anchor(self) -> None:
        """End a round of the race, and begin the next one, at an event of the anchor."""
        turn, now = self._turn, self._clock()
        assert turn is not None
        holder = turn.holder
        if holder is not self:
            if holder is not None and self in holder._companions:
                self.last = now
                self.move(holder.deferred)
                return
            self._end_race()  # another lane may have taken the turn
            if not turn.take(self):
                self.last = now
                return
            self._companions = turn.companions(self)
            for each in self._racing():
                each.mode, each._rounds, each._handing = "racing", ([], []), []
        began, self._began, self.last = self._began, None, now
        if self.deferred and not all(each._emptied() for each in self._racing()):
            self._end_race()  # a lane has failed, or training is about to stop: events go to the lanes as before
            turn.give_back(self)
            return
        if began is not None:
            self._rounds[self.deferred].append(self._round(began, now))
        here, there = self._rounds
        faster = is_faster(there, here) if len(here) == len(there) else None
        if faster is not None:
            self._decide_race(faster)
            return
        self.deferred = _TURNS[(len(here) + len(there)) % len(_TURNS)]
        self._began = self._clock()

    def _racing(self) -> tuple[Placement, ...]:
        """Return the lanes that race together."""
        return self, *self._companions

    def _end_race(self) -> None:
        """Have this lane and its companions wait for another race."""
        for each in self._racing():
            each.mode, each._began = "waiting", None
        self._companions = ()

    def _decide_race(self, faster: bool) -> None:
        """Move the lanes of a race that has ended, all of which are empty, to the place that was faster."""
        racing, together = self._racing(), len(self._companions) > 0
        self._companions = ()
        for each in racing:
            each.deferred, each._raced, each._rounds = faster, each.anchor, self._rounds
            each._others = len(racing) - 1
            each.alone = True  # from now on
            each.mode = "waiting"
        if faster or not together:
            for each in racing:
                each._decide("lane" if faster else "in place")
        elif self._turn is not None:  # one of them may still gain something
            self._turn.give_back(self)

    def _round(self, began: float, now: float) -> float:
        """Return the seconds of a round that has ended now."""
        if not self.deferred:
            return now - began
        if not self.is_remote:
            return self._clock() - began  # with the wait for the lane: its thread may have shared a core with training
        # The wait is mostly the way to the worker and back, which a lane with many events makes once for all of them.
        # But the worker takes as long as this process for each event, so that a lane is no faster than its handler.
        return max(now - began, *(0.0 if each.anchor is None else each.anchor.cost for each in self._racing()))

    def _decide(self, mode: Literal["in place", "lane"]) -> None:
        self.mode, self.anchor, self._decided_at = mode, None, self._clock()
        for spot in self._spots.values():
            spot.timed = False
        if self._turn is not None:
            self._turn.give_back(self)
        self._compile_all()

    def _compile_all(self) -> None:
        """Have all plans with a handler of these callbacks compiled again when the present event has ended."""
        self._stale.update(spot.plan for spot in self._spots.values())

    def look_again(self) -> None:
        """Have the callbacks measured again, unless they were a short time ago."""
        spent = sum(map(sum, self._rounds))
        if self._turn is None or self._clock() - self._decided_at < max(_LEAST_HOLD, spent * HOLD_FACTOR):
            return
        if self.mode == "lane" and self._raced is not None:
            self.mode, self.anchor = "waiting", self._raced
        elif self.mode == "in place":
            for spot in self._spots.values():
                spot.begin()
        self._compile_all()

    def retire(self, failure: BaseException) -> None:
        """Log a failure of a handler in place, and let the callbacks have no more events."""
        self.deferred, self._raced = True, None
        self.opened().retire(failure)
        self._decide("lane")

    def cost(self, plan: PlanKey, node: Node, handler: Handler) -> float | None:
        """Return the measured seconds that a handler costs an event, in place or to hand over; ``None`` if unknown."""
        if self.deferred:
            return statistics.median(self._handing) if self._handing else None
        spot = self._spots.get((plan, node, handler))
        return spot.cost or None if spot is not None else None

    def report(self) -> PlaceReport:
        """Return where the callbacks run and why, and what both ways cost."""
        here, there = (statistics.median(rounds) if rounds else 0.0 for rounds in self._rounds)
        spot = self._raced or self.anchor or max(self._spots.values(), key=lambda one: one.cost, default=None)
        cost = None if spot is None or spot.calls < 2 else spot.cost
        handing = statistics.median(self._handing) if self._handing else None
        if self.mode in ("waiting", "racing"):
            why = f"it takes {in_ms(cost or 0.0)}, and both ways are being timed"
        elif here and there:
            race = f"from one event to the next {in_ms(there)} with the lane and {in_ms(here)} without"
            race += f", measured with {self._others} other lanes" if self._others else ""
            why = f"{in_ms(cost or 0.0)} in place, {in_ms(handing or 0.0)} to hand over; {race}"
        elif self.deferred:
            why = "a handler has failed"
        elif cost is None:
            why = "it is being timed"
        else:
            why = f"it takes {in_ms(cost)}, and a lane gains nothing below {in_ms(LEAST_GAIN)}"
        return PlaceReport(self.name, "lane" if self.deferred else "in place", why, cost, handing)
