"""Programs that tests run in separate processes.

`Programs` forks them from a process that has imported torch and flowtrain: an import takes seconds each time, a fork
takes milliseconds. A forked program has its own standard output and error, its own arguments and environment, and exits
as an interpreter does. Only a test of the effects of an import needs an interpreter that has not imported anything.
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

# The modules that every program finds imported. An optimizer imports torch._dynamo, which takes a second.
PREPARED = ("torch", "torch._dynamo", "flowtrain.callbacks", "flowtrain.logging", "flowtrain.testing", "flowtrain_dask")


def importing_the_same() -> dict[str, str]:
    """Return the environment for a program that shall import the same modules as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Programs:
    """Runs programs, one after the other.

    Args:
        modules: Names of modules that programs find imported, besides torch and flowtrain.
    """

    def __init__(self, *modules: str) -> None:
        command = [sys.executable, "-P", str(Path(__file__).resolve()), *modules]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=importing_the_same()
        )

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
    """Wait for programs and fork for each; in the child, return the program that it shall run."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work: list[Any] = json.loads(line)
            return work
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)  # an interpreter with torch takes seconds to exit


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
    for name in (*PREPARED, *sys.argv[1:]):
        importlib.import_module(name)
    become(*wait_for_work())
