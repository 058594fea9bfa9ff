"""The gain of running handlers in parallel, and the cost of `DaskExecutor` where parallel handlers gain no time.

``python -m bench.bench_executors`` from the root of the checkout measures the goals; with ``--table`` it measures
handlers of every cost, kind and number instead, and draws ``bench/results/executors.svg``.

One round is a training step and then one event, with the same handlers for each contender. Each line says whether it
compares the event or the whole round:

- *serial*: the serial executor, which is the floor;
- *pool*: a `ThreadPoolExecutor` to which every handler is submitted, and a wait, as one would write it by hand;
- *dask*: `dask.threaded.get` on the task graph of the event, with one task for each handler;
- *ours*: `DaskExecutor`, which chooses between serial and parallel itself.

One kind of handler releases the interpreter's lock while it compresses bytes (`zlib`), one holds the lock while it
counts in Python, and one sleeps, as if it waited for a network.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dask.threaded
import torch
import torch.nn.functional as F

from bench.bench_loop import digits, loader, model_of
from bench.pairs import Figure, Report, figure, in_turns, in_turns_afresh, median, microseconds, ratios, seconds
from flowtrain import BatchEnd, Callback, Event, Learner, LearnerView, Phase, SerialExecutor, TrainingPhase, on
from flowtrain.callbacks import Metrics
from flowtrain.graph.executor import Executor, Runner
from flowtrain.graph.plan import Failed, Plan
from flowtrain.graph.registry import Callbacks
from flowtrain.metrics import accuracy
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinySite
from flowtrain_dask import DaskExecutor
from flowtrain_dask.parallel.task_graph import compile_plan

EVENT, PHASE = BatchEnd(), TrainingPhase()
STEP = 5.5e-3
WORKERS = 2
SETTLED = 30
"""The number of firings before timing begins: the executor decides after at most 11."""

COSTS = (10e-6, 100e-6, 500e-6, 2e-3, 10e-3, 50e-3)
COUNTS = (2, 4, 8)
CONTENDERS = ("pool by hand", "plain dask", "ours")

Act = Callable[[], object]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--table", action="store_true", help="every cost, kind and number of handlers")
    chosen = arguments.parse_args()
    report = Report("Executors", "python -m bench.bench_executors" + (" --table" * chosen.table), "the serial executor")
    if chosen.table:
        table(report)
    else:
        goals(report)


def goals(report: Report) -> None:
    step = step_of(STEP)
    for count, goal in ((2, 0.78), (4, 0.62)):
        both = rounds(step, [zlib_of(2e-3)] * count, 60)
        row(report, f"{count} zlib handlers of 2 ms, the event after a step", [events for _, events in both], goal)
        best = (STEP + count * 2e-3 / WORKERS) / (STEP + count * 2e-3)
        row(report, f"the same with the step, {best:.2f} at best", [whole for whole, _ in both], None)

    acts = [zlib_of(46e-3)] * 4
    alone, own = measured(step), sum(measured(act) for act in acts) / WORKERS
    times = [whole for whole, _ in rounds(step, acts, 40)]
    bound = alone + own
    limits: list[tuple[int, str, float | None]] = [(3, "ours", 1.05), (1, "pool by hand", None), (2, "dask", None)]
    for which, name, limit in limits:
        found = figure([each[which] / bound for each in times])
        what = f"4 zlib handlers of 46 ms, {name}; the floor is step + work / cores"
        against(report, what, bound, median(times, which), found, limit)
    # If both are equally fast, the median is above 1 in half of all runs, so the lower end of the interval decides.
    to_pool = ratios(times, 3, 1)
    shown = microseconds(median(times, 1)), microseconds(median(times, 3)), to_pool.text()
    report.row("the same, ours to the pool", *shown, "not above 1", reached=to_pool.low <= 1.0)

    for count in (1, 2, 4, 16):
        for cost in (0.0, 10e-6, 50e-6):
            for kind, made in (("zlib", zlib_of), ("Python", python_of)):
                if cost == 0.0 and kind == "zlib":
                    continue
                act = made(cost) if cost else nothing
                name = f"{count} handlers of {cost * 1e6:.0f} µs" + (f", {kind}" if cost else "")
                times = alone_rounds([act] * count, 40, firings=200)
                found = ratios(times)
                against(report, f"{name}, the event alone", median(times, 0) / 200, median(times, 1) / 200, found, 1.02)

    train, valid = (loader(part) for part in digits())
    times = in_turns_afresh([partial(fit, name, (train, valid)) for name in ("serial", "dask")], 16, 3)
    found = ratios(times)
    against(report, 'three epochs of digits, `executor="dask"`', median(times, 0), median(times, 1), found, 1.02)


def fit(executor: str, data: tuple[Any, Any]) -> Act:
    """Return a function that trains the digits example for three epochs under an executor."""
    learner = Learner(
        model_of(64, 128),
        F.cross_entropy,
        data=data,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        callbacks=[Metrics(accuracy)],
        default_callbacks="quiet",
        executor=executor,
    )
    return partial(learner.fit, 3)


def table(report: Report) -> None:
    step = step_of(STEP)
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for kind, made in (("zlib", zlib_of), ("Python", python_of), ("sleeping", sleep_of)):
        for count in COUNTS:
            lines = found[kind, count] = {name: [] for name in CONTENDERS}
            for cost in COSTS:
                events = [event for _, event in rounds(step, [made(cost)] * count, 30)]
                row(report, f"{count} {kind} handlers of {cost * 1e3:g} ms, the event after a step", events, None)
                for which, name in enumerate(CONTENDERS, start=1):
                    lines[name].append(ratios(events, which).median)
    draw(found, Path("bench/results/executors.svg"))


def draw(found: Mapping[tuple[str, int], Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw the ratios to the serial executor over the cost of a handler, in a panel for each kind and number."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(11, 8), layout="constrained")
    panels = drawing.subplots(len(found) // len(COUNTS), len(COUNTS), sharex=True, sharey=True, squeeze=False)
    for panel, ((kind, count), lines) in zip(panels.flat, found.items(), strict=True):
        for name, values in lines.items():
            panel.plot([cost * 1e3 for cost in COSTS], values, marker="o", markersize=3, label=name)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(title=f"{count} handlers, {kind}", xscale="log", yscale="log", ylim=(0.1, 20))
        panel.grid(alpha=0.3)
    panels.flat[0].legend()
    drawing.supxlabel("milliseconds of one handler")
    drawing.supylabel("seconds of the event, to the serial executor's")
    drawing.savefig(path)
    print(f"\nDrawn: {path}")


def row(report: Report, what: str, times: Sequence[tuple[float, ...]], goal: float | None) -> None:
    """Print a line for ours, with the ratios of the other contenders in its name."""
    others = ", ".join(f"{name} {ratios(times, which).median:.2f}" for which, name in ((1, "pool"), (2, "dask")))
    against(report, f"{what} ({others})", median(times, 0), median(times, 3), ratios(times, 3), goal)


def against(report: Report, what: str, floor: float, ours: float, found: Figure, goal: float | None) -> None:
    report.row(
        what,
        microseconds(floor),
        microseconds(ours),
        found.text(),
        "" if goal is None else f"{goal:.2f}",
        reached=None if goal is None else found.median <= goal,
    )


Times = tuple[float, ...]


def rounds(step: Act, acts: Sequence[Act], repetitions: int) -> list[tuple[Times, Times]]:
    """Time rounds in turns for serial, pool, dask and ours; return the seconds of whole rounds and of their events."""
    executor = DaskExecutor(workers=WORKERS)
    fires = [fires_of(SerialExecutor(), acts), by_hand(acts), plain_dask(acts), fires_of(executor, acts)]
    for _ in range(SETTLED):
        step()
        fires[-1]()
    gc.collect()
    gc.disable()
    try:
        rows = [[timed(step, fire) for fire in fires] for _ in range(repetitions + 2)][2:]
    finally:
        gc.enable()
        executor.close()
    return [(tuple(whole for whole, _ in row), tuple(event for _, event in row)) for row in rows]


def timed(step: Act, fire: Act) -> tuple[float, float]:
    """Return the seconds of a step and an event together, and of the event alone."""
    begin = time.perf_counter()
    step()
    between = time.perf_counter()
    fire()
    end = time.perf_counter()
    return end - begin, end - between


def alone_rounds(acts: Sequence[Act], repetitions: int, firings: int) -> list[Times]:
    """Time events without a step, for serial and ours in turns.

    The other contenders are left out, because their threads are still busy a while after an event, which would disturb
    the timing of single microseconds.
    """
    executor = DaskExecutor(workers=WORKERS)
    fires = [fires_of(SerialExecutor(), acts), fires_of(executor, acts)]
    for _ in range(SETTLED):
        fires[-1]()
    times = in_turns([partial(again, fire, firings) for fire in fires], repetitions, warmup=2)
    executor.close()
    return times


def again(fire: Act, firings: int) -> None:
    for _ in range(firings):
        fire()


# --- contenders


class Site(TinySite):
    """A stand-in for the loop that raises failures, and uses the runner that the executor chooses."""

    used: Runner | None = None

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
        raise failures[0][1]

    def swap(self, plan: Plan, runner: Runner) -> None:
        self.used = runner


class Works(Callback):
    def __init__(self, act: Act) -> None:
        self.act = act

    @on(BatchEnd)
    def work(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.act()


def plan_of(acts: Sequence[Act]) -> Plan:
    return Callbacks([Works(act) for act in acts], LearnerState()).plan(BatchEnd, TrainingPhase)


def fires_of(executor: Executor, acts: Sequence[Act]) -> Act:
    site = Site()
    executor.bind(site)
    site.used = executor.compile(plan_of(acts))

    def fire() -> None:
        assert site.used is not None
        site.used(EVENT, PHASE)

    return fire


def by_hand(acts: Sequence[Act]) -> Act:
    pool, plan = ThreadPoolExecutor(WORKERS), plan_of(acts)

    def fire() -> None:
        for future in [pool.submit(call, EVENT, PHASE, view) for call, view in plan.calls]:
            future.result()

    return fire


def plain_dask(acts: Sequence[Act]) -> Act:
    pool, graph = ThreadPoolExecutor(WORKERS), compile_plan(plan_of(acts))

    def run(position: int) -> None:
        call, view = graph.plan.calls[position]
        call(EVENT, PHASE, view)

    tasks = graph.tasks(run)

    def fire() -> None:
        dask.threaded.get(tasks, list(tasks), pool=pool)

    return fire


# --- work of a given cost


def nothing() -> None: ...


def measured(act: Act) -> float:
    """Return the seconds that one call takes."""
    return min(seconds(act) for _ in range(25))  # the least, because other work of the machine can only add time


def sized(make: Callable[[int], Act], cost: float) -> Act:
    """Return a function that takes `cost` seconds.

    Args:
        make: Returns a function that takes a time in proportion to the argument of `make`.
        cost: The seconds.
    """
    size = 1000
    for _ in range(4):
        size = max(1, round(size * cost / max(measured(make(size)), 1e-9)))
    return make(size)


def zlib_of(cost: float) -> Act:
    content = random.Random(0).randbytes(16_000_000)
    return sized(lambda size: partial(zlib.compress, content[:size], 1), cost)


def python_of(cost: float) -> Act:
    def make(size: int) -> Act:
        def count() -> None:
            for _ in range(size):
                pass

        return count

    return sized(make, cost)


def sleep_of(cost: float) -> Act:
    return partial(time.sleep, cost)


def step_of(cost: float) -> Act:
    """Return a function that trains a small network for one step, which takes about `cost` seconds on one thread."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 256), torch.randint(10, (64,))

    def make(width: int) -> Act:
        model = torch.nn.Sequential(torch.nn.Linear(256, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        return step

    return sized(make, cost)


if __name__ == "__main__":
    main()
