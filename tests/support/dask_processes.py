"""A dask cluster of real processes, started as a user does: ``dask scheduler`` and ``dask worker``.

They can be forked instead from processes that have imported dask, torch and flowtrain, which takes a worker three
seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.programs import Programs, Started, importing_the_same
from tests.support.waiting import wait_for

_PROGRAM = """
import json, os, sys
import dask
from distributed.cli.dask_{} import main
os.chdir(sys.argv.pop(1))
os.environ.update(json.loads(sys.argv.pop(1)))
dask.config.refresh()
main()
"""


class DaskProcesses:
    """A scheduler and workers, each a process of its own.

    Args:
        folder: A folder for the files and the logs of the processes.
        forked: Forks the scheduler, and forks the workers; without it each is started with the command of dask.
        host: The address of the machine for scheduler and workers.
        within: The words before the command of dask, as those that run it in another namespace.

    Attributes:
        address: The scheduler's.
        scheduler: Its process.
        workers: The processes of the workers, by name.
    """

    def __init__(
        self,
        folder: Path,
        forked: tuple[Programs, Programs] | None = None,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        self.folder, self._forked, self._host, self._within = folder, forked, host, within
        self.workers: dict[str, subprocess.Popen[bytes] | Started] = {}
        self.stopped: set[int] = set()
        self.address: str = ""
        self.scheduler = self.start_scheduler()

    def start_scheduler(self) -> subprocess.Popen[bytes] | Started:
        """Start a scheduler, at the address of the one before if there was one."""
        info = self.folder / "scheduler.json"
        info.unlink(missing_ok=True)
        port = self.address.rpartition(":")[2] or "0"
        self.scheduler = self._start(
            "scheduler", "--host", self._host, "--port", port, "--no-dashboard", "--scheduler-file", str(info)
        )
        wait_for(lambda: info.exists() and info.read_text().rstrip().endswith("}"), 60)
        self.address = json.loads(info.read_text())["address"]
        return self.scheduler

    def kill_scheduler(self) -> None:
        """Kill the scheduler, after which its workers end."""
        self.scheduler.kill()
        self.scheduler.wait(20)
        if isinstance(self.scheduler, Started):
            self.scheduler.close()

    def start_worker(self, name: str, *options: str) -> subprocess.Popen[bytes] | Started:
        """Start a worker with one thread, and without a nanny that would start it again."""
        process = self._start(
            "worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", self._host,
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
            if isinstance(process, Started):
                process.close()

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes] | Started:
        log = self.folder / f"{kind}.log"
        if self._forked is not None:
            programs = self._forked[kind == "worker"]
            settings = json.dumps({name: value for name, value in os.environ.items() if name.startswith("DASK_")})
            return programs.start(_PROGRAM.format(kind), str(self.folder), settings, *options, log=log)
        environment = importing_the_same()
        if kind == "scheduler":  # the scheduler must work without flowtrain
            del environment["PYTHONPATH"]
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self._within, sys.executable, "-m", "dask", kind, *options],
                stdout=output, stderr=output, env=environment, cwd=self.folder,
            )  # fmt: skip
