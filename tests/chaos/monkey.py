"""What disturbs a cluster: it kills, stops, adds and retires workers, and says what it has confirmed.

A worker is killed while a batch of a lane is in flight on it. That is made sure of by stopping it first: a stopped
process does nothing more, so if the scheduler, given time to read what was sent before, still counts the batch as being
processed there, then its result has not come, and it is killed. Otherwise it goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from tests.support.dask_processes import DaskProcesses
from tests.support.waiting import wait_for

__all__ = ["Monkey", "Seen"]

_SETTLE = 0.06
"""Seconds in which the scheduler reads what a worker sent before it was stopped."""


@dataclass
class Seen:
    """What was done, and confirmed.

    Attributes:
        kills: Workers killed with a batch in flight.
        sending: Workers that died while they sent the result of a batch.
        stops: Workers stopped for longer than they are waited for, and continued.
        joined: Workers that were added, those in place of a lost one included.
        retired: Workers that were retired.
        lanes: The kills by what was in flight.
    """

    kills: int = 0
    sending: int = 0
    stops: int = 0
    joined: int = 0
    retired: int = 0
    lanes: Counter[str] = field(default_factory=Counter)


class Monkey:
    """Disturbs a cluster.

    Args:
        processes: The cluster.
        seed: Chooses what is done when.
        size: How many workers there should be.
        say: Is told what was done.
    """

    def __init__(self, processes: DaskProcesses, seed: int, size: int, say: Callable[[str], None]) -> None:
        self.seen = Seen()
        self._processes = processes
        self._random = random.Random(seed)
        self._size = size
        self._say = say
        self._number = 0
        self._stopped: dict[str, float] = {}  # by name: until when
        self._client: Client = Client(  # type: ignore[no-untyped-call]  # no annotations
            processes.address, set_as_default=False, timeout=30
        )
        while self._number < size:
            self._add()

    def run(self, seconds: float, gap: float) -> None:
        """Disturb for some time.

        Args:
            seconds: How long.
            gap: The mean time between two disturbances.
        """
        end = time.monotonic() + seconds
        rare = [self.die_sending, self.stop, self.retire]
        turn = 0
        while time.monotonic() < end:
            turn += 1
            if turn % 4 == 0:
                rare[(turn // 4 - 1) % len(rare)]()
            else:
                self.kill()
            time.sleep(self._random.uniform(0.5, 1.5) * gap)
            self.mend()
        while self._stopped:
            time.sleep(0.1)
            self.mend()

    def mend(self) -> None:
        """Start workers for those that are gone, and go on with those that were stopped for long enough."""
        for _ in range(self._size - len(self._processes.pids())):
            self._add()
        for name, until in list(self._stopped.items()):
            if time.monotonic() >= until:
                del self._stopped[name]
                self._processes.go_on(name)
                self.seen.stops += 1
                self._say(f"{name} goes on")

    def kill(self, patience: float = 20.0) -> None:
        """Kill a worker with a batch in flight."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            others = set(self._running()) & set(self._addresses())
            for name, keys in self._at_work().items():
                if len(others) < 2:  # another one is to take over
                    break
                if self._random.random() < 0.7 and self._kill_if_at_work(name, keys):
                    return
            time.sleep(0.01)
        self._say("no worker was found at work")

    def die_sending(self) -> None:
        """Let a worker die in sending a result: the next one that is asked for one."""
        folder = self._processes.folder
        names = self._running()
        for name in names:
            (folder / f"die-{name}").touch()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: list(folder.glob("died-*")), 15)
        for name in names:
            (folder / f"die-{name}").unlink(missing_ok=True)
        for died in folder.glob("died-*"):
            name = died.name.removeprefix("died-")
            self._processes.workers[name].wait(10)
            died.unlink()
            self.seen.sending += 1
            self._say(f"{name} died sending a result")

    def stop(self, seconds: float = 9.0) -> None:
        """Stop a worker for longer than it is waited for, one with a batch in flight if there is one."""
        names = list(self._at_work()) or self._running()
        name = self._random.choice(names)
        self._processes.stop(name)
        self._stopped[name] = time.monotonic() + seconds
        self._say(f"{name} is stopped for {seconds:g} s")

    def retire(self) -> None:
        """Add a worker and retire another."""
        names = self._running()
        self._add()
        name = self._random.choice(names)
        address = self._addresses().get(name)
        if address is None:  # it has only just been started
            return
        retired: Any = self._client.retire_workers([address])
        if address not in retired:  # nobody else was there to take what it has
            self._say(f"{name} could not be retired")
            return
        with contextlib.suppress(Exception):
            self._processes.workers[name].wait(10)
        self._end(name)
        self.seen.retired += 1
        self._say(f"{name} is retired")

    def tasks(self) -> int:
        """Return how many tasks the scheduler holds."""
        return int(self._ask(_tasks))

    def close(self) -> None:
        """End the client."""
        with contextlib.suppress(Exception):
            self._client.close(timeout=2)  # type: ignore[no-untyped-call]  # no annotations

    def _kill_if_at_work(self, name: str, keys: set[str]) -> bool:
        process = self._processes.workers[name]
        process.send_signal(signal.SIGSTOP)
        time.sleep(_SETTLE)
        held = keys & self._at_work().get(name, set())
        if not held:
            process.send_signal(signal.SIGCONT)
            return False
        process.kill()
        process.wait(10)
        self.seen.kills += 1
        lane = next(iter(held)).rpartition("-")[0]
        self.seen.lanes[lane] += 1
        self._say(f"{name} is killed with a batch of {lane} in flight")
        return True

    def _at_work(self) -> dict[str, set[str]]:
        """Return the keys of lanes that are being processed, by the name of the worker that runs."""
        found = self._ask(_processing)
        running = self._running()
        return {name: set(keys) for name, keys in found.items() if name in running}

    def _running(self) -> list[str]:
        """Return the names of the workers that run and are not stopped."""
        return [name for name in self._processes.pids().values() if name not in self._stopped]

    def _addresses(self) -> dict[str, str]:
        return dict(self._ask(_addresses))

    def _ask(self, function: Callable[..., Any]) -> Any:
        return self._client.run_on_scheduler(function)  # type: ignore[no-untyped-call]  # no annotations

    def _add(self) -> None:
        self._number += 1
        self.seen.joined += 1
        self._processes.start_worker(f"w{self._number}", "--preload", "tests.chaos.preload")

    def _end(self, name: str) -> None:
        process = self._processes.workers[name]
        if process.poll() is None:
            process.kill()
            process.wait(10)


def _processing(dask_scheduler: Any) -> dict[str, list[str]]:
    return {
        worker.name: [str(task.key) for task in worker.processing if "@" in str(task.key)]
        for worker in dask_scheduler.workers.values()
        if any("@" in str(task.key) for task in worker.processing)
    }


def _addresses(dask_scheduler: Any) -> dict[str, str]:
    return {worker.name: worker.address for worker in dask_scheduler.workers.values()}


def _tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


# The scheduler unpickles them and has none of this: they travel by value.
for _each in (_processing, _addresses, _tasks):
    _each.__module__ = "__main__"
