"""One run: train on a cluster while it is disturbed, train serially, compare the logs.

The scheduler and the workers are started by dask's command line, as a user starts them. At the end of the run the
scheduler is killed, and training continues for some seconds with its lanes in its own process. Then the scheduler is
started again, and training continues until its lanes are on the cluster.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.compare import Difference, compare
from tests.chaos.monkey import Monkey, Seen
from tests.chaos.program import LOGS
from tests.support.dask_processes import DaskProcesses
from tests.support.waiting import wait_for

__all__ = ["Watch", "is_back", "program", "run", "tell"]

_LAST = 6.0
"""Seconds for which training continues without a scheduler, and after the scheduler is back."""


def run(seconds: float, seed: int, size: int, gap: float, keep: bool) -> bool:
    """Do one run, print what was found, and return whether the logs are equal.

    Args:
        seconds: For how long the cluster is disturbed.
        seed: Chooses the data, and what is done to the cluster.
        size: The number of workers.
        gap: The mean time between two disturbances, in seconds.
        keep: Whether to leave the folder with the logs.
    """
    folder = Path(tempfile.mkdtemp(prefix="flowtrain-chaos-"))
    try:
        print(f"seed {seed}, folder {folder}", flush=True)
        begin = time.monotonic()

        def say(text: str) -> None:
            print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

        watch = Watch([folder / "cluster" / log for log in LOGS], say)
        seen = _disturbed(folder, watch, say, seconds, seed, size, gap)
        program(folder, seed).wait()
        found = [compare(folder / "serial" / log, folder / "cluster" / log) for log in LOGS]
        serial, cluster = (json.loads((folder / each / "result.json").read_text()) for each in ("serial", "cluster"))
        print((folder / "cluster" / "report.txt").read_text())
        return tell(seen, found, watch, serial, cluster)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


class Watch(threading.Thread):
    """Looks how long files do not grow.

    Attributes:
        gaps: The longest time in seconds of each file, from its first record on.
    """

    def __init__(self, files: list[Path], say: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self.gaps = [0.0] * len(files)
        self.over = threading.Event()
        self._files = files
        self._say = say

    def run(self) -> None:
        """Look, until it is over."""
        sizes = [0] * len(self._files)
        grown = [0.0] * len(self._files)
        while not self.over.wait(0.02):
            now = time.monotonic()
            for at, file in enumerate(self._files):
                size = file.stat().st_size if file.exists() else 0
                if size <= sizes[at]:
                    continue
                if grown[at]:
                    self.gaps[at] = max(self.gaps[at], now - grown[at])
                    if now - grown[at] > 5:
                        self._say(f"{file.name} goes on after {now - grown[at]:.1f} s")
                sizes[at], grown[at] = size, now


def _disturbed(
    folder: Path, watch: Watch, say: Callable[[str], None], seconds: float, seed: int, size: int, gap: float
) -> Seen:
    """Train on a cluster that is disturbed."""
    processes = DaskProcesses(folder)
    training: subprocess.Popen[bytes] | None = None
    try:
        monkey = Monkey(processes, seed, size, say)
        training = program(folder, seed, "--cluster", processes.address)
        log = folder / "cluster" / LOGS[0]
        wait_for(lambda: log.exists() and log.stat().st_size, 120)
        watch.start()
        monkey.run(seconds, gap)
        say(f"the scheduler, which holds {monkey.tasks()} tasks, is killed")
        monkey.close()
        processes.kill_scheduler()
        time.sleep(_LAST)
        processes.start_scheduler()
        for name in ("late", "later"):
            processes.start_worker(name)
        wait_for(lambda: is_back(folder), 120)
        say("the scheduler is back, and is used")
        time.sleep(_LAST)
        watch.over.set()
        (folder / "stop").touch()
        if training.wait(300):
            raise RuntimeError(f"the training ended with {training.returncode}")
        return monkey.seen
    finally:
        watch.over.set()
        if training is not None and training.poll() is None:
            training.kill()
            training.wait(20)
        processes.close()


def is_back(folder: Path) -> bool:
    """Tell whether the cluster of a program was lost, and all lanes are on it again."""
    now = (folder / "now.txt").read_text()
    return "and was back at" in now and "thread (" not in now


def program(folder: Path, *options: object) -> subprocess.Popen[bytes]:
    """Start the program that trains, with a seed and further options."""
    seed, *rest = map(str, options)
    return subprocess.Popen([sys.executable, "-m", "tests.chaos.program", str(folder), "--seed", seed, *rest])


def tell(
    seen: Seen, found: list[Difference], watch: Watch, serial: dict[str, object], cluster: dict[str, object]
) -> bool:
    """Print what was found; return whether it is what it should be."""
    same = serial == cluster
    events = sum(each.records for each in found)
    print(
        f"kills with a batch in flight {seen.kills}, while sending {seen.sending}; stops {seen.stops}; "
        f"joined {seen.joined}; retired {seen.retired}; scheduler killed and back 1\n"
        f"batches {serial['steps']:,}; records {events:,}; lost {sum(each.lost for each in found)}; "
        f"doubled {sum(each.doubled for each in found)}; out of order {sum(each.out_of_order for each in found)}; "
        f"changed {sum(each.changed for each in found)}; longest gap "
        + ", ".join(f"{gap:.1f} s ({log})" for log, gap in zip(LOGS, watch.gaps, strict=True))
        + f"\ncallbacks and parameters afterwards: {'equal' if same else f'{serial} and {cluster}'}"
    )
    return same and all(each.equal for each in found)
