"""Inline or parallel: timed for each plan, decided, and timed again when an epoch begins.

A firing on several strands costs some tens of microseconds, and what it gains depends on what the handlers do: two that
hold the interpreter's lock gain nothing however long they take. So nothing is predicted that can be timed.

1. *Measuring*: the first firing runs inline, in serial order, and each handler is timed. The strands (`Strands.saves`)
   say what running at the same time could save at best. If that is less than `NEVER`, the plan runs inline.
2. *Racing*: otherwise the firings that follow run parallel and inline in turns, until one of the two is clearly faster,
   or until each has run `ROUNDS` times and the medians decide.
3. The plan then has the runner that won: for inline the serial executor's own, which costs nothing more. When an epoch
   begins, both steps are taken again (`Decision.look_again`), but so seldom that they take at most a hundredth of the
   time, whichever of the two ways is the slower one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Runner
from flowtrain_dask.parallel.firing import TimedPlan
from flowtrain_dask.parallel.strands import Strands

__all__ = ["NEVER", "ROUNDS", "Decision", "Mode"]

NEVER = 0.2e-3
"""Seconds that parallel could save at best, below which it is not even tried."""

ROUNDS = 5
"""Timed firings of either way in a race, at most."""

_WINS = 0.95
"""Parallel wins a race when its median is less than this part of inline's."""

_CLEAR = 1.5
"""A race is over early when every firing of one way took this many times as long as every firing of the other."""

_LOOK_AFTER = 1.0
"""Seconds for which a decision holds at least."""

_SHARE = 100.0
"""A decision holds at least this many times as long as it took to come to it."""

Mode = Literal["measuring", "racing", "inline", "parallel"]


class Decision:
    """How one plan runs, and why. The plan's first runner is `measure`.

    Attributes:
        mode: What the next firing is: timed in one of two ways, or run as was decided.
        reason: Why.
        strands: The strands that are used, or would be.

    Args:
        timed: The plan, and the two ways to run it.
        pack: Spreads the handlers over strands by their costs.
        use: Called with the runner to use from the next firing on.
        clock: The time in seconds.
    """

    def __init__(
        self,
        timed: TimedPlan,
        pack: Callable[[Sequence[float]], Strands],
        use: Callable[[Runner], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.mode: Mode = "measuring"
        self.reason = "not fired yet"
        self.strands: Strands = pack([1.0] * len(timed.plan))
        self._timed = timed
        self._pack = pack
        self._use_runner = use
        self._clock = clock
        self._costs: list[float] = []
        self._inline: list[float] = []
        self._parallel: list[float] = []
        self._spent = 0.0
        self._decided = 0.0

    def measure(self, event: Event, phase: Phase) -> None:
        """Run inline, and see from the time of each handler what running them together could save."""
        timed = self._timed
        if timed.busy:
            return timed.serial(event, phase)
        times, failures = timed.inline(event, phase)
        if not failures:
            self._costs, self._spent = times, sum(times)
            self.strands = strands = self._pack(times)
            if len(strands.strands) < 2 or strands.saves < NEVER:
                saves = "running them together saves less than the effort"
                self._decide("inline", f"the handlers take {_ms(strands.work)}, {saves}")
            else:
                self._inline, self._parallel = [], []
                self._use("racing", f"each way is timed at most {ROUNDS} times", self.race)
        return timed.settle(failures, event, phase)

    def race(self, event: Event, phase: Phase) -> None:
        """Run parallel or inline, whichever has been run less, and decide when that can be done."""
        timed = self._timed
        if timed.busy:
            return timed.serial(event, phase)
        if len(self._parallel) == len(self._inline):
            took, failures = timed.parallel(self.strands, event, phase)
            if not failures:  # a firing that skipped handlers takes another time
                self._parallel.append(took)
                self._spent += took
        else:
            times, failures = timed.inline(event, phase)
            if not failures:
                self._inline.append(sum(times))
                self._spent += sum(times)
                self._costs = [min(pair) for pair in zip(self._costs, times, strict=True)]
                self._end_round()
        return timed.settle(failures, event, phase)

    def look_again(self) -> None:
        """Time the plan once more, unless it was decided too short a time ago."""
        decided = self.mode in ("inline", "parallel")
        if decided and self._clock() - self._decided > max(_LOOK_AFTER, self._spent * _SHARE):
            self._use("measuring", "it is timed again", self.measure)

    def _end_round(self) -> None:
        inline, parallel = self._inline, self._parallel
        clear = max(parallel) * _CLEAR < min(inline) or max(inline) * _CLEAR < min(parallel)
        if len(inline) == ROUNDS or (len(inline) > 1 and clear):
            one, other = statistics.median(parallel), statistics.median(inline)
            self.strands = self._pack(self._costs)
            reason = f"in a race it took {_ms(one)} in parallel and {_ms(other)} inline"
            self._decide("parallel" if one < other * _WINS else "inline", reason)

    def _decide(self, mode: Literal["inline", "parallel"], reason: str) -> None:
        self._decided = self._clock()
        timed = self._timed
        self._use(mode, reason, timed.serial if mode == "inline" else partial(timed.fire, self.strands))

    def _use(self, mode: Mode, reason: str, runner: Runner) -> None:
        self.mode, self.reason = mode, reason
        self._use_runner(runner)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
