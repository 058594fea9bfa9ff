"""Programs that tests run in separate processes.

`Programs` forks them from a process that has imported torch and flowtrain: an import takes seconds each time, a fork
takes milliseconds. A forked program has its own standard output and error, its own arguments and environment, and exits
as an interpreter does. Only a test of the effects of an import needs an interpreter that has not imported anything.
`Programs.run` waits until a program has ended, `Programs.start` does not.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

# The modules that every program finds imported. An optimizer imports torch._dynamo, which takes a second.
PREPARED = ("torch", "torch._dynamo", "flowtrain.callbacks", "flowtrain.logging", "flowtrain.testing", "flowtrain_dask")


def importing_the_same() -> dict[str, str]:
    """Return the environment for a program that shall import the same modules as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Started:
    """A program that runs, with some of the methods of `subprocess.Popen`.

    Attributes:
        pid: The process id.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process: int | None = os.pidfd_open(pid)

    def poll(self, seconds: float = 0) -> int | None:
        """Return 0 if the program has ended or the handle was closed, ``None`` if it still runs after this time."""
        if self._process is None:
            return 0
        return 0 if select.select([self._process], [], [], seconds)[0] else None

    def wait(self, seconds: float) -> int:
        """Wait until the program has ended."""
        if self.poll(seconds) is None:
            raise subprocess.TimeoutExpired(f"the process {self.pid}", seconds)
        return 0

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if the program still runs."""
        if self.poll() is None and self._process is not None:
            signal.pidfd_send_signal(self._process, number)

    def kill(self) -> None:
        """Kill the program."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Free the handle of the process, once."""
        if self._process is not None:
            os.close(self._process)
            self._process = None


class Programs:
    """Runs programs, one after the other, or starts them.

    Args:
        modules: Names of modules that programs find imported, besides torch and flowtrain.
        bare: Whether they find only these modules imported, and cannot import flowtrain from here.
        packages: A folder with all packages that bare programs can import. They have no environment variables but
            the search path for commands.
    """

    def __init__(self, *modules: str, bare: bool = False, packages: Path | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = ["-P"]
        if packages is not None:
            options += ["-S", "-B"]  # without site-packages
            environment = {"PATH": "/usr/bin:/bin", "HOME": str(packages), "PYTHONPATH": str(packages)}
        command = [sys.executable, *options, str(Path(__file__).resolve()), *(() if bare else PREPARED), *modules]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment if bare else importing_the_same(),
        )  # fmt: skip

    def run(self, source: str, *arguments: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
        """Run a program; return its exit code and its output.

        Args:
            source: The text of the program.
            arguments: The arguments in ``sys.argv``.
            seconds: The time limit; after it a signal ends the program.
        """
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as readers:
            # Pipes instead of files: a test may limit the size of files that the program writes.
            pipes = [os.path.join(place, name) for name in ("out", "err")]
            for pipe in pipes:
                os.mkfifo(pipe)
            print(json.dumps([True, source, ["-c", *arguments], pipes, seconds]), file=self._parent.stdin, flush=True)
            texts = [*readers.map(read, pipes)]
            return subprocess.CompletedProcess(arguments, int(self._parent.stdout.readline()), *texts)

    def start(self, source: str, *arguments: str, log: Path, seconds: int = 600) -> Started:
        """Start a program; `run` describes the arguments.

        Args:
            log: The file to which the program appends its output.
        """
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        work = [False, source, ["-c", *arguments], [str(log), str(log)], seconds]
        print(json.dumps(work), file=self._parent.stdin, flush=True)
        return Started(int(self._parent.stdout.readline()))

    def close(self) -> None:
        """End the process that forks."""
        self._parent.communicate()


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def wait_for_work() -> list[Any]:
    """Wait for programs and fork for each; in the child, return the program that it shall run."""
    started = set[int]()

    def collect(number: int, frame: object) -> None:
        started.difference_update([pid for pid in started if os.waitpid(pid, os.WNOHANG)[0]])

    signal.signal(signal.SIGCHLD, collect)
    for line in sys.stdin:
        work: list[Any] = json.loads(line)
        waits = work.pop(0)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return work
        if waits:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            print(child, flush=True)
            started.add(child)
    os._exit(0)  # an interpreter with torch takes seconds to exit


def become(source: str, arguments: list[str], pipes: list[str], seconds: int) -> None:
    """Run the text of a program as the main module of this process."""
    signal.alarm(seconds)
    for number, path in enumerate(pipes, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = arguments
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(source, "<program>", "exec"), main.__dict__)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # An interpreter that exits collects garbage, which takes a second with all that torch makes: what is imported here
    # is left out of it in each program.
    gc.collect()
    gc.freeze()
    become(*wait_for_work())
