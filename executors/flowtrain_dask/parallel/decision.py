"""Each plan is run inline or in parallel, whichever is faster: measured, decided, and measured again later.

A firing on several strands costs some tens of microseconds. Its gain depends on the work of the handlers: two handlers
that hold the interpreter's lock gain nothing, however long they take. So the gain is measured and never predicted.
A plan goes through these modes (`Decision.mode`):

1. *measuring*: the first firing runs inline, in serial order, and each handler is timed. The strands tell how much time
   running at the same time could save at best (`Strands.saves`). If that is less than `LEAST_GAIN`, the plan runs
   inline from then on.
2. *racing*: otherwise the next firings run in parallel and inline by turns, until one way is clearly faster, or until
   each has run `ROUNDS` times and the medians decide.
3. *inline* or *parallel*: the plan has the runner that won. For inline that is the serial executor's own runner, so a
   plan that loses nothing by running inline pays nothing.

When an epoch begins, the plan is measured again (`Decision.look_again`), but so seldom that measuring and racing take
at most a hundredth of the time even if one of the ways is very slow.

A process remembers the plans for which parallel has won. For a plan with the same handlers, of a further learner or
after a change of callbacks, the race comes first, and begins in parallel: in a short fit the first firing counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Literal

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Runner
from flowtrain_dask.parallel.firing import TimedPlan
from flowtrain_dask.parallel.strands import Strands

__all__ = ["CLEAR", "HOLD_FACTOR", "LEAST_GAIN", "ROUNDS", "Decision", "Mode", "in_ms", "is_faster"]

LEAST_GAIN = 0.2e-3
"""Seconds. A plan that could save less than this by running in parallel is not raced."""

ROUNDS = 5
"""How often each way is timed in a race, at most."""

_WINS = 0.95
"""A new way, such as running in parallel, wins a race if its median is less than this fraction of the old way's."""

CLEAR = 1.5
"""A race ends early if every firing of one way took this many times as long as every firing of the other."""

_RACE = f"each way is timed at most {ROUNDS} times"

_LEAST_HOLD = 1.0
"""Seconds for which a decision holds at least."""

HOLD_FACTOR = 100.0
"""A decision holds at least this many times as long as measuring and racing took."""

Mode = Literal["measuring", "racing", "inline", "parallel"]

_won: dict[Hashable, tuple[list[float], frozenset[int]]] = {}
"""By the key of a plan for which parallel has won last: the seconds of each handler, and the handlers that wait."""

_REMEMBERED = 1000
"""How many plans are remembered; the one that was decided on first is forgotten first."""


