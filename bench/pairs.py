"""The method of the benchmarks: a function and its floor are timed in turns, and medians have a confidence interval.

If two functions are timed one after the other, other work of the machine disturbs them differently. Here they take
turns (A B A B ...), each turn gives one figure (a ratio or a difference), and the report has the median of the figures
with a 95% confidence interval of that median. The garbage collector is off during each timing, and torch has one
thread.

There are two clocks. `WALL` is the time that users wait. `PROCESSOR` is the time that all threads of the process
compute: for work on one thread that never waits, it is the time that `WALL` would show on an idle machine.

A report is Markdown, ready for ``bench/results/``.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = [
    "PROCESSOR",
    "WALL",
    "Clock",
    "Figure",
    "Report",
    "differences",
    "figure",
    "in_turns",
    "in_turns_afresh",
    "median",
    "microseconds",
    "ratios",
    "second_core",
    "seconds",
]

Clock = Callable[[], float]
WALL: Clock = time.perf_counter
PROCESSOR: Clock = time.process_time

REPETITIONS = 40
"""The number of timings of each pair by default; at least 30."""


@dataclass(frozen=True)
class Figure:
    """A median with its 95% interval."""

    median: float
    low: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """Return the figure as ``1.021 [1.018, 1.025]``, multiplied by `scale`."""
        median, low, high = (f"{value * scale:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} [{low}, {high}]"


def figure(values: Sequence[float]) -> Figure:
    """Return the median and the order statistics that enclose the true median with 95% confidence.

    Raises:
        ValueError: There are fewer than 30 values.

    >>> figure(list(range(1, 31)))
    Figure(median=15.5, low=10, high=21)
    """
    ordered, n = sorted(values), len(values)
    if n < 30:
        raise ValueError(f"{n} repetitions are too few for an interval; take at least 30.")
    # The largest k for which fewer than k of n values lie below the true median in at most 2.5% of all runs.
    k, below = 0, 0.0
    while below + math.comb(n, k) / 2**n <= 0.025:
        below += math.comb(n, k) / 2**n
        k += 1
    return Figure(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def seconds(run: Callable[[], object], clock: Clock = WALL) -> float:
    """Time one call."""
    start = clock()
    run()
    return clock() - start


def in_turns(
    runs: Sequence[Callable[[], object]],
    repetitions: int = REPETITIONS,
    warmup: int = 3,
    clock: Clock = WALL,
    before: Callable[[], object] | None = None,
) -> list[tuple[float, ...]]:
    """Time several functions in turns; return the seconds of each function for each repetition.

    `before` is called before each timing, such as a barrier at which several processes wait for each other.
    """

    def timed(run: Callable[[], object]) -> float:
        if before is not None:
            before()
        return seconds(run, clock)

    gc.collect()  # only once, because a collection before each timing would empty the caches of the processor
    gc.disable()
    try:
        for _ in range(warmup):
            for run in runs:
                run()
        return [tuple(map(timed, runs)) for _ in range(repetitions)]
    finally:
        gc.enable()


def in_turns_afresh(
    make: Sequence[Callable[[], Callable[[], object]]],
    rounds: int,
    repetitions: int,
    clock: Clock = WALL,
    before: Callable[[], object] | None = None,
) -> list[tuple[float, ...]]:
    """Make new functions for each of several rounds, and time them in turns.

    Two models that are made alike differ by up to a percent in speed for as long as they live, depending on their place
    in memory. Making them several times averages this difference out.
    """
    return [row for _ in range(rounds) for row in in_turns([each() for each in make], repetitions, 1, clock, before)]


def ratios(times: Sequence[tuple[float, ...]], which: int = 1, floor: int = 0) -> Figure:
    """Return the ratio of the time of one function to the time of another, over all repetitions.

    Args:
        times: The seconds of each function for each repetition, as `in_turns` returns them.
        which: The index of the function.
        floor: The index of the function that it is compared with.
    """
    return figure([row[which] / row[floor] for row in times])


def differences(times: Sequence[tuple[float, ...]], which: int = 1, floor: int = 0, calls: int = 1) -> Figure:
    """Return the difference of the times of two functions, in seconds for each of `calls`; see `ratios`."""
    return figure([(row[which] - row[floor]) / calls for row in times])


def median(times: Sequence[tuple[float, ...]], which: int) -> float:
    """Return the median of the seconds of one function."""
    return statistics.median(row[which] for row in times)


def microseconds(seconds: float) -> str:
    """Return a time in microseconds, with the digits that a ratio of two such times needs.

    >>> microseconds(4.123e-7), microseconds(0.0041762)
    ('0.412 µs', '4176.2 µs')
    """
    return f"{seconds * 1e6:.{3 if seconds < 1e-5 else 1}f} µs"


def second_core() -> Figure:
    """Return the time of two threads for work that one thread does in the time 1: 0.5 if two cores are free."""
    blob = random.Random(0).randbytes(400_000)

    def both() -> None:
        threads = [threading.Thread(target=zlib.compress, args=(blob,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def one() -> None:
        zlib.compress(blob)
        zlib.compress(blob)

    return ratios(in_turns([one, both], 30))


class Report:
    """Prints the table of a benchmark as Markdown, with hardware, versions and method, for comparison with other runs.

    Args:
        title: The title.
        command: The command that runs the benchmark.
        floor: A description of the floor.
        clock: The clock.
        packages: The packages whose versions are printed.
    """

    def __init__(
        self, title: str, command: str, floor: str, clock: Clock = WALL, packages: Sequence[str] = ("torch", "rich")
    ) -> None:
        torch.set_num_threads(1)
        print(f"## {title}\n")
        print(f"- command: `{command}`")
        print(f"- date: {date.today().isoformat()}")
        print(f"- hardware: {os.cpu_count()} cores, {_processor()}; torch on 1 thread")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        print(f"- versions: flowtrain {_own_version()}, Python {platform.python_version()}, {versions}")
        print(f"- floor: {floor}")
        timed = "processor time" if clock is PROCESSOR else "wall"
        print(f"- clock: {timed}; figures: median of the pairs [95% interval of the median]\n")
        print("| what | floor | ours | figure | goal | |")
        print("| --- | ---: | ---: | ---: | ---: | --- |", flush=True)

    def row(self, what: str, floor: str, ours: str, found: str, goal: str = "", *, reached: bool | None = None) -> None:
        """Print one line; `reached` says whether the goal is reached, ``None`` that there is no goal."""
        verdict = "" if reached is None else "reached" if reached else "**missed**"
        print(f"| {what} | {floor} | {ours} | {found} | {goal} | {verdict} |", flush=True)

    def ratio(
        self, what: str, times: Sequence[tuple[float, ...]], goal: float | None, *, steps: int, which: int = 1
    ) -> None:
        """Print a line for a ratio to the floor, with the microseconds of each of the `steps` in a run."""
        found = ratios(times, which)
        self.row(
            what,
            microseconds(median(times, 0) / steps),
            microseconds(median(times, which) / steps),
            found.text(),
            "" if goal is None else f"{goal:.2f}",
            reached=None if goal is None else found.median <= goal,
        )


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _own_version() -> str:
    # Read the version from the file, because a checkout that is not installed has no metadata.
    project = Path(__file__).parents[1] / "pyproject.toml"
    line = next(line for line in project.read_text().splitlines() if line.startswith("version"))
    return line.split('"')[1]
