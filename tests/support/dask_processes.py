"""A dask cluster of real processes, started as a user does: ``dask scheduler`` and ``dask worker``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.programs import importing_the_same
from tests.support.waiting import wait_for


class DaskProcesses:
    """A scheduler and workers on 127.0.0.1, each a process of its own.

    Attributes:
        address: The scheduler's.
        scheduler: Its process.
        workers: The processes of the workers, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.stopped: set[int] = set()
        info = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(info)
        )
        wait_for(lambda: info.exists() and info.read_text().rstrip().endswith("}"), 60)
        self.address: str = json.loads(info.read_text())["address"]

    def start_worker(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a worker with one thread, and without a nanny that would start it again."""
        process = self._start(
            "worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1",
            "--name", name, "--local-directory", str(self.folder), "--death-timeout", "10", *options,
        )  # fmt: skip
        self.workers[name] = process
        return process

    def pids(self) -> dict[int, str]:
        """Return the names of the running workers, by process id."""
        return {process.pid: name for name, process in self.workers.items() if process.poll() is None}

    def kill(self, name: str) -> None:
        """Kill a worker."""
        self.workers[name].kill()
        self.workers[name].wait(20)

    def stop(self, name: str) -> None:
        """Suspend a worker: it stays connected and does not answer."""
        self.stopped.add(self.workers[name].pid)
        self.workers[name].send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """Let a suspended worker continue."""
        self.workers[name].send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the scheduler and all workers."""
        for process in [*self.workers.values(), self.scheduler]:
            if process.poll() is None:
                process.kill()
                process.wait(20)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = importing_the_same()
        if command[0] == "scheduler":  # the scheduler must work without flowtrain
            del environment["PYTHONPATH"]
        with (self.folder / f"{command[0]}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *command], stdout=log, stderr=log, env=environment, cwd=self.folder
            )