class Decision:
    """How one plan is run, and why.

    Args:
        timed: The plan, and the two ways to run it.
        pack: Spreads the handlers over strands by the seconds that each of them takes, and the positions of those that
            wait most of this time.
        use: Called with the runner for the next firings whenever that changes.
        clock: Returns the time in seconds.
        key: Equal for the plans of this process that have the same handlers; ``None``: nothing is remembered.

    Attributes:
        mode: Whether the next firing measures, races, or runs in the way that was decided on.
        reason: Why the plan is in this mode, as `DaskExecutor.explain` shows it.
        strands: The strands for running in parallel, by the last times that are known.
    """

    def __init__(
        self,
        timed: TimedPlan,
        pack: Callable[[Sequence[float], Collection[int]], Strands],
        use: Callable[[Runner], None],
        clock: Callable[[], float] = time.perf_counter,
        key: Hashable = None,
    ) -> None:
        self.mode: Mode = "measuring"
        self.reason = "not fired yet"
        self.strands: Strands = pack([1.0] * len(timed.plan), ())
        self._timed = timed
        self._pack = pack
        self._use_runner = use
        self._clock = clock
        self._costs: list[float] = []  # the seconds of each handler: the shortest of all inline firings
        self._inline: list[float] = []  # the seconds of each inline firing of the race
        self._parallel: list[float] = []  # the same of the parallel firings
        self._spent = 0.0  # the seconds that measuring and racing have taken
        self._decided_at = 0.0
        self._key = key
        known = _won.get(key)
        if known is not None:
            self._costs, timed.waiting = list(known[0]), known[1]
            self.strands = pack(*known)
            self.mode, self.reason = "racing", _RACE

    @property
    def costs(self) -> Sequence[float]:
        """The seconds of each handler, the shortest of all inline firings; empty before the first one."""
        return tuple(self._costs)

    @property
    def serial(self) -> Runner:
        """Runs the plan as the serial executor does, and measures nothing."""
        return self._timed.serial

    @property
    def first(self) -> Runner:
        """The first runner of the plan."""
        return self.measure if self.mode == "measuring" else self.race

    def measure(self, event: Event, phase: Phase) -> None:
        """Run inline, time each handler, and decide whether a race is worth it."""
        timed = self._timed
        if timed.busy:
            return timed.serial(event, phase)
        times, failures = timed.inline(event, phase)
        if not failures:  # a firing that failed has skipped handlers, so its times say nothing
            self._costs, self._spent = times, sum(times)
            self.strands = strands = self._pack(times, timed.waiting)
            if len(strands.strands) < 2 or strands.saves < LEAST_GAIN:
                saves = "running them together saves less than the effort"
                self._decide("inline", f"the handlers take {in_ms(strands.work)}, {saves}")
            else:
                self._inline, self._parallel = [], []
                self._use("racing", _RACE, self.race)
        return timed.end_event(failures, event, phase)

    def race(self, event: Event, phase: Phase) -> None:
        """Run in parallel or inline, whichever was timed less often, and decide after each round of both."""
        timed = self._timed
        if timed.busy:
            return timed.serial(event, phase)
        if len(self._parallel) == len(self._inline):
            took, failures = timed.parallel(self.strands, event, phase)
            if not failures:
                self._parallel.append(took)
                self._spent += took
        else:
            times, failures = timed.inline(event, phase)
            if not failures:
                self._inline.append(sum(times))
                self._spent += sum(times)
                self._costs = [min(pair) for pair in zip(self._costs, times, strict=True)]
                self._end_round()
        return timed.end_event(failures, event, phase)

    def look_again(self) -> None:
        """Have the plan measured again at its next firing, unless it was decided too short a time ago."""
        decided = self.mode in ("inline", "parallel")
        if decided and self._clock() - self._decided_at > max(_LEAST_HOLD, self._spent * HOLD_FACTOR):
            self._use("measuring", "it is timed again", self.measure)

    def _end_round(self) -> None:
        faster = is_faster(self._parallel, self._inline)
        if faster is not None:
            one, other = statistics.median(self._parallel), statistics.median(self._inline)
            self.strands = self._pack(self._costs, self._timed.waiting)
            reason = f"in a race it took {in_ms(one)} in parallel and {in_ms(other)} inline"
            self._decide("parallel" if faster else "inline", reason)

    def _decide(self, mode: Literal["inline", "parallel"], reason: str) -> None:
        self._decided_at = self._clock()
        timed = self._timed
        _won.pop(self._key, None)
        if mode == "parallel" and self._key is not None:
            _won[self._key] = self._costs, timed.waiting
            if len(_won) > _REMEMBERED:
                del _won[next(iter(_won))]
        self._use(mode, reason, timed.serial if mode == "inline" else partial(timed.fire, self.strands))

    def _use(self, mode: Mode, reason: str, runner: Runner) -> None:
        self.mode, self.reason = mode, reason
        self._use_runner(runner)


def is_faster(new: Sequence[float], old: Sequence[float]) -> bool | None:
    """Return whether a new way is faster than the old one, which wins a draw; ``None`` as long as this is open.

    Args:
        new: The seconds of the new way in each round.
        old: The seconds of the old way in as many rounds.
    """
    if len(old) < 2:
        return None
    if len(old) < ROUNDS and max(new) * CLEAR >= min(old) and max(old) * CLEAR >= min(new):
        return None
    return statistics.median(new) < statistics.median(old) * _WINS


def in_ms(seconds: float) -> str:
    """Return a time as text, in milliseconds."""
    return f"{seconds * 1e3:.2f} ms"
