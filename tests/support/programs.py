"""Programs that tests run in processes of their own.

`Programs` forks them from a process that has imported torch and flowtrain: an import takes seconds each time, a fork
takes milliseconds. A forked program has what a program has: standard output and error of its own, arguments, the
environment, an end as an interpreter ends. Only a test of what an import does needs an interpreter that has not
imported anything.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any


def importing_the_same() -> dict[str, str]:
    """Return the environment for a program that imports from where this process does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Programs:
    """Runs programs, one after the other."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=importing_the_same()
        )

    def run(self, source: str, *arguments: str, seconds: int = 120) -> subprocess.CompletedProcess[str]:
        """Run a program; return how it ended and what it has printed.

        Args:
            source: The text of the program.
            arguments: What it finds in ``sys.argv``.
            seconds: How long it may take; then a signal ends it.
        """
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as readers:
            # Not files: a program may have to do with a limit on their size.
            pipes = [os.path.join(place, name) for name in ("out", "err")]
            for pipe in pipes:
                os.mkfifo(pipe)
            print(json.dumps([source, ["-c", *arguments], pipes, seconds]), file=self._parent.stdin, flush=True)
            texts = [*readers.map(read, pipes)]
            return subprocess.CompletedProcess(arguments, int(self._parent.stdout.readline()), *texts)

    def close(self) -> None:
        """End the process that forks."""
        self._parent.communicate()


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def wait_for_work() -> list[Any]:
    """Fork for each program; return what it is to the child."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work: list[Any] = json.loads(line)
            return work
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(source: str, arguments: list[str], pipes: list[str], seconds: int) -> None:
    """Run the text of a program as the main module of this process."""
    signal.alarm(seconds)
    for number, path in enumerate(pipes, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = arguments
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(source, "<program>", "exec"), main.__dict__)


if __name__ == "__main__":
    for name in ("torch", "flowtrain.callbacks", "flowtrain.logging", "flowtrain.testing"):
        importlib.import_module(name)
    become(*wait_for_work())
