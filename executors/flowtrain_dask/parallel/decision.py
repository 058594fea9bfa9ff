"""Inline or parallel: measured for each plan, decided, and measured again.

A firing on several strands costs about a tenth of a millisecond, and what it gains depends on what the handlers do:
two that hold the interpreter's lock gain nothing however long they take. So nothing is predicted that can be timed.

1. *Measuring*: the first firing runs inline, in serial order, and each handler is timed. What running at the same time
   could save at best follows from the strands (`Strands.saves`). Less than `NEVER`: inline. More than `AT_ONCE`:
   parallel from the next firing on.
2. *Racing*: in between, the firings that follow run inline and parallel in turns, and the medians decide.
3. What was decided is used, and looked at again now and then: a parallel plan when its firings take another time than
   when it was decided, and every so often; an inline plan by timing one firing of it. A parallel plan is raced again
   only until one firing inline has shown that nothing has changed, since each of them costs what parallel saves.

A plan that costs less than `COUNTED` is not even counted: it gets the serial executor's own runner, and is looked at
again when an epoch begins (`Race.rearm`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Runner
from flowtrain.graph.plan import Plan
from flowtrain_dask.parallel.firing import Ways
from flowtrain_dask.parallel.strands import Strands

__all__ = ["AT_ONCE", "COUNTED", "NEVER", "Race"]

AT_ONCE = 5e-3
"""Seconds that parallel could save from which on it is used without a race (which follows later)."""

NEVER = 0.2e-3
"""Seconds that parallel could save below which it is not even tried."""

COUNTED = 50e-6
"""Seconds of all handlers below which firings are not counted."""

_ROUNDS = 5
"""Timed firings of either way in a race."""

_WINS = 0.95
"""Parallel wins a race when it takes less than this part of inline."""

_CHANGED = 1.5
"""A time has changed when it is this many times as long or as short."""

_FIRST_LOOK, _LAST_LOOK = 32, 4096
"""Firings until a decision is looked at again; each time that it holds, twice as many."""

_REARM_AFTER = 1.0
"""Seconds for which a plan that is not counted is left alone."""

Mode = Literal["measuring", "racing", "inline", "parallel"]


class Race:
    """How one plan runs, and why.

    Attributes:
        mode: What is being done.
        reason: Why.
        strands: The strands that are, or would be, used.
        runner: What runs the plan's next firing.

    Args:
        plan: The plan.
        ways: The two ways to run it.
        pack: Spreads the handlers over strands by their costs.
        serial: The serial executor's runner of the plan.
        use: Called with the runner to use from the next firing on.
        clock: The time in seconds.
    """

    def __init__(
        self,
        plan: Plan,
        ways: Ways,
        pack: Callable[[Sequence[float]], Strands],
        serial: Runner,
        use: Callable[[Plan, Runner], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.mode: Mode = "measuring"
        self.reason = "not fired yet"
        self.strands: Strands = pack([1.0] * len(plan.steps))
        self.runner: Runner = self.measure
        self._plan = plan
        self._ways = ways
        self._pack = pack
        self._serial = serial
        self._use_runner = use
        self._clock = clock
        self._look = _FIRST_LOOK
        self._left = 0
        self._odd = 0
        self._costs: list[float] = []
        self._expected = 0.0
        self._inline: list[float] = []
        self._parallel: list[float] = []
        self._warm = False
        self._took = 0.0
        self._raced_work = 0.0
        self._looked = clock()

    # --- runners

    def measure(self, event: Event, phase: Phase) -> None:
        """Run inline and decide by what each handler took."""
        if self._ways.busy:
            return self._serial(event, phase)
        times, failures = self._ways.inline(event, phase)
        if not failures:
            self._decide(times)
        return self._ways.settle(failures, event, phase)

    def race(self, event: Event, phase: Phase) -> None:
        """Run inline or parallel, whichever has been run less, and decide when both have run often enough."""
        if self._ways.busy:
            return self._serial(event, phase)
        if not self._warm or len(self._parallel) < len(self._inline):
            took, failures = self._ways.parallel(self.strands, event, phase)
            if not failures:
                # The first one starts threads.
                self._parallel += [took] if self._warm else []
                self._warm = True
        else:
            times, failures = self._ways.inline(event, phase)
            if not failures:
                self._inline.append(sum(times))
                self._costs = [min(pair) for pair in zip(self._costs, times, strict=True)]
                self._look_once(sum(times))
        if len(self._parallel) == _ROUNDS:
            self._finish()
        return self._ways.settle(failures, event, phase)

    def parallel(self, event: Event, phase: Phase) -> None:
        """Run parallel; race again when the time has changed, and every so often."""
        if self._ways.busy:
            return self._serial(event, phase)
        took, failures = self._ways.parallel(self.strands, event, phase)
        if not failures:
            changed = took > self._expected * _CHANGED or took * _CHANGED < self._expected
            self._odd = self._odd + 1 if changed else 0
            self._left -= 1
            if self._odd == 3:
                self._look = _FIRST_LOOK
                self._use("measuring", "its time has changed", self.measure)
            elif self._left <= 0:
                self._begin(took)
        return self._ways.settle(failures, event, phase)

    def counted(self, event: Event, phase: Phase) -> None:
        """Run inline, and measure again every so often."""
        self._left -= 1
        if self._left > 0:
            self._serial(event, phase)
        else:
            self.measure(event, phase)

    def rearm(self) -> None:
        """Measure the next firing of a plan that is not counted, unless that was done a moment ago."""
        if self.runner is self._serial and self._clock() - self._looked > _REARM_AFTER:
            self.runner = self.measure
            self._use_runner(self._plan, self.measure)

    # --- decisions

    def _decide(self, times: list[float]) -> None:
        self._looked = self._clock()
        self._costs = times
        self.strands = strands = self._pack(times)
        raced = self._raced_work
        if len(strands.strands) < 2 or strands.saves < NEVER:
            self._raced_work = 0.0
            self._go_inline(f"the handlers take {_ms(strands.work)}, running them together saves less than the effort")
        elif strands.saves >= AT_ONCE and not raced:
            self._go_parallel(f"the handlers take {_ms(strands.work)} one after the other", strands.span)
            self._look = self._left = _FIRST_LOOK
        elif raced and raced < strands.work * _CHANGED and strands.work < raced * _CHANGED:
            self._go_inline(self.reason)  # it lost a race with these costs
        else:
            self._begin()

    def _begin(self, took: float = 0.0) -> None:
        """Begin a race; `took` is what the last firing took, of a plan that runs in parallel."""
        self._inline, self._parallel, self._warm = [], [], took > 0.0
        self._took = took
        self._use("racing", f"each way is timed {_ROUNDS} times", self.race)

    def _look_once(self, inline: float) -> None:
        """Stay parallel if that is clearly faster than the first firing inline of a race that looks again."""
        took, self._took = self._took, 0.0
        if inline > took * _CHANGED > 0.0:
            self._raced_work = 0.0
            self._go_parallel(f"it took {_ms(took)} in parallel and {_ms(inline)} inline", took)

    def _finish(self) -> None:
        inline, parallel = statistics.median(self._inline), statistics.median(self._parallel)
        self.strands = self._pack(self._costs)
        reason = f"in a race it took {_ms(parallel)} in parallel and {_ms(inline)} inline"
        if parallel < inline * _WINS:
            self._raced_work = 0.0
            self._go_parallel(reason, parallel)
        else:
            self._raced_work = sum(self._costs)
            self._go_inline(reason)

    def _go_inline(self, reason: str) -> None:
        self._look = self._left = min(self._look * 2, _LAST_LOOK)
        self._use("inline", reason, self.counted if sum(self._costs) >= COUNTED else self._serial)

    def _go_parallel(self, reason: str, expected: float) -> None:
        self._look = self._left = min(self._look * 2, _LAST_LOOK)
        self._expected, self._odd = expected, 0
        self._use("parallel", reason, self.parallel)

    def _use(self, mode: Mode, reason: str, runner: Runner) -> None:
        self.mode, self.reason = mode, reason
        if runner != self.runner:
            self.runner = runner
            self._use_runner(self._plan, runner)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
