"""Where the callbacks of a lane run: in place or in the lane, decided by what each way costs training.

Policy
    Under ``defer="auto"`` the gain of a lane is measured and never predicted, because it depends on the work of the
    handlers: a handler that holds the interpreter's lock gains nothing on a thread. Each handler is timed in place at
    first, so that a cheap one never costs a snapshot. As soon as one turns out to be costly, both ways are raced: the
    time from one of its events to the next one, training included, is taken by turns with the lane's events in place
    and in the lane. The quicker way is kept, and raced again at the beginning of an epoch, but so seldom that races
    take at most a hundredth of the time.

    One race runs at a time, because two would disturb each other. Lanes that wait for their race at the same event race
    together first: four callbacks that sleep gain little one by one, and much together. If together they gain nothing,
    or when they are measured again, each races alone.

State
    ==============  ===================================================================================================
    `CallTimes`     of one handler in one plan: what its calls in place took
    `Race`          of the lanes that race together: the rounds of both ways, and the verdict
    `Turn`          of one learner: which lane leads the race that runs
    `Placement`     of one lane: its callbacks, and the mode in which they are
    ==============  ===================================================================================================

    The mode of a lane (`Placement.mode`) changes in this way:

    1. *in place*. After `TIMED` calls that took less than `LEAST_GAIN` on average, the plan gets the plain call of the
       handler back: from then on it costs what it costs under the serial executor.
    2. *waiting* for a race, once two calls of a handler, its *anchor*, have taken longer than that.
    3. *racing*: events of the anchor of the lane that leads divide the rounds. A round in the lanes ends when these are
       empty. If another lane takes the turn, the lanes wait again.
    4. *in place* or *lane*, as the race has ended.

    All callbacks of a lane move together. The lane is empty at each move to place, and nothing is in it until the move
    back. So the events of its callbacks keep their order, and the callbacks have the state that they would have in a
    serial run.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal
from weakref import WeakSet

from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, PlanKey
from flowtrain_dask.deferred.race import CallTimes, Race
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.report import PlaceReport
from flowtrain_dask.parallel.decision import HOLD_FACTOR, LEAST_GAIN, in_ms

__all__ = ["TIMED", "Mode", "Placement", "Turn"]

TIMED = 30
"""How many calls of a handler are timed before it is left in place, at most."""

_LEAST_HOLD = 10.0
"""Seconds for which a decision holds at least."""

Mode = Literal["in place", "waiting", "racing", "lane"]


class Turn:
    """Lets one lane of a learner, with its companions, race at a time.

    Attributes:
        ended: When the last race ended.
    """

    def __init__(self) -> None:
        self.ended = 0.0
        # All of these refer to this object.
        self._leader: weakref.ref[Placement] | None = None
        self._placements: WeakSet[Placement] = WeakSet()

    def add(self, placement: Placement) -> None:
        """Take note of a lane that may race."""
        self._placements.add(placement)

    @property
    def leader(self) -> Placement | None:
        """The lane whose events divide the rounds of the race that runs."""
        return None if self._leader is None else self._leader()

    def take(self, placement: Placement) -> bool:
        """Let a lane lead if no other one does; return whether it leads.

        A lane with frequent events takes the turn from one that has had none since its own last event. Otherwise a race
        whose rounds are epochs would keep it waiting for many epochs.
        """
        leader = self.leader
        if leader is None or leader.last < placement.last:
            self._leader = weakref.ref(placement)
        return self.leader is placement

    def give_back(self, placement: Placement, now: float) -> None:
        """Let another lane lead."""
        if self.leader is placement:
            self._leader, self.ended = None, now

    def companions(self, placement: Placement) -> list[Placement]:
        """Return the lanes that can race together with one that leads: they wait for it at the same event."""
        anchor = placement.anchor
        if placement.alone or anchor is None:
            return []
        waiting = [each for each in self._placements if each.mode == "waiting" and not each.alone]
        others = [each for each in waiting if each is not placement and each.is_remote == placement.is_remote]
        return [each for each in others if each.anchor is not None and each.anchor.plan == anchor.plan]

    def lanes_of(self, race: Race | None) -> list[Placement]:
        """Return the lanes that take part in a race."""
        return [each for each in self._placements if each.mode == "racing" and each.race is race]


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
        anchor: The times of the handler whose events divide the rounds of a race; ``None`` if none is to come or runs.
        race: The race in which the lane takes part, or has taken part last.
        last: When the anchor was last called; 0 if no round can begin with that call.
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
        self.anchor: CallTimes | None = None
        self.race: Race | None = None
        self.last = 0.0
        self.alone = False
        self._make_lane = make_lane
        self._stopping = stopping
        self._turn = turn
        self._stale = stale
        self._clock = clock
        self._times: dict[tuple[PlanKey, Node, Handler], CallTimes] = {}
        self._raced: CallTimes | None = None  # the anchor of the last race that has ended
        self._handing: list[float] = []  # the seconds that handing over took in the race
        self._decided_at = 0.0
        if turn is not None:
            turn.add(self)

    # --- the lane

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
        if not deferred and not self._emptied():
            return False
        self.deferred = deferred
        return True

    def _emptied(self) -> bool:
        """Wait until the lane is empty; return whether nothing is in it, and it has neither failed nor retired."""
        lane = self.lane
        if lane is None or not self.deferred:
            return True
        with lane.waited_for():
            while not lane.over and not lane.flush(0.25) and not self._stopping():
                pass
        return not lane.over and lane.idle

    def retire(self, failure: BaseException) -> None:
        """Log a failure of a handler in place, and let the callbacks have no more events."""
        self.deferred, self._raced, self.race = True, None, None
        self.opened().retire(failure)
        self._decide("lane")
        if self._turn is not None:
            self._turn.give_back(self, self._clock())

    # --- the calls of handlers

    def settled(self, plan: PlanKey, node: Node, handler: Handler) -> Literal["", "in place", "lane"]:
        """Return where a handler of a plan runs; empty while this is being measured."""
        if self.mode == "lane":
            return "lane"
        times = self._times.get((plan, node, handler))
        return "in place" if self.mode == "in place" and times is not None and not times.wanted else ""

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
        turn, clock = self._turn, self._clock
        times = self._times.setdefault((plan, node, handler), CallTimes(plan))

        def run(event: Event, phase: Phase, view: Any) -> None:
            """Run the handler in place or hand its event over, and measure this as long as nothing is decided."""
            if self.anchor is times:
                self._take_part(turn)
            if self.deferred and self.mode != "racing":
                hand_over(event, phase, view)
            elif self.deferred:
                begin = clock()
                hand_over(event, phase, view)
                self._handing.append(clock() - begin)
                self.opened().process_soon()
            elif times.wanted:
                begin = clock()
                call(event, phase, view)
                self._add(times, begin)
            else:
                call(event, phase, view)

        return run

    def _add(self, times: CallTimes, begin: float) -> None:
        """Count a call in place that has ended now."""
        times.add(self._clock() - begin)
        if times.are_costly:
            if self.mode == "in place":
                self.mode, self.anchor, self.last = "waiting", times, begin
                self._compile_all()  # handlers with the plain call would overtake those whose events go to the lane
        elif times.calls >= TIMED:
            times.wanted = False
            self._decided_at = self._clock()
            self._stale.add(times.plan)

    def _compile_all(self) -> None:
        """Have all plans with a handler of these callbacks compiled again when the present event has ended."""
        self._stale.update(times.plan for times in self._times.values())

    # --- the race

    def _take_part(self, turn: Turn) -> None:
        """At an event of the anchor: end a round of the race that this lane leads, and begin the next one.

        If no race runs, this lane begins one. In a race that another lane leads, that lane has moved this one already.
        """
        now, race = self._clock(), self.race
        leader = turn.leader
        if leader is not self:
            if leader is not None and self.mode == "racing" and leader.race is race:
                self.last = now
                return
            for each in turn.lanes_of(race) if self.mode == "racing" else ():
                each.mode = "waiting"  # another lane has taken the turn
            if not turn.take(self):
                self.last = now
                return
            race = self._begin_race(turn, leader)
        assert race is not None
        self.last, lanes = now, turn.lanes_of(race)
        if not all(each._emptied() for each in lanes):
            for each in lanes:  # one has failed, or training is about to stop: events go to the lanes as before
                each.mode = "waiting"
            turn.give_back(self, now)
            return
        if race.began is not None:
            race.end(self._round(race, race.began, now, lanes))
        if race.verdict is not None:
            self._end_race(turn, race.verdict, lanes)
            return
        race.begin(self._clock())
        for each in lanes:
            each.move(race.deferred)

    def _begin_race(self, turn: Turn, before: Placement | None) -> Race:
        """Begin a race with the companions of this lane, now that it leads, instead of the lane that led before.

        If all of them have been in place since the last event of the anchor, and no race was on, then that was the
        first round.
        """
        lanes = [self, *turn.companions(self)]
        undisturbed = before is None and turn.ended < self.last and not any(each.deferred for each in lanes)
        anchors = [each.anchor for each in lanes if each.anchor is not None and each.anchor.wanted]
        race = Race(len(lanes), sum(times.shortest for times in anchors), self.last if undisturbed else None)
        for each in lanes:
            each.mode, each.race, each._handing = "racing", race, []
        return race

    def _round(self, race: Race, began: float, now: float, lanes: Sequence[Placement]) -> float:
        """Return the seconds of a round that has ended now, when the lanes are empty."""
        if not race.deferred:
            return now - began
        if not self.is_remote:
            return self._clock() - began  # with the wait for the lane: its thread may have shared a core with training
        # The wait is mostly the way to the worker and back, which a lane with many events makes once for all of them.
        # But the worker takes as long as this process for each event, so that a lane is no faster than its handler.
        return max(now - began, *(0.0 if each.anchor is None else each.anchor.cost for each in lanes))

    def _end_race(self, turn: Turn, faster: bool, lanes: Sequence[Placement]) -> None:
        """Move the lanes of a race, all of which are empty, to the place that was faster."""
        for each in lanes:
            each.deferred, each.alone, each._raced = faster, True, each.anchor
            if faster or len(lanes) == 1:
                each._decide("lane" if faster else "in place")
            else:
                each.mode = "waiting"  # one of them may still gain something alone
        turn.give_back(self, self._clock())

    def _decide(self, mode: Literal["in place", "lane"]) -> None:
        self.mode, self.anchor, self._decided_at = mode, None, self._clock()
        for times in self._times.values():
            times.wanted = False
        self._compile_all()

    def divides_race(self, plan: PlanKey) -> bool:
        """Return whether the events of a plan divide the rounds of a race of this lane, or will do so."""
        return self.mode in ("waiting", "racing") and self.anchor is not None and self.anchor.plan == plan

    def look_again(self) -> None:
        """Have the callbacks measured again, unless they were a short time ago."""
        spent = 0.0 if self.race is None else self.race.spent
        if self._turn is None or self._clock() - self._decided_at < max(_LEAST_HOLD, spent * HOLD_FACTOR):
            return
        if self.mode == "lane" and self._raced is not None:
            self.mode, self.anchor, self.last = "waiting", self._raced, 0.0
        elif self.mode == "in place":
            for times in self._times.values():
                times.begin()
        self._compile_all()

    # --- what is known

    def cost(self, plan: PlanKey, node: Node, handler: Handler) -> float | None:
        """Return the measured seconds that a handler costs an event, in place or to hand over; ``None`` if unknown."""
        if self.deferred:
            return statistics.median(self._handing) if self._handing else None
        times = self._times.get((plan, node, handler))
        return times.cost or None if times is not None else None

    def report(self) -> PlaceReport:
        """Return where the callbacks run and why, and what both ways cost."""
        race = self.race or Race()
        times = self._raced or self.anchor or max(self._times.values(), key=lambda each: each.cost, default=None)
        cost = None if times is None or times.calls < 2 else times.cost
        handing = statistics.median(self._handing) if self._handing else None
        if self.mode in ("waiting", "racing"):
            why = f"it takes {in_ms(cost or 0.0)}, and both ways are being timed"
        elif race.here and race.there:
            here, there = statistics.median(race.here), statistics.median(race.there)
            ways = f"from one event to the next {in_ms(there)} with the lane and {in_ms(here)} without"
            ways += f", measured with {race.lanes - 1} other lanes" if race.lanes > 1 else ""
            why = f"{in_ms(cost or 0.0)} in place, {in_ms(handing or 0.0)} to hand over; {ways}"
        elif self.deferred:
            why = "a handler has failed"
        elif cost is None:
            why = "it is being timed"
        else:
            why = f"it takes {in_ms(cost)}, and a lane gains nothing below {in_ms(LEAST_GAIN)}"
        return PlaceReport(self.name, "lane" if self.deferred else "in place", why, cost, handing)
